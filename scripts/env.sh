# shellcheck shell=bash
# `source scripts/env.sh` puts the right `python` and the command `emp` on PATH, and this repository
# on PYTHONPATH. It changes no shell options, and what it prints goes to stderr. The `python` in use
# stays, if it has everything emp_plugin needs and a solo-learn that works (your conda environment,
# or a solo-learn checkout on PYTHONPATH). Otherwise it is the one of .venv in this repository, made
# from requirements.lock the first time (some minutes, several GB, most of it torch) and again when
# that file changes or a set-up was interrupted. `bash scripts/env.sh` only makes .venv.
#
#     EMP_ENV=venv    always use .venv
#     PYTHON=...      the Python, 3.11 to 3.13, that .venv is made with

_emp_env_say() {
    printf 'env.sh: %s\n' "$*" >&2
}

# Makes .venv in the repository $1, unless it was completed with today's lock and still looks like
# it. Its copy of the lock is empty while it is being made, and filled in as the last step. $2 says
# why the Python in use is not taken.
_emp_env_make() {
    local program=$1/scripts/env.py candidate answer tried=''
    if cmp -s "$1/requirements.lock" "$1/.venv/requirements.lock" &&
        "$1/.venv/bin/python" -I "$program" complete 2>/dev/null; then
        return 0
    fi
    [ -z "${2:-}" ] || _emp_env_say "$2"
    if [ -n "${PYTHON:-}" ]; then
        set -- "$PYTHON"
    else
        set -- python3 python python3.13 python3.12 python3.11
    fi
    for candidate; do
        if answer=$("$candidate" "$program" base 2>/dev/null); then
            "$answer" "$program" make "$answer"
            return
        fi
        tried="$tried, $candidate: ${answer:-does not run}"
    done
    _emp_env_say "no Python to make .venv with, it has to be 3.11, 3.12 or 3.13 (${tried#, })." \
        "Install one, or name it: PYTHON=/path/to/python3"
    return 1
}

# Puts the Python in use, or .venv, and this repository $1 where they are found.
_emp_env_use() {
    local root=$1 path=$1 python='' why=''
    case ${EMP_ENV:-} in
        '')
            case :${PYTHONPATH:-}: in
                :"$root":*) path=$PYTHONPATH ;;
                *) path=$root${PYTHONPATH:+:$PYTHONPATH} ;;
            esac
            python=$(command -v python || true)
            if [ "$python" = "$root/.venv/bin/python" ] && [ -e "$root/.venv/requirements.lock" ]; then
                python=''  # made here: up to date or not, below
            # what an outer script has looked at is not looked at again
            elif [ -n "$python" ] && [ "${EMP_ENV_CHECKED:-}" != "$python:$path" ]; then
                why=$(cd / && PYTHONPATH=$path "$python" -W ignore "$root/scripts/env.py" objection \
                    2>/dev/null || echo 'it does not run')
                why=${why:+"$python is not used as it is: $why"}
            fi
            ;;
        venv) ;;
        *)
            _emp_env_say "EMP_ENV=$EMP_ENV is not known: leave it unset, or EMP_ENV=venv"
            return 1
            ;;
    esac
    case :$PATH: in
        *:"$root/scripts/bin":*) ;;
        *) export PATH="$root/scripts/bin:$PATH" ;;
    esac
    if [ -n "$python" ] && [ -z "$why" ]; then
        export PYTHONPATH="$path" EMP_ENV_CHECKED="$python:$path"
        return 0
    fi
    _emp_env_make "$root" "$why" || return 1
    export PYTHONPATH="$path" VIRTUAL_ENV="$root/.venv"
    unset PYTHONHOME
    case $PATH: in
        "$root/.venv/bin":*) ;;
        *) export PATH="$root/.venv/bin:$PATH" ;;
    esac
    hash -r
}

# What is defined here does not stay in the user's shell.
_emp_env_source() {
    local failed=0
    _emp_env_use "$1" || failed=1
    unset -f _emp_env_say _emp_env_make _emp_env_use _emp_env_source
    return "$failed"
}

if [ -n "${BASH_VERSION:-}" ] && [ "${BASH_SOURCE[0]}" = "$0" ]; then
    _emp_env_make "$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)"
    exit
fi
# A training step on the CPU allocates and frees some hundred tensors of up to a few hundred MB.
# glibc gives each back to the system, which clears its pages again for the next. Keeping them, in
# huge pages, makes a step a quarter faster (benchmarks/README.md). Other systems ignore this; what
# you have set yourself stays.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-8589934592}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-34359738368}"

_emp_env_source "$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]:-$0}")/.." && pwd)"

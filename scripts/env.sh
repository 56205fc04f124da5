# shellcheck shell=bash
#
# Source this to get the right `python` first on PATH, and this repository on PYTHONPATH:
#
#     source "$(dirname "${BASH_SOURCE[0]}")/../../env.sh"
#
# The `python` in use stays, if it has everything emp_plugin needs and a solo-learn that works
# (your conda environment, or a solo-learn checkout on PYTHONPATH). Otherwise it is the one of
# .venv in this repository, made from requirements.lock the first time (some minutes, several
# GB, most of it torch) and again when that file changes or a set-up was interrupted.
#
#     EMP_ENV=venv    always use .venv
#     PYTHON=...      the Python, 3.11 to 3.13, that .venv is made with
#
# Run instead of sourced (`bash scripts/env.sh`) it only makes .venv, where that is missing or out
# of date.
#
# Sourcing changes no shell options, and what it prints goes to stderr.

# --- run: make .venv -------------------------------------------------------------------------

_emp_env_say() {
    printf 'env.sh: %s\n' "$*" >&2
}

_emp_env_die() {
    _emp_env_say "$@"
    exit 1
}

# Modules whose absence is found without the seconds that importing them takes.
_emp_env_modules='torch torchvision lightning torchmetrics timm hydra omegaconf numpy scipy
    sklearn pandas matplotlib PIL einops rich tqdm solo'

# Whether .venv was completed with today's lock, and still looks like it. Its copy of the lock
# is empty while it is being made, and filled in as the last step.
_emp_env_is_current() {
    cmp -s "$1/requirements.lock" "$1/.venv/requirements.lock" &&
        (cd / && "$1/.venv/bin/python" -I -c '
import importlib.util, sys
sys.exit(not all(map(importlib.util.find_spec, sys.argv[1].split())))' "$_emp_env_modules") 2>/dev/null
}

# Prints the path of the first Python that can make .venv.
_emp_env_find_python() {
    local candidate answer tried=''
    if [ -n "${PYTHON:-}" ]; then
        set -- "$PYTHON"
    else
        set -- python3 python python3.13 python3.12 python3.11
    fi
    for candidate; do
        if answer=$("$candidate" -c '
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    print("%d.%d" % sys.version_info[:2])
    sys.exit(1)
try:
    import ensurepip, venv
except ImportError:
    print("%d.%d without venv (Debian, Ubuntu: apt install python3-venv)" % sys.version_info[:2])
    sys.exit(1)
print(getattr(sys, "_base_executable", "") or sys.executable)  # not of a .venv about to go' 2>/dev/null); then
            printf '%s\n' "$answer"
            return
        fi
        tried="$tried, $candidate: ${answer:-does not run}"
    done
    _emp_env_die "no Python to make .venv with, it has to be 3.11, 3.12 or 3.13 (${tried#, }). Install one, or name it: PYTHON=/path/to/python3"
}

# uv does not read pip's configuration, so what matters of it is handed on.
_emp_env_uv_settings() {
    local value
    value=${PIP_INDEX_URL:-$("$1" -m pip config get global.index-url 2>/dev/null || true)}
    if [ -n "$value" ] && [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ]; then
        export UV_DEFAULT_INDEX="$value"
    fi
    value=${PIP_CERT:-$("$1" -m pip config get global.cert 2>/dev/null || true)}
    if [ -n "$value" ] && [ -z "${SSL_CERT_FILE:-}" ]; then
        export SSL_CERT_FILE="$value"
    fi
    export UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-180}"
}

_emp_env_make() {
    local root=$1 venv=$1/.venv base python aside started=$SECONDS
    if _emp_env_is_current "$root"; then
        return
    fi
    base=$(_emp_env_find_python)

    # One set-up at a time. The system drops the lock when the last process holding file 9 ends.
    { exec 9>"$root/.venv.lock"; } 2>/dev/null || _emp_env_die "cannot write in $root, where .venv is to be made"
    "$base" -c '
import fcntl, sys
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("env.sh: waiting for another set-up of .venv to end", file=sys.stderr, flush=True)
    fcntl.flock(9, fcntl.LOCK_EX)
except OSError:
    pass  # a file system without locks'
    if _emp_env_is_current "$root"; then
        return
    fi

    if [ -f "$venv/requirements.lock" ]; then
        if [ -s "$venv/requirements.lock" ]; then
            _emp_env_say ".venv is out of date or damaged: making it again"
        else
            _emp_env_say ".venv was left half-made: making it again"
        fi
        rm -rf "$venv"
    elif [ -e "$venv" ] && ! rmdir "$venv" 2>/dev/null; then
        aside=$root/.venv.$(date +%Y%m%d-%H%M%S)
        mv "$venv" "$aside"
        _emp_env_say ".venv was not completed by env.sh: moved to ${aside##*/}, yours to delete"
    fi

    _emp_env_say "making .venv with $base (a minute or more, most of it download; about 5 GB)"
    mkdir -p "$venv"
    : >"$venv/requirements.lock"
    cp "$root/requirements.lock" "$venv/requirements.lock.new"
    unset PIP_USER PIP_TARGET PIP_PREFIX PYTHONHOME PYTHONPATH UV_SYSTEM_PYTHON
    "$base" -m venv "$venv" >&2 || _emp_env_die "$base could not make a virtual environment (see above)"
    python=$venv/bin/python
    "$python" -m pip install --quiet --disable-pip-version-check "$(grep -m1 "^uv==" "$venv/requirements.lock.new")" >&2 ||
        _emp_env_die "pip could not install uv (see above): is the package index reachable? Run this again when it is"
    _emp_env_uv_settings "$python"
    _emp_env_say "installing $(grep -c '==' "$venv/requirements.lock.new") pinned packages"
    "$python" -m uv pip install --python "$python" --no-deps -r "$venv/requirements.lock.new" >&2 || {
        _emp_env_say "uv could not install them (see above): trying pip, which knows your configuration but is slower"
        "$python" -m pip install --disable-pip-version-check --no-deps -r "$venv/requirements.lock.new" >&2
    } || _emp_env_die "the pinned packages could not be installed (see above). If the network failed, run this again.
        If your platform has no such packages, activate an environment with those of setup.cfg and
        'pip install --no-deps solo-learn==1.0.2': it will be used as it is"
    # Shows that they work together here, and leaves them compiled: three times faster from then
    # on, also where PYTHONDONTWRITEBYTECODE is set.
    _emp_env_say "importing them for the first time"
    (cd / && unset PYTHONDONTWRITEBYTECODE && "$python" -W ignore -c '
import torch, torch._dynamo, torchvision, torchmetrics, timm, lightning.pytorch, pytorch_lightning
import hydra, matplotlib.pyplot, pandas, rich.progress, scipy.stats, sklearn.datasets') >&2 ||
        _emp_env_die "the pinned packages are installed, but do not import here (see above)"
    mv "$venv/requirements.lock.new" "$venv/requirements.lock"
    _emp_env_is_current "$root" || _emp_env_die ".venv is still not complete: requirements.lock changed meanwhile or lacks something"
    _emp_env_say ".venv is ready ($((SECONDS - started)) s)"
}

if [ -n "${BASH_VERSION:-}" ] && [ "${BASH_SOURCE[0]}" = "$0" ]; then
    set -euo pipefail
    _emp_env_make "$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)"
    exit
fi

# --- sourced: choose -------------------------------------------------------------------------

# Says on stdout why the Python $2 cannot be used as it is; nothing if it can.
_emp_env_objection() {
    (cd / && "$2" -W ignore -c '
import contextlib, importlib.util, sys, traceback

def objection(root, modules):
    if sys.version_info < (3, 11):
        return "it is Python %d.%d" % sys.version_info[:2]
    missing = [name for name in modules.split() if importlib.util.find_spec(name) is None]
    if missing:
        return "it lacks " + ", ".join(missing)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            import emp_plugin.solo_learn
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        where = getattr(error, "filename", None) or frames[-1].filename
        of_ours = str(getattr(error, "name", "")).startswith("emp_plugin")
        if of_ours or (str(where).startswith(root) and not isinstance(error, ImportError)):
            return ""  # a fault of this repository, that no other environment cures
        return "%s: %s" % (type(error).__name__, (str(error).strip() or "?").splitlines()[0])
    return ""

print(objection(*sys.argv[1:]))' "$1" "$_emp_env_modules") 2>/dev/null || echo 'it does not run'
}

_emp_env_use() {
    local root=$1 path python why=''
    case ${EMP_ENV:-} in
        '')
            path=$root${PYTHONPATH:+:$PYTHONPATH}
            case :${PYTHONPATH:-}: in
                :"$root":*) path=$PYTHONPATH ;;
            esac
            python=$(command -v python || true)
            if [ "$python" = "$root/.venv/bin/python" ] && [ -e "$root/.venv/requirements.lock" ]; then
                python=''  # made here: up to date or not, below
            fi
            if [ -n "$python" ]; then
                # what an outer script has looked at is not looked at again
                if [ "${EMP_ENV_CHECKED:-}" != "$python:$path" ]; then
                    why=$(PYTHONPATH=$path _emp_env_objection "$root" "$python")
                fi
                if [ -z "$why" ]; then
                    export PYTHONPATH="$path" EMP_ENV_CHECKED="$python:$path"
                    return 0
                fi
            fi
            ;;
        venv) path=$root ;;
        *)
            _emp_env_say "EMP_ENV=$EMP_ENV is not known: leave it unset, or EMP_ENV=venv"
            return 1
            ;;
    esac
    if ! _emp_env_is_current "$root"; then
        [ -z "$why" ] || _emp_env_say "$python is not used as it is: $why"
        bash "$root/scripts/env.sh" || return 1
    fi
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
    unset -f _emp_env_say _emp_env_die _emp_env_is_current _emp_env_find_python \
        _emp_env_uv_settings _emp_env_make _emp_env_objection _emp_env_use _emp_env_source
    unset _emp_env_modules
    return "$failed"
}

# A training step on the CPU allocates and frees some hundred tensors of up to a few hundred MB.
# glibc gives each back to the system, which clears its pages again for the next. Keeping them, in
# huge pages, makes a step a quarter faster (benchmarks/README.md). Other systems ignore this; what
# you have set yourself stays.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-8589934592}" MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-34359738368}"

_emp_env_source "$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]:-$0}")/.." && pwd)"

"""scripts/env.sh and env.py with stubs in place of Python, pip and uv.

Which `python` it leaves, and when it makes .venv.
"""

import os
import shutil
import subprocess
import sys

import pytest

from support import SCRIPTS

TOOLS = "bash cat chmod cmp cp date dirname env grep mkdir mv rm rmdir sleep"
TELL = 'source "$1/scripts/env.sh"; echo "python=$(command -v python)"; echo "path=$PYTHONPATH"'

# A Python that imports everything: COMPLAINT is its objection. Anything else is an error.
READY = """#!/usr/bin/env bash
[[ "$*" == "-W ignore "*"/env.py objection" ]] || exit 3
echo "check in $PWD" >>"$LOG"
echo "$COMPLAINT"
"""

# The Python that makes .venv: makes it for real, but `-m venv` leaves the next stub.
BASE = f"""#!/usr/bin/env bash
case "$*" in
    "-m venv "*)
        echo venv >>"$LOG"
        mkdir -p "$3/bin"
        cp "$STUBS/inside" "$3/bin/python" ;;
    *"/env.py base")
        [ "$VERSION" = good ] && echo "$STUBS/python3" || {{ echo "$VERSION"; exit 1; }} ;;
    *"/env.py make "*) exec "{sys.executable}" "$@" ;;
    *) exit 3 ;;
esac
"""

# The Python inside .venv.
INSIDE = """#!/usr/bin/env bash
case "$*" in
    "-m pip config "*) echo "$INDEX" ;;
    "-m pip install "*) echo "pip ${*: -1}" >>"$LOG"; exit "${PIP_FAILS:-0}" ;;
    "-m uv pip install "*)
        echo "uv index=${UV_DEFAULT_INDEX:-} home=${PYTHONPATH:-}" >>"$LOG"
        [ -z "${KILL_ME:-}" ] || kill -KILL "$PPID"
        sleep "${UV_SLEEPS:-0}"
        exit "${UV_FAILS:-0}" ;;
    "-I "*"/env.py complete") exit 0 ;;
    "-W ignore -c "*) echo import >>"$LOG"; exit "${IMPORT_FAILS:-0}" ;;
    *) exit 3 ;;
esac
"""


class House:
    """A repository with only the set-up, and a PATH where only our stubs are called python."""

    def __init__(self, folder):
        self.root, self.stubs, self.log = folder / "a repository", folder / "stubs", folder / "log"
        self.venv = self.root / ".venv"
        (self.root / "scripts").mkdir(parents=True)
        self.stubs.mkdir()
        for name in ("env.sh", "env.py"):
            shutil.copy(SCRIPTS / name, self.root / "scripts")
        shutil.copytree(SCRIPTS / "bin", self.root / "scripts" / "bin")
        self.lock = self.root / "requirements.lock"
        self.lock.write_text("uv==1\ntorch==1\n")
        for tool in TOOLS.split():
            (self.stubs / tool).symlink_to(shutil.which(tool))
        self.put("python3", BASE)
        self.put("inside", INSIDE)

    def put(self, name, text):
        (self.stubs / name).write_text(text)
        (self.stubs / name).chmod(0o755)

    def start(self, *command, **settings):
        environment = {
            "PATH": str(self.stubs),
            "HOME": str(self.root),
            "LOG": str(self.log),
            "STUBS": str(self.stubs),
        }
        environment |= {"VERSION": "good", "COMPLAINT": "", "INDEX": ""} | settings
        return subprocess.Popen(
            [str(self.stubs / "bash"), *command],
            env=environment,
            cwd=os.sep,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, *command, **settings):
        process = self.start(*command, **settings)
        process.out, process.err = process.communicate(timeout=60)
        return process

    def source(self, **settings):
        return self.run("-euo", "pipefail", "-c", TELL, "bash", str(self.root), **settings)

    def history(self):
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def house(tmp_path):
    return House(tmp_path)


MADE = ["venv", "pip uv==1", "uv index= home=", "import"]


def test_a_python_that_has_everything_stays(house):
    house.put("python", READY)
    done = house.source(PYTHONPATH="/checkout")
    assert (done.returncode, done.err) == (0, "")
    assert done.out.splitlines() == [f"python={house.stubs}/python", f"path={house.root}:/checkout"]
    assert not house.venv.exists()
    # looked at from outside the repository, and once for nested scripts
    assert house.history() == ["check in /"]
    again = house.run("-c", f"{TELL}; {TELL}", "bash", str(house.root))
    assert again.returncode == 0
    assert house.history() == ["check in /"]


def test_a_python_that_lacks_something_gives_way_to_a_venv(house):
    house.put("python", READY)
    done = house.source(COMPLAINT="it lacks torch")
    assert done.returncode == 0, done.err
    assert done.out.splitlines() == [f"python={house.venv}/bin/python", f"path={house.root}"]
    assert "it lacks torch" in done.err
    assert "ready" in done.err
    assert house.history() == ["check in /", *MADE]
    assert house.lock.read_text() == (house.venv / "requirements.lock").read_text()
    # made once
    done = house.source(COMPLAINT="it lacks torch")
    assert (done.returncode, done.err) == (0, "")
    assert house.history() == ["check in /"]


def test_the_venv_can_be_forced(house):
    house.put("python", READY)
    done = house.source(EMP_ENV="venv", PYTHONPATH="/checkout")
    assert done.out.splitlines() == [f"python={house.venv}/bin/python", f"path={house.root}"]
    assert house.history() == MADE
    done = house.source(EMP_ENV="conda")
    assert done.returncode != 0
    assert "EMP_ENV" in done.err


def test_the_command_is_on_the_path(house):
    """With the arguments as they are, in the environment of env.sh, from a script and by itself."""
    house.put("python", READY.replace("|| exit 3", "|| { printf '<%s>' \"$@\"; exit 7; }"))
    source = 'source "$1/scripts/env.sh"; emp list "a b"'
    alias = house.root / "scripts" / "compare" / "it.sh"
    alias.parent.mkdir()
    shutil.copy(SCRIPTS / "compare" / "digits.sh", alias)
    for command in (("-c", source, "bash", str(house.root)), (str(alias), "a b")):
        done = house.run(*command)
        assert done.returncode == 7, done.err
        assert done.out.startswith("<-m><emp_plugin><")
        assert done.out.endswith("><a b>")


def test_the_real_check_of_the_python_in_use(house):
    """With the real interpreter: what is missing is named; our own faults make no environment."""
    house.put("python", f'#!/usr/bin/env bash\nexec "{sys.executable}" -S "$@"\n')
    done = house.source()
    assert done.returncode == 0, done.err
    assert "it lacks torch, " in done.err
    assert ", solo" in done.err

    modules = house.root / "modules"
    needed = (
        "torch torchvision lightning torchmetrics timm hydra omegaconf numpy scipy sklearn pandas "
        "matplotlib PIL einops rich tqdm solo emp_plugin"
    )
    for name in needed.split():
        (modules / name).mkdir(parents=True)
        (modules / name / "__init__.py").touch()
    shutil.move(modules / "emp_plugin", house.root)
    ours = house.root / "emp_plugin" / "solo_learn.py"
    for text, kept in {
        "print('noise')": True,
        "import a_new_requirement": False,
        "raise ImportError('solo-learn 7 is not known')": False,
        "import torch.nothing_like_it": False,
        "from emp_plugin import a_slip": True,
        "a slip": True,
        "a_slip": True,
    }.items():
        ours.write_text(text + "\n")
        done = house.source(PYTHONPATH=str(modules), PYTHONDONTWRITEBYTECODE="1")
        expected = house.stubs if kept else house.venv / "bin"
        assert done.out.splitlines()[0] == f"python={expected}/python", text


def test_a_half_made_venv_is_made_again(house):
    done = house.source(KILL_ME="yes")
    assert done.returncode != 0
    assert (house.venv / "requirements.lock").read_text() == ""
    (house.venv / "left").touch()
    house.history()
    done = house.source()
    assert done.returncode == 0
    assert "half-made" in done.err
    assert house.history() == MADE
    assert not (house.venv / "left").exists()


def test_a_folder_that_cannot_be_written(house):
    (house.root / ".venv.lock").mkdir()
    done = house.source()
    assert done.returncode != 0
    assert ".venv.lock" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("damage", ["no python", "empty"])
def test_a_damaged_venv_is_made_again(house, damage):
    house.source()
    house.history()
    if damage == "no python":
        (house.venv / "bin" / "python").unlink()
    else:
        shutil.rmtree(house.venv)
        house.venv.mkdir()
    assert house.source().returncode == 0
    assert house.history() == MADE


def test_a_venv_of_somebody_else_is_moved_not_deleted(house):
    house.venv.mkdir()
    (house.venv / "theirs").touch()
    done = house.source()
    assert done.returncode == 0
    assert "moved to .venv." in done.err
    assert [path.name for path in house.root.glob(".venv.2*/*")] == ["theirs"]


def test_a_changed_lock_makes_it_again(house):
    house.source()
    house.lock.write_text("uv==1\ntorch==2\n")
    house.history()
    done = house.source()
    assert done.returncode == 0
    assert "out of date" in done.err
    assert house.history() == MADE
    assert "torch==2" in (house.venv / "requirements.lock").read_text()


def test_two_set_ups_at_once_make_one(house):
    first, second = (
        house.start(str(house.root / "scripts" / "env.sh"), UV_SLEEPS="0.5") for _ in range(2)
    )
    errors = first.communicate(timeout=60)[1] + second.communicate(timeout=60)[1]
    assert (first.returncode, second.returncode) == (0, 0), errors
    assert house.history() == MADE


def test_an_unsuitable_python_is_named(house):
    done = house.source(VERSION="3.9")
    assert done.returncode != 0
    assert done.out == ""
    assert "3.11, 3.12 or 3.13" in done.err
    assert "python3: 3.9" in done.err
    assert "PYTHON=" in done.err
    done = house.source(PYTHON="/no where/python")
    assert done.returncode != 0
    assert "/no where/python: does not run" in done.err
    assert house.history() == []
    assert not house.venv.exists()


def test_an_activated_venv_is_not_its_own_base(house):
    """A real one is made again with the Python it was made with; an index without uv stops it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", house.venv], check=True)
    (house.venv / "requirements.lock").write_text("uv==0\n")
    done = house.source(
        PATH=f"{house.venv}/bin:{house.stubs}", PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull
    )
    assert done.returncode != 0
    assert "out of date" in done.err
    assert "could not install uv" in done.err
    assert f"making .venv with {house.venv}" not in done.err


def test_no_network(house):
    done = house.source(PIP_FAILS="1")
    assert done.returncode != 0
    assert "package index" in done.err
    done = house.source(UV_FAILS="2", INDEX="file:///index")
    assert done.returncode == 0
    assert "trying pip" in done.err
    assert "uv index=file:///index home=" in house.history()


def test_packages_that_do_not_import_are_no_environment(house):
    done = house.source(IMPORT_FAILS="1")
    assert done.returncode != 0
    assert "do not import" in done.err
    assert "half-made" in house.source().err


def test_nothing_leaks_into_an_interactive_shell(house):
    command = """
        before=$(set -o; shopt; declare -F)
        source "$1/scripts/env.sh"
        echo "rc=$?"
        after=$(set -o; shopt; declare -F; compgen -v | grep -i _emp_env || true)
        [ "$before" = "$after" ] && echo same
    """
    done = house.run("-c", command, "bash", str(house.root))
    assert done.out.splitlines() == ["rc=0", "same"], done.err
    house.lock.write_text("uv==1\n")
    done = house.run("-c", command, "bash", str(house.root), VERSION="3.9")
    assert done.out.splitlines() == ["rc=1", "same"], done.err

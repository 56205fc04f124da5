"""What env.sh asks of a Python, which may be old and have nothing: ``python env.py WHAT``."""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(os.path.abspath(__file__)).parents[1]
VENV, LOCK = ROOT / ".venv", ROOT / "requirements.lock"
PYTHON, NOTED = VENV / "bin" / "python", VENV / "requirements.lock"
# their absence is found without the seconds that importing them takes
MODULES = """torch torchvision lightning torchmetrics timm hydra omegaconf numpy scipy sklearn
    pandas matplotlib PIL einops rich tqdm solo"""
# shows that they work together here, and leaves them compiled: three times faster from then on
FIRST_IMPORT = """import torch, torch._dynamo, torchvision, torchmetrics, timm, lightning.pytorch
import pytorch_lightning, hydra, matplotlib.pyplot, pandas, rich.progress, scipy.stats
import sklearn.datasets"""
NOT_FOR_VENV = """PIP_USER PIP_TARGET PIP_PREFIX PYTHONHOME PYTHONPATH UV_SYSTEM_PYTHON
    PYTHONDONTWRITEBYTECODE"""
VERSION = ".".join(map(str, sys.version_info[:2]))


def missing(modules=MODULES):
    return [name for name in modules.split() if importlib.util.find_spec(name) is None]


def base():
    """The Python that makes .venv: this one, or the one that this .venv was made with."""
    suits = (3, 11) <= sys.version_info[:2] <= (3, 13)
    if not suits or missing("ensurepip venv"):
        print(VERSION + " without venv (Debian, Ubuntu: apt install python3-venv)" * suits)
        sys.exit(1)
    print(getattr(sys, "_base_executable", "") or sys.executable)


def objection():
    """Why this Python cannot be used as it is; nothing if it can."""
    del sys.path[0]  # the folder of this file
    if sys.version_info < (3, 11):  # noqa: UP036
        return print("it is Python " + VERSION)
    if missing():
        return print("it lacks " + ", ".join(missing()))
    try:
        with contextlib.redirect_stdout(sys.stderr):
            import emp_plugin.solo_learn  # noqa: F401
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        here = str(getattr(error, "filename", None) or last).startswith(str(ROOT))
        of_ours = str(getattr(error, "name", "")).startswith("emp_plugin")
        # no other environment cures a fault of this repository
        if not of_ours and (isinstance(error, ImportError) or not here):
            print(f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}")


def make():
    import fcntl

    python, began = sys.argv[2], time.monotonic()
    # the system drops the lock when the last process that has the file ends
    lock = os.open(ROOT / ".venv.lock", os.O_CREAT | os.O_WRONLY)
    os.set_inheritable(lock, True)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("waiting for another set-up of .venv to end")
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:
        pass  # a file system without locks
    if is_current():
        return
    if NOTED.is_file():
        was = "is out of date or damaged" if NOTED.read_text() else "was left half-made"
        say(f".venv {was}: making it again")
        run("", "rm", "-rf", VENV)
    elif VENV.exists() and any(VENV.iterdir()):
        aside = VENV.rename(ROOT / time.strftime(".venv.%Y%m%d-%H%M%S"))
        say(f".venv was not completed by env.sh: moved to {aside.name}, yours to delete")
    say(f"making .venv with {python} (a minute or more, most of it download; about 5 GB)")
    VENV.mkdir(exist_ok=True)
    NOTED.write_text("")
    pinned = Path(shutil.copy(LOCK, VENV / "requirements.lock.new"))
    for name in NOT_FOR_VENV.split():
        os.environ.pop(name, None)
    run(f"{python} could not make a virtual environment", python, "-m", "venv", VENV)
    packages = [line for line in pinned.read_text().splitlines() if "==" in line]
    pip, these = (PYTHON, "-m", "pip", "install"), ("--no-deps", "-r", pinned)
    again = "is the package index reachable? Run this again when it is"
    uv = next(line for line in packages if line.startswith("uv=="))
    run(f"pip could not install uv: {again}", *pip, "--quiet", uv)
    os.environ.setdefault("UV_HTTP_TIMEOUT", "180")
    hand_on("index-url", "UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL")
    hand_on("cert", "SSL_CERT_FILE", "PIP_CERT")
    say(f"installing {len(packages)} pinned packages")
    if not run("", PYTHON, "-m", "uv", "pip", "install", "--python", PYTHON, *these):
        say("uv could not install them (see above): trying pip, which is slower")
        own = "or activate an environment with setup.cfg's packages and solo-learn: it will be used"
        run(f"pip could not either: {again}, {own}", *pip, *these)
    say("importing them for the first time")
    run("they are installed, but do not import here", PYTHON, "-W", "ignore", "-c", FIRST_IMPORT)
    pinned.replace(NOTED)
    if not is_current():
        sys.exit("env.sh: .venv is still not complete: requirements.lock lacks something")
    say(f".venv is ready ({time.monotonic() - began:.0f} s)")


def is_current():
    same = NOTED.is_file() and PYTHON.exists() and NOTED.read_bytes() == LOCK.read_bytes()
    return same and run("", PYTHON, "-I", __file__, "complete")


def hand_on(setting, variable, *others):
    """Give a setting of pip's to uv, which does not read pip's configuration."""
    command = [PYTHON, "-m", "pip", "config", "get", f"global.{setting}"]
    configured = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    values = [*map(os.environ.get, (variable, *others)), configured]
    if any(values):
        os.environ[variable] = next(filter(None, values))


def run(failure, *command):
    """Whether a command succeeds; the end, if it does not and ``failure`` is said."""
    done = subprocess.run(command, stdout=sys.stderr, close_fds=False).returncode == 0
    if failure and not done:
        sys.exit(f"env.sh: {failure} (see above)")
    return done


def say(text):
    print(f"env.sh: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "complete":
        sys.exit(bool(missing()))
    try:
        {"base": base, "objection": objection, "make": make}[sys.argv[1]]()
    except OSError as error:
        sys.exit(f"env.sh: {error}")

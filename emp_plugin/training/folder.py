"""The folder of one run: where it is, what is written into it, and how an unfinished one is found again."""

import csv
import fcntl
import importlib.metadata
import json
import os
import platform
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from emp_plugin import __version__
from emp_plugin.errors import UserError
from emp_plugin.solo_learn import API, VERSION, pl

CONFIG, SUMMARY, VERSIONS, LOCK = "config.yaml", "summary.json", "versions.json", ".lock"
LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
NOT_COMPARED = (
    "auto_resume",
    "checkpoint",
    "resume_from_checkpoint",
    "wandb",
    "tensorboard",
    "evaluation",
)  # do not change the training


def new_folder(cfg: DictConfig) -> Path:
    """A path for a run that begins: ``<checkpoint.dir>/<method>/<name>-<id>``, not made yet."""
    return _runs_of(cfg) / f"{cfg.name}-{secrets.token_hex(4)}"


def unfinished_folder(cfg: DictConfig) -> Path | None:
    """The folder of a run that trains the same and has no summary, or None; the newest, one with a checkpoint before one without."""
    candidates = []
    for folder in {path.parent for path in _runs_of(cfg).glob(f"*/{CONFIG}")}:
        checkpoints = checkpoints_in(folder)
        written = (checkpoints or [folder / CONFIG])[0].stat().st_mtime
        recent = written > time.time() - 3600 * cfg.auto_resume.max_hours
        if (
            recent
            and not (folder / SUMMARY).exists()
            and _training_part(OmegaConf.load(folder / CONFIG)) == _training_part(cfg)
        ):
            candidates.append((bool(checkpoints), written, folder))
    return max(candidates)[-1] if candidates else None


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoints of a run, the newest first; those of epochs after ``last.ckpt``, which is written after them and is still to come after a kill."""
    return sorted(
        folder.glob("*.ckpt"),
        key=lambda path: (path.name in (LAST, PREVIOUS), path.stat().st_mtime_ns),
        reverse=True,
    )


@contextmanager
def claim(folder: Path, cfg: DictConfig, needed: int) -> Iterator[None]:
    """Make a run's folder, or take over an unfinished one, for this process alone; configuration and versions are written into it.

    Args:
        folder: of the run.
        cfg: its configuration.
        needed: bytes that its checkpoints will take.

    The folder is locked within the context, and the system drops the lock when this process ends, however it ends.

    Raises:
        UserError: if the folder cannot be written, another process is at work in it, or there is no room.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free + sum(
        path.stat().st_size for path in checkpoints_in(folder)
    )
    if free < needed:
        raise UserError(
            f"{existing}: {free / 1e6:.0f} MB are free, the checkpoints of this run take {needed / 1e6:.0f} MB; "
            "choose another folder with checkpoint.dir=DIR"
        )
    about = json.dumps(versions(), indent=2) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
        fcntl.lockf(
            lock, fcntl.LOCK_EX | fcntl.LOCK_NB
        )  # of this process; unlike flock's, workers do not inherit it
        write_text(
            folder / CONFIG, OmegaConf.to_yaml(cfg)
        )  # of a run taken over too: what does not change the training, such as its evaluation, may differ
        write_text(folder / VERSIONS, about)
    except BlockingIOError as error:
        raise UserError(
            f"another process is training in {folder}; wait for it, or start a second run with auto_resume.enabled=False"
        ) from error
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error}; choose another folder with checkpoint.dir=DIR"
        ) from error
    with lock:
        yield


def _runs_of(cfg: DictConfig) -> Path:
    return Path(cfg.checkpoint.dir).expanduser() / cfg.method


def _training_part(cfg: DictConfig) -> dict[str, Any]:
    return {
        key: value
        for key, value in OmegaConf.to_container(cfg, resolve=True).items()
        if key not in NOT_COMPARED
    }


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is either whole or not there."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def write_rows(path: Path, columns: Iterable[str], rows: list[dict[str, Any]]) -> None:
    """Write rows as CSV, whole or not at all; columns that a row lacks stay empty."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def _commit() -> str:
    """Commit of the checkout that this package runs from, "unknown" for an installed one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "unknown"
    answer = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    return answer.stdout.strip() or "unknown"


def _processor() -> str:
    """The processor's model: two that are both "x86_64" may differ much in speed."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )


def versions() -> dict[str, str]:
    """Versions of what a result depends on, and the hardware it ran on."""
    packages = {
        name: importlib.metadata.version(name)
        for name in ("torch", "torchvision", "torchmetrics", "timm", "hydra-core")
    }
    packages[pl.__name__] = pl.__version__
    hardware = f"{_processor()}, {os.cpu_count()} cores, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}"
    return {
        "emp_plugin": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        **packages,
        "solo-learn": f"{VERSION} ({API})",
        "hardware": hardware,
    }

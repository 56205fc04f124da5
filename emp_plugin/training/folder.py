"""The folder of a run: its place, what is written into it, how an unfinished one is found again."""

import csv
import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import shutil
import subprocess
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from emp_plugin import __version__
from emp_plugin.config import Run, to_dict
from emp_plugin.data import ImageData, ImageFiles
from emp_plugin.data.files import make_output_folder
from emp_plugin.errors import UserError
from emp_plugin.solo_learn import API, VERSION, pl

CONFIG, SUMMARY, VERSIONS, LOCK = "config.yaml", "summary.json", "versions.json", ".lock"
DATA = "data.json"
LAST, PREVIOUS = "last.ckpt", "previous.ckpt"

# Raised by hand when a change makes the same settings train to other weights, by more than what an
# accelerator rounds differently.
TRAINING_VERSION = 2
# Settings that do not change the training, and those of the Trainer that only show it or validate.
NOT_COMPARED = {
    "name",
    "auto_resume",
    "checkpoint",
    "resume_from_checkpoint",
    "wandb",
    "tensorboard",
    "evaluation",
    "enable_progress_bar",
    "enable_model_summary",
    "log_every_n_steps",
    "limit_val_batches",
    "num_sanity_val_steps",
    "val_check_interval",
    "check_val_every_n_epoch",
    "knn_eval",
    "max_time",
    "profiler",
}
PLACES = {"num_workers", "train_path", "val_path", "format"}  # of data, likewise


def identity(cfg: Run) -> str:
    """What tells a training from others: a hash of the settings that matter and the version.

    Two runs of one identity end with the same weights, up to what the machine rounds differently.
    A folder of a user's own images is known by its path alone.
    """
    return _identity_of_saved(to_dict(cfg))


def _identity_of_saved(saved: Mapping[str, Any]) -> str:
    settings = {key: value for key, value in saved.items() if key not in NOT_COMPARED}
    settings["precision"] = str(settings.get("precision"))
    performance = settings["performance"]
    # "off" is left out, as before there was such a setting
    settings["performance"] = {key: mode for key, mode in performance.items() if mode != "off"}
    own = settings["data"]["dataset"] == "custom"
    left_out = PLACES - {"train_path"} if own else PLACES
    # as before there were such settings
    left_out |= {key for key in ("window", "no_labels") if not settings["data"].get(key)}
    data = settings["data"].items()
    settings["data"] = {key: value for key, value in data if key not in left_out}
    text = json.dumps([TRAINING_VERSION, settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def identity_of(folder: Path) -> str:
    """The identity of the training in a folder, as it was when that began."""
    began = versions_of(folder)[:1]
    noted = began[0].get("identity") if began else None
    return noted or _identity_of_saved(saved_settings(folder))


def versions_of(folder: Path) -> list[dict[str, Any]]:
    """Versions under which a run began and each time that it was continued."""
    path = folder / VERSIONS
    noted = json.loads(path.read_text()) if path.exists() else []
    return [noted] if isinstance(noted, dict) else noted  # older runs have those of the last time


def saved_settings(folder: Path) -> dict[str, Any]:
    """The settings of the run in a folder, of whatever version, in plain containers."""
    return yaml.safe_load((folder / CONFIG).read_text())


def new_folder(cfg: Run) -> Path:
    """A path for a run that begins: ``<checkpoint.dir>/<method>/<name>-<id>``, not made yet."""
    return _runs_of(cfg) / f"{cfg.name}-{secrets.token_hex(4)}"


def unfinished_folder(cfg: Run) -> Path | None:
    """The folder of a run that trains the same and has no summary, or None.

    One with a checkpoint comes before one without, and a newer before an older.
    """
    oldest = time.time() - 3600 * cfg.auto_resume.max_hours
    candidates = []
    for path in _runs_of(cfg).glob(f"*/{CONFIG}"):
        folder, checkpoints = path.parent, checkpoints_in(path.parent)
        written = (checkpoints or [path])[0].stat().st_mtime
        if written <= oldest or (folder / SUMMARY).exists():
            continue
        if saved_settings(folder)["name"] == cfg.name and identity_of(folder) == identity(cfg):
            candidates.append((bool(checkpoints), written, folder))
    return max(candidates)[-1] if candidates else None


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoints of a run, the newest first; ``last.ckpt`` and ``previous.ckpt`` before others.

    ``epoch=K.ckpt`` is written before the ``last.ckpt`` of the same moment. A run killed between
    the two continues from the older ``last.ckpt`` and writes both again.
    """

    def age(path: Path) -> tuple[bool, int]:
        return path.name in (LAST, PREVIOUS), path.stat().st_mtime_ns

    return sorted(folder.glob("*.ckpt"), key=age, reverse=True)


@contextmanager
def claim(folder: Path, cfg: Run, needed: int, data: dict[str, Any]) -> Iterator[None]:
    """Make a run's folder, or take over an unfinished one, for this process alone.

    Configuration, versions and a description of the images are written into it, into one taken over
    too: settings that do not change the training may differ. The folder is locked within the
    context; however this process ends, the system then drops the lock.

    Args:
        folder: of the run.
        cfg: its configuration.
        needed: bytes that its checkpoints will take.
        data: :func:`describe_data` of its images.

    Raises:
        UserError: if the folder cannot be written, another process is at work in it, or the disk
            has too little space.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    taken = sum(path.stat().st_size for path in checkpoints_in(folder))
    free = shutil.disk_usage(existing).free + taken
    if free < needed:
        raise UserError(
            f"{existing}: {free / 1e6:.0f} MB are free, "
            f"the checkpoints of this run take {needed / 1e6:.0f} MB; "
            "choose another folder with checkpoint.dir=DIR"
        )
    noted = [*versions_of(folder), versions() | {"identity": identity(cfg)}]
    try:
        make_output_folder(folder.parent.parent)
        make_output_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        lock = (folder / LOCK).open("w")
        _take_lock(lock)
        write_settings(folder / CONFIG, to_dict(cfg))
        write_text(folder / VERSIONS, json.dumps(noted, indent=2) + "\n")
        write_text(folder / DATA, json.dumps(data, indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error}; choose another folder with checkpoint.dir=DIR"
        ) from error
    with lock:
        yield


def _take_lock(file: IO[str]) -> None:
    """Lock a file in a run's folder for this process.

    lockf's lock ends with the process. flock's (filelock's) would live on in its data workers.

    Raises:
        UserError: if another process has it. A system without such locks is named in a line.
    """
    try:
        import fcntl  # Windows has none

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise UserError(
            f"another process is training in {Path(file.name).parent}; "
            "wait for it, or start a second run with auto_resume.enabled=False"
        ) from error
    except (ImportError, OSError) as error:
        print(f"no file locks here ({error}): start no second run in {Path(file.name).parent}")


def describe_data(
    train: ImageData | ImageFiles, test: ImageData | ImageFiles | None
) -> dict[str, Any]:
    """What the images of a run are: their number, classes, and a hash of what was listed."""
    return {
        name: {"images": len(images), "classes": list(images.classes), "digest": images.digest()}
        for name, images in (("train", train), ("evaluation", test))
        if images is not None
    }


def check_data(checkpoint: Path, data: dict[str, Any]) -> None:
    """Check that a run is continued on the images that it began with.

    Raises:
        UserError: if it would train on others. Folders from before there was data.json pass.
    """
    noted = checkpoint.parent / DATA
    began = json.loads(noted.read_text()) if noted.exists() else data
    before, images = began["train"], data["train"]
    if before != images:
        raise UserError(
            f"the training images changed since the run in {checkpoint.parent} began: "
            f"{before['images']} images of {len(before['classes'])} classes then, "
            f"{images['images']} of {len(images['classes'])} now. Continued, it would be of two "
            "sets. Train anew with auto_resume.enabled=False and without resume_from_checkpoint, "
            "or bring the old images back"
        )
    if began.get("evaluation") != data.get("evaluation"):
        print("the images to evaluate on are others than when this run began")


def _runs_of(cfg: Run) -> Path:
    return Path(cfg.checkpoint.dir).expanduser() / cfg.method


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is either whole or not there."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write settings in plain containers as YAML, whole or not at all."""
    write_text(path, yaml.safe_dump(dict(settings), sort_keys=False))


def write_rows(path: Path, columns: Collection[str], rows: list[dict[str, Any]]) -> None:
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
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    answer = subprocess.run(command, capture_output=True, text=True)
    return answer.stdout.strip() or "unknown"


def _processor() -> str:
    """The processor's model: two that are both "x86_64" may differ much in speed."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of what a result depends on, and the hardware it ran on."""
    names = ("torch", "torchvision", "torchmetrics", "timm", "hydra-core")
    packages = {name: importlib.metadata.version(name) for name in names}
    packages[pl.__name__] = pl.__version__
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "emp_plugin": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        **packages,
        "solo-learn": f"{VERSION} ({API})",
        "hardware": f"{_processor()}, {os.cpu_count()} cores, {gpu}",
    }

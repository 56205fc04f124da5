"""The folder of one run: where it is, what is written into it, and how an unfinished one is found again."""
import csv
import importlib.metadata
import json
import os
import platform
import secrets
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from emp_plugin import __version__
from emp_plugin.errors import UserError
from emp_plugin.solo_learn import GENERATION, VERSION, pl

CONFIG, SUMMARY, LAST = "config.yaml", "summary.json", "last.ckpt"
NOT_COMPARED = ("auto_resume", "checkpoint", "resume_from_checkpoint", "wandb", "tensorboard", "evaluation")  # do not change the training


def new_folder(cfg: DictConfig) -> Path:
    """Create ``<checkpoint.dir>/<method>/<name>-<id>/`` and write the resolved configuration and the versions into it.

    Raises:
        UserError: if the folder cannot be written.
    """
    folder = Path(cfg.checkpoint.dir).expanduser() / cfg.method / f"{cfg.name}-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True)
        write_text(folder / CONFIG, OmegaConf.to_yaml(cfg))
        write_text(folder / "versions.json", json.dumps(versions(), indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}; choose another folder with checkpoint.dir=DIR") from error
    return folder


def unfinished_folder(cfg: DictConfig) -> Path | None:
    """The newest run folder with a checkpoint and no summary whose configuration trains the same, or None."""
    oldest = time.time() - 3600 * cfg.auto_resume.max_hours
    candidates = [path.parent for path in (Path(cfg.checkpoint.dir).expanduser() / cfg.method).glob(f"*/{LAST}")
                  if path.stat().st_mtime > oldest and not (path.parent / SUMMARY).exists()]
    for folder in sorted(candidates, key=lambda folder: (folder / LAST).stat().st_mtime, reverse=True):
        if (folder / CONFIG).exists() and _training_part(OmegaConf.load(folder / CONFIG)) == _training_part(cfg):
            return folder
    return None


def _training_part(cfg: DictConfig) -> dict[str, Any]:
    return {key: value for key, value in OmegaConf.to_container(cfg, resolve=True).items() if key not in NOT_COMPARED}


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is either whole or not there."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows of the same keys as CSV, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def _commit() -> str:
    """Commit of the checkout that this package runs from, "unknown" for an installed one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "unknown"
    answer = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return answer.stdout.strip() or "unknown"


def versions() -> dict[str, str]:
    """Versions of what a result depends on, and the hardware it ran on."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "torchmetrics", "timm", "hydra-core")}
    packages[pl.__name__] = pl.__version__
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, {os.cpu_count()} cores, no GPU"
    return {"emp_plugin": __version__, "commit": _commit(), "python": platform.python_version(), **packages, "solo-learn": f"{VERSION} ({GENERATION})", "hardware": hardware}

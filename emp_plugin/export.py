"""Weights that leave: a backbone as safetensors, with what is needed to rebuild and feed it."""

import json
import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from emp_plugin.config import augmentations, from_dict, to_dict
from emp_plugin.data import normalise
from emp_plugin.errors import UserError
from emp_plugin.solo_learn import backbone_of, build_method, pl
from emp_plugin.training import probing
from emp_plugin.training.folder import versions
from emp_plugin.training.lightning import epochs_begun

KEY = "emp_plugin"  # of the JSON in the file's metadata
# of the machine it was trained on: no business of others
PATHS = {"data": ("train_path", "val_path"), "checkpoint": ("dir",)}


class Backbone(nn.Module):
    """A trained backbone in evaluation mode that takes images as they are.

    Attributes:
        network: the backbone itself, for normalised images.
        settings: how it was trained (dict): method, dataset, epochs, normalisation, augmentation,
            versions, and the run's configuration without its paths.
    """

    def __init__(self, network: nn.Module, settings: dict[str, Any]):
        super().__init__()
        self.network, self.settings = network, settings
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Features (b, f) of uint8 images (b, 3, H, W).

        Raises:
            ValueError: for anything but such images.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"images must be uint8 (b, 3, H, W), got {images.dtype} {tuple(images.shape)}; "
                "for normalised ones use .network"
            )
        return self.network(normalise(images, self.settings["mean"], self.settings["std"]))


def export_backbone(checkpoint: str | Path, out: str | Path) -> Path:
    """Write the backbone of a run's checkpoint as safetensors; returns the path.

    Its tensors have the backbone's own names for them.

    Raises:
        UserError: for a checkpoint that cannot be read, or a file that cannot be written.
    """
    method, cfg, contents = probing.load_method(checkpoint)
    augmentation, config = asdict(augmentations(cfg)[0]), to_dict(cfg)
    config["resume_from_checkpoint"] = None
    for part, names in PATHS.items():
        config[part] = {key: value for key, value in config[part].items() if key not in names}
    settings = {
        "architecture": cfg.backbone.name,
        "stem_padding": cfg.backbone.stem_padding,
        "mean": augmentation["mean"],
        "std": augmentation["std"],
        "augmentation": augmentation,
        "method": cfg.method,
        "dataset": cfg.data.dataset,
        "epochs": epochs_begun(contents),
        "steps": contents["global_step"],
        "versions": versions(),
        "config": config,
    }
    state = backbone_of(method).state_dict()
    weights = {name: tensor.contiguous() for name, tensor in state.items()}
    out = Path(out).expanduser()
    temporary = out.with_name(out.name + ".tmp")
    try:
        save_file(weights, temporary, metadata={KEY: json.dumps(settings), "format": "pt"})
        temporary.chmod(0o666 & ~_umask())  # safetensors makes files that nobody else reads
        os.replace(temporary, out)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {out}: {error}") from error
    return out


def load_backbone(path: str | Path) -> Backbone:
    """Rebuild the backbone that :func:`export_backbone` wrote, on the CPU and in evaluation mode.

    Raises:
        UserError: for a file that is missing, broken or not of this project.
    """
    try:
        with safe_open(Path(path).expanduser(), "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error})") from error
    if KEY not in metadata:
        reason = "it does not say how its backbone is built"
        raise UserError(f"{path} was not written by emp_plugin: {reason}")
    settings = json.loads(metadata[KEY])
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers are not ours to take
        network = backbone_of(build_method(from_dict(settings["config"])))
    network.load_state_dict(weights)
    return Backbone(network, settings)


def load_method(path: str | Path) -> pl.LightningModule:
    """Rebuild the method of a checkpoint of ours, on the CPU and in evaluation mode.

    The checkpoint holds its settings. No code that it might hold is run.

    Raises:
        UserError: for a file that is missing, broken, or no checkpoint of this project.
    """
    with pl.utilities.seed.isolate_rng():  # the caller's random numbers are not ours to take
        method, *_ = probing.load_method(path)
    return method.eval()


def _umask() -> int:
    """The process's mask for new files, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask

"""Arithmetic of a training, counted by torch."""

import logging
import sys
import warnings
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from emp_plugin.config import Run, augmentations
from emp_plugin.data import ImageData
from emp_plugin.data.datasets import IMAGE_SIZE
from emp_plugin.solo_learn import build_method, pl, processes
from emp_plugin.training.data import PretrainData
from emp_plugin.training.folder import identity
from emp_plugin.transforms import BatchMultiPatch

_COUNTED: dict[str, int | None] = {}
IMAGES = 2  # of the step that is counted; BatchNorm needs more than one
PATCHES = 4  # of EMP that are counted; what all take is a multiple of it


class _CountStep(pl.Callback):
    """Counts from the forward pass to the end of the backward pass; views are made before."""

    def __init__(self) -> None:
        self.counter = FlopCounterMode(display=False)

    def on_train_batch_start(self, *args: Any) -> None:
        self.counter.__enter__()

    def on_after_backward(self, *args: Any) -> None:
        self.counter.__exit__(None, None, None)


def training_flops(cfg: Run) -> int | None:
    """Floating-point operations of training on one image: a multiplication and an addition are two.

    All views, all networks (momentum networks, heads and prototypes too), forward and backward, as
    torch's counter has them: convolutions and matrix products. What ``patch_chunk`` computes again
    is not counted. One step on two images is made on the CPU, once for all runs of one identity.
    None, with a word on standard error, for a method that cannot make such a step.
    """
    known = identity(cfg)
    if known not in _COUNTED:
        try:
            _COUNTED[known] = _count(cfg)
        except Exception as error:  # a method of solo-learn's may want anything of its batch
            print(f"FLOPs were not counted: {type(error).__name__}: {error}", file=sys.stderr)
            _COUNTED[known] = None
    return _COUNTED[known]


def flops_of_batches(cfg: Run, batches: int) -> int | None:
    """Floating-point operations of a training's first batches; None where they cannot be known.

    They cannot where :func:`training_flops` has none, or the run took as many GPUs as it found.
    """
    found = cfg.devices in (None, "auto", -1, "-1") and cfg.accelerator != "cpu"
    per_image = None if found else training_flops(cfg)
    if per_image is None:
        return None
    return batches * cfg.optimizer.batch_size * processes(cfg) * per_image


def _count(cfg: Run) -> int:
    kwargs = {key: value for key, value in cfg.method_kwargs.items() if key != "patch_chunk"}
    if kwargs.get("queue_size"):  # a multiple of the batch
        kwargs["queue_size"] = -(-kwargs["queue_size"] // IMAGES) * IMAGES
    cfg = replace(
        cfg,
        method_kwargs=kwargs,
        optimizer=replace(cfg.optimizer, batch_size=IMAGES),
        max_epochs=1,
        accumulate_grad_batches=1,
        devices=1,
        num_nodes=1,
        accelerator="cpu",
    )
    views, share = augmentations(cfg), 1.0
    if cfg.method == "emp":
        patches = min(PATCHES, views[0].num_patches)
        share = patches / views[0].num_patches
        views = [views[0].with_patches(patches)]
    side = cfg.data.image_size or IMAGE_SIZE[cfg.data.dataset]
    step = _CountStep()
    with torch.random.fork_rng(devices=[]), _quiet():
        images = torch.randint(256, (IMAGES, 3, side, side), dtype=torch.uint8)
        data = PretrainData(
            ImageData(images, torch.zeros(IMAGES, dtype=torch.long), ["any"]),
            None,
            [BatchMultiPatch.from_augmentation(view) for view in views],
            IMAGES,
            seed=0,
            stacked=cfg.method == "emp",
        )
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            limit_val_batches=0,
            callbacks=[step],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        trainer.fit(build_method(cfg), datamodule=data)
    return round(step.counter.get_total_flops() / IMAGES / share)


@contextmanager
def _quiet():
    """Within it, Lightning says nothing of the machine and of this odd run."""
    logger = logging.getLogger(pl.__name__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

"""Learning rates per optimiser step, in solo-learn's shapes."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

STEPWISE = ("warmup_cosine", "cosine", "step")


def warmup_cosine(
    step: int, peak: float, warmup: float, total: float, start: float = 0.0, floor: float = 0.0
) -> float:
    """Learning rate at ``step``.

    A line from ``start`` to ``peak`` over ``warmup`` steps, then half a cosine to ``floor`` at
    ``total``.

    >>> [round(warmup_cosine(step, peak=1.0, warmup=2, total=6), 3) for step in range(7)]
    [0.0, 0.5, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if step < warmup:
        return start + (peak - start) * step / warmup
    progress = min(1.0, (step - warmup) / (total - warmup)) if total > warmup else 1.0
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2


def multi_step(step: int, peak: float, milestones: Sequence[float]) -> float:
    """Learning rate at ``step``: a tenth of it from each milestone on."""
    return peak * 0.1 ** sum(step >= milestone for milestone in milestones)


def steps_of(trainer: Any) -> tuple[int, int]:
    """Optimiser steps of the whole run and of one epoch.

    Raises:
        ValueError: the run has no known length.
    """
    total, batches = trainer.estimated_stepping_batches, trainer.num_training_batches
    if not (0 < total < math.inf and batches < math.inf):
        raise ValueError(
            "a learning rate schedule needs a run of known length: set max_epochs, "
            "and use a loader with a length"
        )
    return int(total), math.ceil(batches / trainer.accumulate_grad_batches)


def is_logged(trainer: Any, step: int) -> bool:
    """Whether Lightning hands its loggers the values of the ``step``-th optimiser step.

    Those of the others, unless they are summed over the epoch, go nowhere.
    """
    every = trainer.log_every_n_steps
    return bool(every) and step % every == 0 or bool(trainer.fast_dev_run)


def per_step(
    optimizer: Optimizer,
    name: str,
    total: int,
    epoch: int,
    warmup_epochs: float = 0,
    warmup_start_lr: float = 0.0,
    min_lr: float = 0.0,
    lr_decay_steps: list[int] | None = None,
) -> LambdaLR:
    """Scheduler to be stepped once per optimiser step.

    ``total`` and ``epoch`` count steps; ``warmup_epochs`` (may be a fraction) and
    ``lr_decay_steps`` count epochs. Groups with ``static_lr`` keep their rate, as in solo-learn.
    Its state is the step count, so it resumes in the middle of an epoch.

    Raises:
        ValueError: name "step" without lr_decay_steps.
    """
    if name == "step" and not lr_decay_steps:
        raise ValueError("scheduler 'step' needs lr_decay_steps")
    warmup = warmup_epochs * epoch if name == "warmup_cosine" else 0
    if warmup >= total:
        warnings.warn(
            f"the warm-up ({warmup:g} steps) is not shorter than the run ({total} steps): "
            "the learning rate never reaches its value; "
            "lower scheduler.warmup_epochs (fractions are fine)",
            stacklevel=2,
        )

    milestones = [milestone * epoch for milestone in lr_decay_steps or []]

    def factor(group: dict[str, Any]):
        peak = group["lr"]
        if group.get("static_lr") or not peak:
            return lambda step: 1.0
        if name == "step":
            return lambda step: multi_step(step, 1.0, milestones)
        return lambda step: warmup_cosine(step, peak, warmup, total, warmup_start_lr, min_lr) / peak

    return LambdaLR(optimizer, [factor(group) for group in optimizer.param_groups])

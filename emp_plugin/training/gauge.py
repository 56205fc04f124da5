"""Is the run learning? Two gauges of its projections, and a word when they collapse."""

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from emp_plugin.losses import at_least_float32
from emp_plugin.solo_learn import pl
from emp_plugin.solo_learn.schedules import is_logged
from emp_plugin.training.callbacks import LateCopy


def effective_rank(z: Tensor) -> Tensor:
    """Effective rank of centred features: ``(tr C)^2 / tr C^2`` of their covariance C.

    This participation ratio is 1 where all rows lie on one line, and at most min(b - 1, d). A
    direction that all rows share does not count. The traces are a sum and a Frobenius norm of the
    smaller Gram matrix, so that the host does not wait for eigenvalues.

    Args:
        z: features of shape ``(b, d)``.

    Returns:
        A scalar in float32 or better; 0 where all rows are exactly equal.

    Source: RankMe (arXiv 2210.02885), with this ratio in place of the entropy of the singular
    values, which sees the tail of small ones. Of VICReg and of its variant without variance and
    covariance that one said 53 and 16, this 28 and 1.7 (docs/is-it-learning.md).
    """
    z = z - z.mean(0)
    gram = z @ z.mT if z.shape[0] <= z.shape[1] else z.mT @ z
    sum_of_squares = gram.square().sum().clamp_min(torch.finfo(z.dtype).tiny)
    return gram.diagonal().sum().square() / sum_of_squares


def spread(z: Tensor) -> Tensor:
    """Standard deviation of unit vectors over images, mean over dimensions, times ``sqrt(d)``.

    It is 1 where they are spread evenly over the sphere, and 0 where all are one vector.

    Args:
        z: vectors of shape ``(b, d)``, of length 1.

    Source: the gauge of SimSiam (arXiv 2011.10566, section 4.1), times sqrt(d).
    """
    return z.std(0, correction=0).mean() * z.shape[1] ** 0.5


def gauges(z: Tensor) -> Tensor:
    """Effective rank of the images' mean projections, and spread of the first view's.

    Args:
        z: projections of shape ``(views, b, d)``, of any length.

    Returns:
        A tensor of the two, in float32 or better.
    """
    with torch.autocast(z.device.type, enabled=False):
        z = F.normalize(at_least_float32(z), dim=-1)
        return torch.stack([effective_rank(z.mean(0)), spread(z[0])])


class CollapseGauge(pl.Callback):
    """Logs ``train_rank`` and ``train_std``, and says once that a run has collapsed.

    A hook on the method's ``projector`` collects what it gives from the start of a batch to its
    backward pass; a method without one is left out. With several processes the figures are of the
    first one's images. They are taken in every fifth step and in those that are logged, as they
    cost a GPU some twenty calls. They are copied from it as they are made and looked at one step
    late, so that the host does not wait.
    """

    EVERY = 5
    # Below either in all looks of PATIENCE steps is a collapse. Runs that learn were below the
    # first for 19 steps at most, and never below 1.5 in rank (docs/is-it-learning.md).
    MIN_STD = 0.18
    MIN_RANK = 1.2
    PATIENCE = 40

    def __init__(self) -> None:
        self.collapsed_at: int | None = None  # the step at which it was said
        self.low_steps = 0
        self.looked_at: int | None = None  # the step of the look before
        self.outputs: list[Tensor] | None = None  # None: nothing is to be collected
        self.values: Tensor | None = None
        self.pending: LateCopy | None = None
        self.hook: Any = None

    def state_dict(self) -> dict[str, int | None]:
        self._check()
        names = ("collapsed_at", "low_steps", "looked_at")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, int | None]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.looked_at is None:
            self.looked_at = trainer.global_step
        projector = getattr(module, "projector", None)
        if isinstance(projector, torch.nn.Module):
            self.hook = projector.register_forward_hook(self._collect)

    def _collect(self, projector: torch.nn.Module, inputs: Any, output: Any) -> None:
        if self.outputs is not None and isinstance(output, Tensor) and output.ndim == 2:
            self.outputs.append(output.detach())

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step + 1
        self.logs = is_logged(trainer, step)
        looks = self.logs or step % self.EVERY == 0
        self.outputs = [] if looks else None
        self.values, self.images = None, len(batch[0])

    def on_before_backward(
        self, trainer: pl.Trainer, module: pl.LightningModule, loss: Tensor
    ) -> None:
        # the backward pass of EMP's chunks projects once more
        outputs, self.outputs = self.outputs, None
        if not outputs:
            return
        rows = torch.cat(outputs)  # views, of b images each
        self.values = gauges(rows.unflatten(0, (-1, self.images)))
        if self.logs:
            module.log_dict({"train_rank": self.values[0], "train_std": self.values[1]})

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._check()
        if self.values is not None and trainer.is_global_zero:
            self.pending = LateCopy.of(self.values, trainer.global_step)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._check()

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if self.hook is not None:
            self.hook.remove()
            self.hook = None

    def _check(self) -> None:
        pending, self.pending = self.pending, None
        if pending is None or self.looked_at is None or self.collapsed_at is not None:
            return
        rank, std = pending.read().tolist()
        low = std < self.MIN_STD or rank < self.MIN_RANK
        self.low_steps = self.low_steps + pending.step - self.looked_at if low else 0
        self.looked_at = pending.step
        if self.low_steps < self.PATIENCE:
            return
        self.collapsed_at = pending.step
        print(
            f"warning: the projections have collapsed at step {pending.step}: standard deviation "
            f"{std:.2g} (1: spread evenly), effective rank {rank:.1f}. "
            "Try a longer scheduler.warmup_epochs or a smaller optimizer.lr "
            "(docs/is-it-learning.md).",
            file=sys.stderr,
        )

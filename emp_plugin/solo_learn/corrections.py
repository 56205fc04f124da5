"""Corrections: changes to solo-learn that alter numbers.

Each is one function that replaces single attributes of its classes and says why. Most of them
count by the optimiser step what solo-learn counts by the epoch or by the loader's length, because a
run of one epoch, or of a part of one (``limit_train_batches``), is a whole training here.
"""

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from emp_plugin.solo_learn.schedules import STEPWISE, per_step, steps_of


def apply_corrections(solo: SimpleNamespace, api: str) -> None:
    """Correct the modules of :func:`repairs.import_modules`; a second call does nothing."""
    if getattr(solo.base, "_corrected_by_emp_plugin", False):
        return
    for correct in CORRECTIONS + (CORRECTIONS_OF_1_0_2 if api == "1.0.2" else ()):
        correct(solo)
    solo.base._corrected_by_emp_plugin = True


def schedule_by_step(solo: SimpleNamespace) -> None:
    """The learning rate moves with every step, and a warm-up may be any share of an epoch.

    1.0.2 moves it once per epoch: in a run of one epoch it would stay where the warm-up starts. The
    warm-up of 1.0.6 divides by its steps less one and has to end on a whole step. Without a warm-up
    1.0.6 gives all parameters the same rate, the classifier's too.
    """

    def by_step(original):
        def configure_optimizers(self):
            name = self.scheduler
            make = _with_muon if self.optimizer == "muon" else original
            # left to solo-learn: "none", LinearModel's others, its error for unknown names, and the
            # schedules of 1.0.6 by epoch
            if name not in STEPWISE or getattr(self, "scheduler_interval", "step") != "step":
                return make(self)
            self.scheduler = "none"
            try:
                optimizer = make(self)
            finally:
                self.scheduler = name
            total, epoch = steps_of(self.trainer)
            scheduler = per_step(
                optimizer,
                name,
                total,
                epoch,
                # LinearModel of 1.0.2 has none of these three: ten epochs, from 0 and down to 0
                warmup_epochs=getattr(self, "warmup_epochs", 10),
                warmup_start_lr=getattr(self, "warmup_start_lr", 0.0),
                min_lr=getattr(self, "min_lr", 0.0),
                lr_decay_steps=self.lr_decay_steps,
            )
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

        return configure_optimizers

    for cls in (solo.base.BaseMethod, solo.linear.LinearModel):
        cls.configure_optimizers = by_step(cls.configure_optimizers)


def _with_muon(self) -> Optimizer:
    """Muon for matrices and convolutions, AdamW for all else; solo-learn has no such optimiser."""
    from timm.optim import Muon

    kwargs = {"lr": self.lr, "weight_decay": self.weight_decay, **self.extra_optimizer_args}
    return Muon(self.learnable_params, **kwargs)


def count_swavs_epochs_in_fractions(solo: SimpleNamespace) -> None:
    """SwAV asks ``current_epoch`` whether its prototypes are still frozen and its queue has begun.

    In a run of one epoch they would be frozen to the end.
    """

    def current_epoch(self) -> float:
        return self.trainer.global_step / steps_of(self.trainer)[1]

    solo.swav.SwAV.current_epoch = property(current_epoch)


def wait_for_swavs_queue(solo: SimpleNamespace) -> None:
    """The queue is used once it is full, as in SwAV's own code (facebookresearch/swav).

    It still begins no earlier than ``epoch_queue_starts``. Until it is full it holds zeros, equally
    far from all prototypes, which drown the batch's assignments. In 1000 epochs it is full long
    before it begins; fitted to one epoch, it may not be.
    """
    original = solo.swav.SwAV.get_assignments

    def get_assignments(self, preds: list[Tensor]) -> list[Tensor]:
        size = self.queue_size
        begun = size > 0 and self.current_epoch >= self.epoch_queue_starts
        if begun and not self.queue[0, -1].any():
            self.queue_size = 0
        try:
            return original(self, preds)
        finally:
            self.queue_size = size

    solo.swav.SwAV.get_assignments = get_assignments


def move_tau_by_step(solo: SimpleNamespace) -> None:
    """tau's cosine spans the optimiser steps of the run, and goes on from them in a resumed run.

    solo-learn's spans the loader's length times the epochs. Where ``limit_train_batches`` ends the
    epochs early, it would never come near 1.
    """
    cls = solo.base.BaseMomentumMethod
    original_start, original_end = cls.on_train_start, cls.on_train_batch_end

    def set_tau(self) -> None:
        self.momentum_updater.update_tau(self.trainer.global_step, steps_of(self.trainer)[0])

    def on_train_start(self) -> None:
        original_start(self)
        # so that the first step after a resume counts as new, whatever is being accumulated
        self.last_step = self.trainer.global_step
        set_tau(self)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        original_end(self, *args, **kwargs)
        set_tau(self)

    cls.on_train_start, cls.on_train_batch_end = on_train_start, on_train_batch_end


def step_lars_at_once(solo: SimpleNamespace) -> None:
    """LARSWrapper of 1.0.2 scales the new gradients, and all weights of a group in one call.

    As published it scales before it calls the closure in which Lightning computes them. So it
    scales those of the step before (none, after zero_grad) and uses the new ones raw, without
    weight decay.

    It also scales one weight after the other and asks three times for each whether a norm is zero.
    The host waits for every answer, and a GPU stands idle. On a CPU the bits are the same.
    """

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        decays = [group.get("weight_decay", 0) for group in self.optim.param_groups]
        for group, decay in zip(self.optim.param_groups, decays):
            params = [
                p
                for p in group["params"]
                if p.grad is not None and (p.ndim != 1 or not self.exclude_bias_n_norm)
            ]
            if params:
                scale(self, params, group["lr"], decay)
            group["weight_decay"] = 0  # it is in the gradients
        self.optim.step()
        for group, decay in zip(self.optim.param_groups, decays):
            group["weight_decay"] = decay
        return loss

    def scale(self, params: list[Tensor], lr: float, decay: float) -> None:
        gradients = [p.grad for p in params]
        p_norm = torch.stack(torch._foreach_norm(params))
        g_norm = torch.stack(torch._foreach_norm(gradients))
        rate = (self.eta * p_norm) / (g_norm + p_norm * decay + self.eps)
        if self.clip:
            rate = (rate / lr).clamp(max=1)
        # a gradient of zeros stays one, and that of a weight of zeros as it is
        rate = torch.where(g_norm != 0, torch.where(p_norm != 0, rate, 1.0), 0.0)
        torch._foreach_add_(gradients, torch._foreach_mul(params, decay))
        torch._foreach_mul_(gradients, list(rate.unbind()))

    solo.lars.LARSWrapper.step = step


def keep_prototypes_at_length_one(solo: SimpleNamespace) -> None:
    """SwAV's prototypes are of length 1 (arXiv 2006.09882), as in 1.0.6, whose settings we take.

    Those of 1.0.2 learn their length, which is 0.58 at the start.
    """
    original = solo.swav.SwAV.__init__

    @functools.wraps(original)  # build.py reads its parameters
    def __init__(self, *args: Any, **kwargs: Any):
        original(self, *args, **kwargs)
        self.prototypes.weight_g.data.fill_(1)
        self.prototypes.weight_g.requires_grad = False

    solo.swav.SwAV.__init__ = __init__


CORRECTIONS = (
    schedule_by_step,
    count_swavs_epochs_in_fractions,
    wait_for_swavs_queue,
    move_tau_by_step,
)
CORRECTIONS_OF_1_0_2 = (step_lars_at_once, keep_prototypes_at_length_one)

"""Corrections: changes to solo-learn that alter numbers.

Each is one function that replaces single attributes of its classes and says why. Most of them
count by the optimiser step what solo-learn counts by the epoch or by the loader's length, because a
run of one epoch, or of a part of one (``limit_train_batches``), is a whole training here.
"""

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from emp_plugin.solo_learn import lars
from emp_plugin.solo_learn.schedules import STEPWISE, is_logged, per_step, steps_of


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
            # left to solo-learn: "none", LinearModel's others, its error for unknown names, and the
            # schedules of 1.0.6 by epoch
            if name not in STEPWISE or getattr(self, "scheduler_interval", "step") != "step":
                return original(self)
            self.scheduler = "none"
            try:
                optimizer = original(self)
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
        if size > 0:  # counted: the host would wait for a look at its last row
            batches = self.trainer.global_step * self.trainer.accumulate_grad_batches
            if batches * len(preds[0]) < self.queue.shape[1]:
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
    original_start = cls.on_train_start

    def set_tau(self) -> None:
        self.momentum_updater.update_tau(self.trainer.global_step, steps_of(self.trainer)[0])

    def on_train_start(self) -> None:
        original_start(self)
        # so that the first step after a resume counts as new, whatever is being accumulated
        self.last_step = self.trainer.global_step
        set_tau(self)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int, _: int = 0) -> None:
        step = self.trainer.global_step
        if step > self.last_step:
            for pair in self.momentum_pairs:
                self.momentum_updater.update(*pair)
            if is_logged(self.trainer, step):
                self.log("tau", torch.full((), self.momentum_updater.cur_tau, device=self.device))
        self.last_step = step
        set_tau(self)

    cls.on_train_start, cls.on_train_batch_end = on_train_start, on_train_batch_end


def step_lars_at_once(solo: SimpleNamespace) -> None:
    """All weights in a few calls, without a wait for a GPU; see :mod:`lars`.

    That of 1.0.2 then scales the gradients that it is called for.
    """
    if hasattr(solo.lars, "LARS"):
        solo.lars.LARS.step = lars.step_of_1_0_6
    else:
        solo.lars.LARSWrapper.step = lars.step_of_1_0_2


def update_teachers_at_once(solo: SimpleNamespace) -> None:
    """A momentum network's update takes all of its weights in three calls; the bits are the same.

    solo-learn's takes three for each weight.
    """

    @torch.no_grad()
    def update(self, online_net: nn.Module, momentum_net: nn.Module) -> None:
        online, momentum = list(online_net.parameters()), list(momentum_net.parameters())
        if momentum:
            torch._foreach_mul_(momentum, self.cur_tau)
            torch._foreach_add_(momentum, torch._foreach_mul(online, 1 - self.cur_tau))

    solo.momentum.MomentumUpdater.update = update


def take_vicregs_covariances_without_waiting(solo: SimpleNamespace) -> None:
    """The elements off the diagonal are a view, where solo-learn selects them by a mask.

    The host would wait for their number. The bits are the same on a CPU; under autocast on a GPU
    they are squared in float32, where solo-learn's ``pow_`` keeps the lower precision.
    """

    def off_diagonal(matrix: Tensor) -> Tensor:
        """All elements but the diagonal's, row by row."""
        size = len(matrix)
        return matrix.flatten()[1:].view(size - 1, size + 1)[:, :-1].reshape(-1)

    def covariance_loss(z1: Tensor, z2: Tensor) -> Tensor:
        images, width = z1.shape
        centred = [z - z.mean(dim=0) for z in (z1, z2)]
        first, second = (off_diagonal((z.T @ z) / (images - 1)) for z in centred)
        return first.pow(2).sum() / width + second.pow(2).sum() / width

    solo.vicreg.covariance_loss = covariance_loss


def move_ressls_queue_without_waiting(solo: SimpleNamespace) -> None:
    """The place in the queue stays on the device, where solo-learn asks for it in every step."""

    @torch.no_grad()
    def dequeue_and_enqueue(self, k: Tensor) -> None:
        k = solo.ressl.gather(k)
        assert self.queue_size % len(k) == 0
        rows = torch.arange(len(k), device=k.device) + self.queue_ptr
        self.queue.index_copy_(0, rows, k.to(self.queue.dtype))
        self.queue_ptr.add_(len(k)).remainder_(self.queue_size)

    solo.ressl.ReSSL.dequeue_and_enqueue = dequeue_and_enqueue


def make_simclrs_zero_without_waiting(solo: SimpleNamespace) -> None:
    """The number of further positives that SimCLR of 1.0.2 logs, 0 without labels, is no copy.

    Copied to a GPU in every step, the host waits for it.
    """
    cls = solo.simclr.SimCLR
    original = cls.training_step

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.multicrop or self.supervised:
            return original(self, batch, batch_idx)
        out = super(cls, self).training_step(batch, batch_idx)
        z1, z2 = (self.projector(features) for features in out["feats"])
        nce_loss = solo.simclr.simclr_loss_func(z1, z2, temperature=self.temperature)
        zero = torch.zeros((), device=nce_loss.device)
        metrics = {"train_nce_loss": nce_loss, "train_n_positives": zero}
        self.log_dict(metrics, on_epoch=True, sync_dist=True)
        return nce_loss + out["loss"]

    cls.training_step = training_step


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
    step_lars_at_once,
    update_teachers_at_once,
    take_vicregs_covariances_without_waiting,
    move_ressls_queue_without_waiting,
)
CORRECTIONS_OF_1_0_2 = (keep_prototypes_at_length_one, make_simclrs_zero_without_waiting)

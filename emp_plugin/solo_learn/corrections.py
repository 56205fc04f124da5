"""Corrections: changes to solo-learn that alter numbers or speed.

They are in subclasses, which our commands build (:func:`corrected`); solo-learn's own classes stay
as they are. Most of them count by the optimiser step what solo-learn counts by the epoch or by the
loader's length, because a run of one epoch, or of a part of one (``limit_train_batches``), is a
whole training here.
"""

import functools
from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from solo.losses import vicreg as vicreg_losses
from solo.methods import dino, ressl, simclr, swav, vicreg
from solo.methods.base import BaseMethod, BaseMomentumMethod
from solo.utils.knn import WeightedKNNClassifier
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics.utilities.data import dim_zero_cat

from emp_plugin.evaluation.probes import nearest, vote, votes_of
from emp_plugin.solo_learn import API, METHODS, lars
from emp_plugin.solo_learn.checkpoints import Exchanged
from emp_plugin.solo_learn.schedules import STEPWISE, is_logged, per_step, steps_of

BANKS = ("train_features", "train_targets", "test_features", "test_targets")


class Corrected(Exchanged):
    """Corrections of every method; EMP inherits them."""

    corrections: tuple[str, ...] = ("lars", "rates")

    def configure_optimizers(self) -> Any:
        """The learning rate moves with every step, and a warm-up may be any share of an epoch.

        1.0.2 moves it once per epoch: in a run of one epoch it would stay where the warm-up starts.
        The warm-up of 1.0.6 divides by its steps less one and has to end on a whole step. Without a
        warm-up 1.0.6 gives all parameters the same rate, the classifier's too.

        LARS takes all weights in a few calls, without a wait for a GPU, and that of 1.0.2 scales
        the gradients that it is called for; see :mod:`lars`.
        """
        name = self.scheduler
        # left to solo-learn: "none", its error for unknown names, the schedules of 1.0.6 by epoch
        by_step = name in STEPWISE and getattr(self, "scheduler_interval", "step") == "step"
        if by_step:
            self.scheduler = "none"
        try:
            made = super().configure_optimizers()
        finally:
            self.scheduler = name
        if not isinstance(made, Optimizer):  # it comes with a schedule of solo-learn's
            return made
        optimizer = lars.at_once(made)
        if not by_step:
            return optimizer
        _mark_static(optimizer, self.learnable_params)
        total, epoch = steps_of(self.trainer)
        scheduler = per_step(
            optimizer,
            name,
            total,
            epoch,
            warmup_epochs=self.warmup_epochs,
            warmup_start_lr=self.warmup_start_lr,
            min_lr=self.min_lr,
            lr_decay_steps=self.lr_decay_steps,
        )
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def _base_shared_step(self, X: Tensor, targets: Tensor) -> dict[str, Any]:
        return _without_labels(super()._base_shared_step(X, targets), targets)

    def on_validation_epoch_end(self) -> None:
        """A validation's means are over the images of all processes; then k-NN's memory is emptied.

        solo-learn takes the mean of the processes' means, however many images each had, and leaves
        the memory to ``compute``, which with several processes sees copies of it.
        """
        images = sum(output["batch_size"] for output in self.validation_step_outputs)
        log_dict = self.log_dict
        self.log_dict = lambda log, **_: log_dict(over_processes(self.trainer, log, images))
        try:
            super().on_validation_epoch_end()
        finally:
            del self.log_dict
        if self.knn_eval and not self.trainer.sanity_checking:
            self.knn.reset()


class CorrectedMomentum(Corrected, BaseMomentumMethod):
    """Corrections of methods with a momentum network.

    tau's cosine spans the optimiser steps of the run, and goes on from them in a resumed run.
    solo-learn's spans the loader's length times the epochs. Where ``limit_train_batches`` ends the
    epochs early, it would never come near 1.
    """

    corrections = (*Corrected.corrections, "tau")

    def on_train_start(self) -> None:
        super().on_train_start()
        # so that the first step after a resume counts as new, whatever is being accumulated
        self.last_step = self.trainer.global_step
        self._set_tau()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = self.trainer.global_step
        if step > self.last_step:
            for online, teacher in self.momentum_pairs:
                follow(online, teacher, self.momentum_updater.cur_tau)
            if is_logged(self.trainer, step):
                self.log("tau", torch.full((), self.momentum_updater.cur_tau, device=self.device))
        self.last_step = step  # so that there is nothing left to do for solo-learn's own
        super().on_train_batch_end(outputs, batch, batch_idx)
        self._set_tau()

    def _set_tau(self) -> None:
        self.momentum_updater.update_tau(self.trainer.global_step, steps_of(self.trainer)[0])

    def _shared_step_momentum(self, X: Tensor, targets: Tensor) -> dict[str, Any]:
        return _without_labels(super()._shared_step_momentum(X, targets), targets)


class SwAV(Corrected, swav.SwAV):
    """SwAV whose prototypes, queue and epochs fit short and interrupted runs.

    Its prototypes are of length 1 (arXiv 2006.09882), as in 1.0.6, whose settings we take. Those of
    1.0.2 learn their length, which is 0.58 at the start.

    It has its queue from the beginning, and a checkpoint holds the parts of all processes.
    solo-learn makes it when training starts, always of zeros. That is too late for a checkpoint,
    which fails on the unexpected key. As everywhere in solo-learn, it is a buffer. DDP hands the
    first process's buffers to all before every step, so that on several GPUs all of them use the
    first one's part.
    """

    corrections = (*Corrected.corrections, "epochs", "prototypes", "queue")

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.prototypes.weight_g.data.fill_(1)
        self.prototypes.weight_g.requires_grad = False
        if self.queue_size > 0:
            self.register_buffer("queue", torch.zeros(2, self.queue_size, self.proj_output_dim))

    @property
    def current_epoch(self) -> float:
        """Counted in fractions: SwAV asks it for the end of frozen prototypes and for its queue.

        In a run of one epoch prototypes would be frozen to the end.
        """
        return self.trainer.global_step / steps_of(self.trainer)[1]

    def on_train_start(self) -> None:
        kept = getattr(self, "queue", None)
        super().on_train_start()
        if kept is not None:
            size = self.queue.shape[1]
            self.queue = kept[:, self.global_rank * size : (self.global_rank + 1) * size].clone()

    def get_assignments(self, preds: list[Tensor]) -> list[Tensor]:
        """The queue is used once it is full, as in SwAV's own code (facebookresearch/swav).

        It still begins no earlier than ``epoch_queue_starts``. Until it is full it holds zeros,
        equally far from all prototypes, which drown the batch's assignments. In 1000 epochs it is
        full long before it begins; fitted to one epoch, it may not be.
        """
        size = self.queue_size
        if size > 0:  # counted: the host would wait for a look at its last row
            batches = self.trainer.global_step * self.trainer.accumulate_grad_batches
            if batches * len(preds[0]) < self.queue.shape[1]:
                self.queue_size = 0
        try:
            return super().get_assignments(preds)
        finally:
            self.queue_size = size

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.queue_size > 0 and self.trainer.world_size > 1:
            checkpoint["state_dict"]["queue"] = torch.cat(list(self.all_gather(self.queue)), dim=1)


class DINO(CorrectedMomentum, dino.DINO):
    """A run that is resumed in the middle of an epoch tells its loss which one it is.

    solo-learn does so at the start of an epoch alone.
    """

    def on_train_start(self) -> None:
        super().on_train_start()
        self.dino_loss_func.epoch = self.current_epoch


class ReSSL(CorrectedMomentum, ressl.ReSSL):
    """The place in the queue stays on the device, where solo-learn asks for it in every step."""

    @torch.no_grad()
    def dequeue_and_enqueue(self, k: Tensor) -> None:
        k = ressl.gather(k)
        assert self.queue_size % len(k) == 0
        rows = torch.arange(len(k), device=k.device) + self.queue_ptr
        self.queue.index_copy_(0, rows, k.to(self.queue.dtype))
        self.queue_ptr.add_(len(k)).remainder_(self.queue_size)


def covariance_loss(z1: Tensor, z2: Tensor) -> Tensor:
    """VICReg's, of z1 and z2 (b, d): a scalar.

    The elements off the diagonal are a view, where solo-learn selects them by a mask: the host
    would wait for their number. The bits are the same on a CPU; under autocast on a GPU they are
    squared in float32, where solo-learn's ``pow_`` keeps the lower precision.
    """

    def off_diagonal(matrix: Tensor) -> Tensor:
        """All elements but the diagonal's, row by row."""
        size = len(matrix)
        return matrix.flatten()[1:].view(size - 1, size + 1)[:, :-1].reshape(-1)

    images, width = z1.shape
    centred = [z - z.mean(dim=0) for z in (z1, z2)]
    first, second = (off_diagonal((z.T @ z) / (images - 1)) for z in centred)
    return first.pow(2).sum() / width + second.pow(2).sum() / width


def _with(function: Callable, **names: Any) -> FunctionType:
    """A copy of a function for which some global names mean something else."""
    parts = function.__name__, function.__defaults__, function.__closure__
    return FunctionType(function.__code__, function.__globals__ | names, *parts)


class VICReg(Corrected, vicreg.VICReg):
    """VICReg with :func:`covariance_loss`."""

    corrections = (*Corrected.corrections, "covariance")

    training_step = _with(
        vicreg.VICReg.training_step,
        vicreg_loss_func=_with(vicreg_losses.vicreg_loss_func, covariance_loss=covariance_loss),
    )


class KNN(WeightedKNNClassifier):
    """k-NN for the runs of our commands.

    solo-learn's ``compute`` counts the classes of the test set alone, which breaks when the
    training set has a label that the test set lacks, and 1.0.2 forgets to normalise features for
    the cosine.
    """

    def __init__(self, k: int, distance_fx: str):
        super().__init__(k=k, distance_fx=distance_fx)
        for bank in BANKS:
            # checkpoints keep those of training: a run may be cut off between filling and asking
            kept = bank.startswith("train")
            self.add_state(bank, default=[], dist_reduce_fx="cat", persistent=kept)

    def compute(self) -> tuple[float, float]:
        """Accuracy @1 and @5 in percent, -1 (as in 1.0.6) without features.

        Empties the memory banks.
        """
        if not len(self.train_features) or not len(self.test_features):
            return -1.0, -1.0
        x, y, u, v = (dim_zero_cat(getattr(self, bank)) for bank in BANKS)
        limit = self.max_distance_matrix_size
        weights, neighbours = nearest(x, u, self.k, self.distance_fx, self.epsilon, limit)
        if self.distance_fx == "cosine":
            weights = votes_of(weights, self.T)
        top1, top5 = vote(weights, neighbours, y, v)
        if not self._is_synced:
            # Banks of several processes together are only lent; on_validation_epoch_end empties
            # each one's own.
            self.reset()
        return top1, top5


OF_SUBCLASSES_TOO = {
    BaseMethod: Corrected,
    BaseMomentumMethod: CorrectedMomentum,
    dino.DINO: DINO,
    swav.SwAV: SwAV,
}
# what these replace as a whole, a subclass may have changed
OF_ITSELF = {ressl.ReSSL: ReSSL, vicreg.VICReg: VICReg}
if API == "1.0.2":

    class SimCLR(Corrected, simclr.SimCLR):
        """The number of further positives that SimCLR of 1.0.2 logs, 0 without labels, is no copy.

        Copied to a GPU in every step, the host waits for it.
        """

        training_step = _with(
            simclr.SimCLR.training_step,
            torch=SimpleNamespace(
                cat=torch.cat, tensor=lambda zero, device: torch.full((), zero, device=device)
            ),
        )

    OF_ITSELF[simclr.SimCLR] = SimCLR


@functools.cache
def corrected(cls: type[BaseMethod]) -> type[BaseMethod]:
    """The class of a method, as METHODS has it, with the corrections that our commands train it by.

    It is a subclass, and called the same; the class itself if it inherits them already.
    """
    known = [OF_SUBCLASSES_TOO[parent] for parent in cls.__mro__ if parent in OF_SUBCLASSES_TOO]
    ours = OF_ITSELF.get(cls, known[0])
    if issubclass(cls, ours):
        return cls
    if issubclass(ours, cls):
        return ours
    return type(cls.__name__, (ours, cls), {"__module__": __name__, "__doc__": cls.__doc__})


def __getattr__(name: str) -> type[BaseMethod]:
    """The corrected class of this name: pickle asks, perhaps where it has not been made yet."""
    for cls in METHODS.values():
        if cls.__name__ == name and issubclass(cls, BaseMethod):
            return corrected(cls)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


@torch.no_grad()
def follow(online: nn.Module, teacher: nn.Module, tau: float) -> None:
    """Move a momentum network towards the online one, all of its weights in three calls.

    solo-learn's takes three for each weight; the bits are the same.
    """
    theirs: list[Tensor] = list(online.parameters())
    weights: list[Tensor] = list(teacher.parameters())
    if weights:
        torch._foreach_mul_(weights, tau)
        torch._foreach_add_(weights, torch._foreach_mul(theirs, 1 - tau))


def over_processes(trainer: Any, log: dict[str, Any], images: int) -> dict[str, Any]:
    """Means over the images of all processes, from those of this one over its ``images``.

    Each image counts once. (Lightning rounds its own weights when their number is odd.)
    """
    if trainer.world_size == 1:
        return log
    sums = torch.tensor(
        [float(images), *(float(value) * images for value in log.values())],
        device=trainer.strategy.root_device,
    )
    total, *sums = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
    return {key: value / total for key, value in zip(log, sums)}


def _mark_static(optimizer: Optimizer, groups: list[dict[str, Any]]) -> None:
    """Groups with ``static_lr`` (SimSiam's predictor) keep that mark, which 1.0.6 takes off."""
    static = {group["name"] for group in groups if "name" in group and group.get("static_lr")}
    for group in optimizer.param_groups:
        # exclude_bias_n_norm_wd splits groups in two and names the second so
        if group.get("name", "").removesuffix("_no_decay") in static:
            group["static_lr"] = True


def _without_labels(out: dict[str, Any], targets: Tensor) -> dict[str, Any]:
    """What a classifier says of a batch; if all targets are -1, a loss of 0, and no accuracy.

    Its cross-entropy is a mean over nothing: NaN, which would be the whole loss of the step. Its
    accuracy would be 0.
    """
    if "loss" in out:  # a momentum network without a classifier has none of them
        none = (targets < 0).all()
        for name, value in {"loss": 0.0, "acc1": torch.nan, "acc5": torch.nan}.items():
            out[name] = out[name].masked_fill(none, value)
    return out

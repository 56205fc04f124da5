"""What both generations of solo-learn need to work on torch 2, Lightning 2 and torchmetrics 1, and to read each other's checkpoints.

As in :mod:`wheel` and :mod:`head`, every patch is one function that replaces single attributes of solo-learn's classes and says why.
"""

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from emp_plugin.errors import UserError
from emp_plugin.solo_learn.knn import knn_accuracy
from emp_plugin.solo_learn.schedules import STEPWISE, per_step, steps_of

NAMES_OF_1_0_6 = {
    "encoder": "backbone",
    "momentum_encoder": "momentum_backbone",
}  # what 1.0.2 calls these modules: what 1.0.6 does
WRITTEN_BY = "solo_learn_generation"  # the key in a checkpoint
FORMER_NAMES = {"wheel": "1.0.2", "head": "1.0.6"}  # what older checkpoints have there


def schedule_by_step(solo: SimpleNamespace) -> None:
    """Learning rates that move with every step, from any share of an epoch of warm-up.

    The wheel's schedules move once per epoch: in a run of one epoch the rate would stay at the start of the warm-up. The head's warm-up
    divides by its steps less one and has to end on a whole step; without one, all parameters (the classifier's too) get the same rate.
    """

    def by_step(original):
        def configure_optimizers(self):
            name = self.scheduler
            # "none", LinearModel's others, and solo-learn's own error for unknown names; the head's schedules by epoch are its own
            if name not in STEPWISE or getattr(self, "scheduler_interval", "step") != "step":
                return original(self)
            self.scheduler = "none"
            try:
                optimizer = original(self)
            finally:
                self.scheduler = name
            total, epoch = steps_of(self.trainer)
            # the wheel's LinearModel has no settings for the warm-up: ten epochs from 0 down to 0, always
            scheduler = per_step(
                optimizer,
                name,
                total,
                epoch,
                getattr(self, "warmup_epochs", 10),
                getattr(self, "warmup_start_lr", 0.0),
                getattr(self, "min_lr", 0.0),
                self.lr_decay_steps,
            )
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

        return configure_optimizers

    for cls in (solo.base.BaseMethod, solo.linear.LinearModel):
        cls.configure_optimizers = by_step(cls.configure_optimizers)


def repair_knn(solo: SimpleNamespace) -> None:
    """torchmetrics 1 has no ``compute_on_step``, and would compute in every ``forward``; :mod:`knn` says what was wrong with the rest."""

    def __init__(
        self,
        k: int = 20,
        T: float = 0.07,
        max_distance_matrix_size: int = int(5e6),
        distance_fx: str = "cosine",
        epsilon: float = 0.00001,
        dist_sync_on_step: bool = False,
    ):
        Metric.__init__(self, dist_sync_on_step=dist_sync_on_step)
        self.k, self.T, self.max_distance_matrix_size = k, T, max_distance_matrix_size
        self.distance_fx, self.epsilon = distance_fx, epsilon
        for state in ("train_features", "train_targets", "test_features", "test_targets"):
            # of training and kept in checkpoints: a run may be cut off between filling and asking
            self.add_state(
                state, default=[], dist_reduce_fx="cat", persistent=state.startswith("train")
            )

    def forward(self, *args: Any, **kwargs: Any):
        self.update(*args, **kwargs)

    def compute(self) -> tuple[float, float]:
        """k-NN accuracy @1 and @5 in percent, -1 (as the head has it) without any features; empties the memory banks."""
        if not len(self.train_features) or not len(self.test_features):
            return -1.0, -1.0
        banks = [
            dim_zero_cat(bank)
            for bank in (
                self.train_features,
                self.train_targets,
                self.test_features,
                self.test_targets,
            )
        ]
        accuracies = knn_accuracy(
            *banks, self.k, self.T, self.distance_fx, self.epsilon, self.max_distance_matrix_size
        )
        if not self._is_synced:  # the banks of several processes together are only lent: on_validation_epoch_end empties each one's own
            self.reset()
        return accuracies

    for function in (__init__, forward, compute):
        setattr(solo.knn.WeightedKNNClassifier, function.__name__, function)


def allow_few_classes(solo: SimpleNamespace) -> None:
    """The momentum classifier and LinearModel ask for the top 5 of any number of classes; with fewer, top-5 is the top of all."""
    original = solo.metrics.accuracy_at_k

    def accuracy_at_k(outputs: Tensor, targets: Tensor, top_k=(1, 5)):
        return original(outputs, targets, [min(k, outputs.size(1)) for k in top_k])

    for module in (solo.metrics, solo.base, solo.linear):
        module.accuracy_at_k = accuracy_at_k


def keep_swavs_queue(solo: SimpleNamespace) -> None:
    """SwAV makes its queue when training starts: too late for a checkpoint, which fails on the unexpected key, and always of zeros.

    Here it is there from the beginning, and a checkpoint holds the parts of all processes. As everywhere in solo-learn, it is a buffer, and DDP
    hands the first process's buffers to all before every step, so that on several GPUs all of them use the first one's part.
    """
    make, start = solo.swav.SwAV.__init__, solo.swav.SwAV.on_train_start

    @functools.wraps(make)  # build.py reads a method's settings off its constructor
    def __init__(self, *args: Any, **kwargs: Any):
        make(self, *args, **kwargs)
        if self.queue_size > 0:
            self.register_buffer("queue", torch.zeros(2, self.queue_size, self.proj_output_dim))

    def on_train_start(self):
        kept = getattr(self, "queue", None)
        start(self)
        if kept is not None:
            size = self.queue.shape[1]
            self.queue = kept[:, self.global_rank * size : (self.global_rank + 1) * size].clone()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]):
        super(solo.swav.SwAV, self).on_save_checkpoint(checkpoint)
        if self.queue_size > 0 and self.trainer.world_size > 1:
            checkpoint["state_dict"]["queue"] = torch.cat(list(self.all_gather(self.queue)), dim=1)

    for function in (__init__, on_train_start, on_save_checkpoint):
        setattr(solo.swav.SwAV, function.__name__, function)


def resume_dinos_epoch(solo: SimpleNamespace) -> None:
    """DINO tells its loss the epoch at the epoch's start, which a run resumed in the middle of one has behind it."""

    def on_train_start(self):
        super(solo.dino.DINO, self).on_train_start()
        self.dino_loss_func.epoch = self.current_epoch

    solo.dino.DINO.on_train_start = on_train_start


REPAIRS = (schedule_by_step, repair_knn, allow_few_classes, keep_swavs_queue, resume_dinos_epoch)


def over_processes(trainer: Any, log: dict[str, Any], images: int) -> dict[str, Any]:
    """The means over the images of all processes, each image once (Lightning's own weights are rounded when their number is odd)."""
    if trainer.world_size == 1:
        return log
    sums = torch.tensor(
        [float(images), *(float(value) * images for value in log.values())],
        device=trainer.strategy.root_device,
    )
    total, *sums = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
    return {key: value / total for key, value in zip(log, sums)}


def exchange_checkpoints(solo: SimpleNamespace, api: str) -> None:
    """Checkpoints call the backbone what 1.0.6 calls it, whoever writes them; either name is read.

    The ``main_linear.py`` of 1.0.6 takes the weights called ``backbone``. If there are none it starts
    from random ones without a word. Only weights are exchanged. The optimisers' states differ, so a
    run is continued under the version that began it.
    """
    here = NAMES_OF_1_0_6 if api == "1.0.6" else {new: old for old, new in NAMES_OF_1_0_6.items()}
    original = solo.base.BaseMethod.load_state_dict

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = _rename(checkpoint["state_dict"], NAMES_OF_1_0_6)
        checkpoint[WRITTEN_BY] = api

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        continued = self._trainer is not None and self._trainer.state.fn == "fit"
        writer = checkpoint.get(WRITTEN_BY, api)
        writer = FORMER_NAMES.get(writer, writer)
        if continued and writer != api:
            raise UserError(
                f"this checkpoint was written under solo-learn {writer}, and this is {api}: it can be "
                "evaluated here, but its training only continues there. "
                "Start another run with auto_resume.enabled=False"
            )

    def load_state_dict(self, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any):
        return original(self, _rename(state_dict, here), *args, **kwargs)

    for function in (on_save_checkpoint, on_load_checkpoint, load_state_dict):
        setattr(solo.base.BaseMethod, function.__name__, function)


def _rename(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """The state with other names for some of the method's modules."""
    parts = ((key.partition("."), value) for key, value in state.items())
    return {names.get(module, module) + dot + rest: value for (module, dot, rest), value in parts}

"""What solo-learn's methods count by the epoch, or by the loader's length, counted by the optimiser step, and what else goes wrong for them in short runs; on
either generation.

A run of one epoch, or of a part of one (``limit_train_batches``), is a whole training here.
"""

from typing import Any

from torch import Tensor

from emp_plugin.solo_learn.schedules import steps_of


def apply_corrections(swav: type, momentum: type) -> None:
    """Patch the classes SwAV and BaseMomentumMethod; a second call does nothing."""
    if not hasattr(swav, "_counts_by_step"):
        count_swavs_epochs_in_fractions(swav)
        wait_for_swavs_queue(swav)
        move_tau_by_step(momentum)
        swav._counts_by_step = True


def count_swavs_epochs_in_fractions(swav: type) -> None:
    """SwAV asks ``current_epoch`` whether its prototypes still rest and its queue has begun: in a run of one epoch they would always rest."""

    def current_epoch(self) -> float:
        return self.trainer.global_step / steps_of(self.trainer)[1]

    swav.current_epoch = property(current_epoch)


def wait_for_swavs_queue(swav: type) -> None:
    """The queue is used once it is full, as in SwAV's own code (facebookresearch/swav), and not before ``epoch_queue_starts``: until it is full it holds
    zeros, equally far from all prototypes, which drown the batch's assignments. In 1000 epochs it is full long before it starts; fitted to one, it may not be."""
    original = swav.get_assignments

    def get_assignments(self, preds: list[Tensor]) -> list[Tensor]:
        size = self.queue_size
        if (
            size > 0
            and self.current_epoch >= self.epoch_queue_starts
            and not self.queue[0, -1].any()
        ):
            self.queue_size = 0
        try:
            return original(self, preds)
        finally:
            self.queue_size = size

    swav.get_assignments = get_assignments


def move_tau_by_step(momentum: type) -> None:
    """tau's cosine spans the loader's length times the epochs, though ``limit_train_batches`` may end each epoch early: tau would never near 1.
    Here it spans the run's optimiser steps, and stands where they stand, in a continued run too."""
    original_start, original_end = momentum.on_train_start, momentum.on_train_batch_end

    def set_tau(self) -> None:
        self.momentum_updater.update_tau(self.trainer.global_step, steps_of(self.trainer)[0])

    def on_train_start(self) -> None:
        original_start(self)
        self.last_step = (
            self.trainer.global_step
        )  # the first step after a resume is one more, whatever is being accumulated
        set_tau(self)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        original_end(self, *args, **kwargs)
        set_tau(self)

    momentum.on_train_start, momentum.on_train_batch_end = on_train_start, on_train_batch_end

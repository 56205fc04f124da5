"""What solo-learn's methods count by the epoch, or by the loader's length, counted by the optimiser step; on either generation.

A run of one epoch, or of a part of one (``limit_train_batches``), is a whole training here.
"""
from typing import Any

from emp_plugin.solo_learn.schedules import steps_of


def apply_patches(swav: type, momentum: type) -> None:
    """Patch the classes SwAV and BaseMomentumMethod; a second call does nothing."""
    if not hasattr(swav, "_counts_by_step"):
        count_swavs_epochs_in_fractions(swav)
        move_tau_by_step(momentum)
        swav._counts_by_step = True


def count_swavs_epochs_in_fractions(swav: type) -> None:
    """SwAV asks ``current_epoch`` whether its prototypes still rest and its queue has begun: in a run of one epoch they would always rest."""

    def current_epoch(self) -> float:
        return self.trainer.global_step / steps_of(self.trainer)[1]

    swav.current_epoch = property(current_epoch)


def move_tau_by_step(momentum: type) -> None:
    """tau's cosine spans the loader's length times the epochs, though ``limit_train_batches`` may end each epoch early: tau would never near 1.
    Here it spans the run's optimiser steps, and stands where they stand, in a continued run too."""
    original_start, original_end = momentum.on_train_start, momentum.on_train_batch_end

    def set_tau(self) -> None:
        self.momentum_updater.update_tau(self.trainer.global_step, steps_of(self.trainer)[0])

    def on_train_start(self) -> None:
        original_start(self)
        set_tau(self)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        original_end(self, *args, **kwargs)
        set_tau(self)

    momentum.on_train_start, momentum.on_train_batch_end = on_train_start, on_train_batch_end

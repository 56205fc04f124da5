"""All that we read or set in Lightning beyond its documented interface.

A new Lightning may change any of it. tests/training/test_lightning.py says which.
"""

from typing import Any

import torch
from torch import Tensor

from emp_plugin.solo_learn import pl

# what its handler of SLURM's signal leaves in the run's folder
REQUEUE_CHECKPOINTS = "hpc_ckpt_*.ckpt"


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """The trainer's own list, which it does not declare."""
    return trainer.callbacks  # type: ignore[attr-defined]


def batches_trained(trainer: pl.Trainer) -> int:
    """Batches of all epochs that training has behind it, those of before a resume included."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    return progress.total.processed


def batches_of(checkpoint: dict[str, Any]) -> int:
    """Batches that a checkpoint's training has behind it, in each process."""
    return checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]


def epochs_begun(checkpoint: dict[str, Any]) -> int:
    """Epochs that a checkpoint's training has begun: the completed, and one that has batches."""
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    return checkpoint["epoch"] + (progress["current"]["processed"] > 0)


def align_step_count(trainer: pl.Trainer) -> None:
    """Lightning's count for the loggers is one ahead when it continues from between two steps."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def add_completed_epochs(trainer: pl.Trainer, epochs: int) -> None:
    """Move the count of completed epochs; Lightning resumes from an epoch's last moment alone."""
    progress = trainer.fit_loop.epoch_progress
    for count in (progress.total, progress.current):
        count.completed += epochs


def spare_broadcast_of_sigterm(trainer: pl.Trainer) -> None:
    """With several processes Lightning asks the first before every batch whether it had SIGTERM.

    The host waits for the answer. Our own handler takes Lightning's place, so that it is always no.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    loop._broadcast_sigterm_tensor = lambda: None


def requeue_signal(trainer: pl.Trainer) -> int | None:
    """The signal by which SLURM asks a job to stop and be queued again; None elsewhere."""
    environment: Any = trainer._accelerator_connector.cluster_environment
    return environment.requeue_signal if getattr(environment, "auto_requeue", False) else None


def epoch_sums(trainer: pl.Trainer) -> dict[str, list[Tensor]]:
    """[sum, weight] so far of each mean that Lightning logs at the end of the epoch.

    With several processes both are means over the processes.
    """
    sums = {}
    for key, metric in trainer.fit_loop.epoch_loop._results.items():
        if metric.meta.on_epoch and metric.meta.is_mean_reduction:
            parts = (metric.value, metric.cumulated_batch_size)
            sums[key] = [
                trainer.strategy.reduce(part.float().clone(), reduce_op="mean") for part in parts
            ]
    return sums


def add_epoch_sums(trainer: pl.Trainer, sums: dict[str, list[Tensor]]) -> None:
    """Add sums of :func:`epoch_sums` to the means of this epoch; those added leave ``sums``."""
    results = trainer.fit_loop.epoch_loop._results
    for key in sums.keys() & results.keys():
        metric = results[key]
        value, weight = sums.pop(key)
        metric.value = metric.value + torch.as_tensor(value, device=metric.value.device)
        weight = torch.as_tensor(weight, device=metric.value.device)
        metric.cumulated_batch_size = metric.cumulated_batch_size + weight

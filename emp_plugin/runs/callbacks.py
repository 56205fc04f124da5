"""What watches a training run: checkpoints, the check for a broken loss, and the progress bar."""
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from emp_plugin.errors import UserError
from emp_plugin.runs.folder import LAST
from emp_plugin.solo_learn import pl


CONFIG_KEY = "emp_plugin_config"  # where a checkpoint carries the run's configuration


class AtomicCheckpointIO(pl.plugins.io.TorchCheckpointIO):
    """Writes a checkpoint under a temporary name and renames it, so that an interrupted write never replaces a good one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        temporary = f"{path}.tmp"
        super().save_checkpoint(checkpoint, temporary, storage_options)
        os.replace(temporary, path)


class Checkpoints(pl.Callback):
    """Keeps ``last.ckpt`` (every few steps and at the end of every epoch) and ``epoch=K.ckpt`` (every ``frequency`` epochs, K completed).

    Args:
        folder: of the run.
        every_n_steps: optimiser steps between two writes of ``last.ckpt``.
        frequency: epochs between two kept checkpoints.
        keep_previous: keep all of them, or only the newest.
        config: the run's configuration in plain containers, stored in every checkpoint so that it can be rebuilt from the file.
    """

    def __init__(self, folder: Path, every_n_steps: int, frequency: int, keep_previous: bool, config: dict[str, Any]):
        self.folder, self.every_n_steps, self.frequency, self.keep_previous = folder, every_n_steps, frequency, keep_previous
        self.config = config
        self.saved_step = 0

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[CONFIG_KEY] = self.config

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step  # stands still while gradients accumulate
        due = step % self.every_n_steps == 0 and step > self.saved_step and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if due and torch.isfinite(outputs["loss"]):
            self._save_last(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._save_last(trainer)
        epoch = trainer.current_epoch + 1
        if epoch % self.frequency and epoch != trainer.max_epochs:
            return
        kept = self.folder / f"epoch={epoch}.ckpt"
        if trainer.is_global_zero:
            temporary = kept.with_suffix(".tmp")
            shutil.copyfile(self.folder / LAST, temporary)
            os.replace(temporary, kept)
            if not self.keep_previous:
                for old in self.folder.glob("epoch=*.ckpt"):
                    if old != kept:
                        old.unlink()

    def _save_last(self, trainer: pl.Trainer) -> None:
        for logger in trainer.loggers:
            logger.save()  # a continued run keeps the metrics up to its checkpoint, so they have to be on disk by then
        trainer.save_checkpoint(self.folder / LAST, weights_only=False)
        self.saved_step = trainer.global_step


class StopOnBrokenLoss(pl.Callback):
    """Stops the run when the loss is NaN or infinite, with the step, the learning rate and what to try.

    A loss is looked at one step late, when it has long been computed: looking at once would make the host wait for a GPU.

    Raises:
        UserError: at the step after the broken one, or at the end of the epoch.
    """

    pending: tuple[int, float, torch.Tensor] | None = None
    rate = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self.rate = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._check()
        self.pending = trainer.global_step, self.rate, outputs["loss"].detach()

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._check()

    def _check(self) -> None:
        if self.pending is not None:
            step, rate, loss = self.pending
            if not torch.isfinite(loss):
                raise UserError(f"the loss is {loss.item()} at step {step} (learning rate {rate:.3g}). "
                                f"Try a smaller optimizer.lr, or precision=32 if this run used fp16.")


class Progress(pl.callbacks.TQDMProgressBar):
    """Lightning's progress bar with the number of patches (views) trained on per second, since this process began."""

    def __init__(self, views_per_step: int):
        super().__init__()
        self.views_per_step = views_per_step
        self.batches = 0

    def on_train_batch_start(self, *args: Any) -> None:
        if not self.batches:
            self.began = time.perf_counter()
        super().on_train_batch_start(*args)

    def on_train_batch_end(self, *args: Any) -> None:
        self.batches += 1
        super().on_train_batch_end(*args)

    def get_metrics(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, module)
        metrics.pop("v_num", None)
        if self.batches:
            metrics["patches/s"] = f"{self.batches * self.views_per_step / (time.perf_counter() - self.began):.0f}"
        return metrics

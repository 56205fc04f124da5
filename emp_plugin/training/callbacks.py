"""What watches a training run: checkpoints, signals, the check for a broken loss, and the progress bar."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

from emp_plugin.errors import UserError
from emp_plugin.solo_learn import pl
from emp_plugin.training.folder import LAST, PREVIOUS
from emp_plugin.training.lightning import (
    add_completed_epochs,
    add_epoch_sums,
    align_step_count,
    epoch_sums,
    requeue_signal,
)

CONFIG_KEY = "emp_plugin_config"  # where a checkpoint carries the run's configuration
EPOCH_KEY = "emp_plugin_epoch"  # and the sums behind the means of the epoch it is in


class AtomicCheckpointIO(pl.plugins.io.TorchCheckpointIO):
    """Writes a checkpoint under a temporary name and renames it; the ``last.ckpt`` that it replaces stays as ``previous.ckpt``.

    Raises:
        UserError: if it cannot be written; the older ones are still there.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        path = Path(path)
        temporary = path.with_name(path.name + ".tmp")
        try:
            torch.save(checkpoint, temporary)
            if path.name == LAST and path.exists():
                os.replace(path, path.with_name(PREVIOUS))
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:  # a full disk is the one or the other
            temporary.unlink(missing_ok=True)
            raise UserError(
                f"cannot write {path}: {str(error).splitlines()[0]}; the checkpoint before it is kept"
            ) from error


class Checkpoints(pl.Callback):
    """Keeps ``last.ckpt`` (every few steps, where ``min_seconds`` have passed, and at the end of every epoch), ``epoch=K.ckpt`` (every ``frequency``
    epochs, K completed) and, if asked to, ``step=N.ckpt``.

    A checkpoint is of the moment between two steps: it is written when the next batch is about to be trained on, or training ends. At the end
    of a batch would be too early: Lightning calls a callback's hook before the module's (momentum networks) and logs after both. SIGTERM,
    SIGINT and, under SLURM, the signal that asks to requeue are answered at the same moment.

    Args:
        folder: of the run.
        every_n_steps: optimiser steps between two writes of ``last.ckpt`` within an epoch.
        min_seconds: that have passed since the one before: a GPU makes 50 steps in the time of a few writes.
        frequency: epochs between two kept checkpoints.
        keep_previous: keep all of them, or only the newest.
        config: the run's configuration in plain containers, stored in every checkpoint so that it can be rebuilt from the file.
        keep_every_n_steps: optimiser steps between two ``step=N.ckpt``, which are all kept; None: there are none.

    Raises:
        UserError: after a signal, when the checkpoint is written.
    """

    def __init__(
        self,
        folder: Path,
        every_n_steps: int,
        min_seconds: float,
        frequency: int,
        keep_previous: bool,
        config: dict[str, Any],
        keep_every_n_steps: int | None = None,
    ):
        self.folder, self.every_n_steps, self.min_seconds, self.frequency, self.keep_previous = (
            folder,
            every_n_steps,
            min_seconds,
            frequency,
            keep_previous,
        )
        self.config, self.keep_every_n_steps = config, keep_every_n_steps
        self.saved_step = 0
        self.loss = torch.zeros(())
        self.signal = 0
        self.epoch_sums: dict[str, list[torch.Tensor]] = {}

    # what a checkpoint holds besides Lightning's own

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[CONFIG_KEY] = self.config
        # those of before a resume, until its first step is made
        checkpoint[EPOCH_KEY] = epoch_sums(trainer) | self.epoch_sums

    def on_load_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.epoch_sums = checkpoint.get(EPOCH_KEY, {})

    # when it is written

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.saved_at = time.monotonic()
        self.requeue_signal = requeue_signal(trainer)
        self.requeue = (
            signal.getsignal(self.requeue_signal) if self.requeue_signal else None
        )  # Lightning's
        for number in (signal.SIGTERM, signal.SIGINT, self.requeue_signal):
            if number:
                signal.signal(
                    number, self._note_signal
                )  # Lightning puts the old ones back when the fit ends

    def _note_signal(self, number: int, frame: Any) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the step
        self.signal = number

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches:
            return  # in the middle of a step
        step = trainer.global_step
        align_step_count(trainer)
        if self.keep_every_n_steps and step and step % self.keep_every_n_steps == 0:
            trainer.save_checkpoint(self.folder / f"step={step}.ckpt", weights_only=False)
        if batch_idx == 0:
            self._save_last(trainer, trainer.current_epoch)
        elif step % self.every_n_steps == 0 and trainer.strategy.reduce_boolean_decision(
            time.monotonic() - self.saved_at >= self.min_seconds
        ):
            self._save_last(trainer)
        self._answer_signal(trainer)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.loss = outputs["loss"].detach()
        add_epoch_sums(trainer, self.epoch_sums)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch
        add_completed_epochs(trainer, -1)
        self._save_last(trainer, epoch)
        add_completed_epochs(trainer, 1)
        self._answer_signal(trainer)

    def _save_last(self, trainer: pl.Trainer, epoch: int = 0) -> None:
        """``last.ckpt``, and before it that of a completed epoch: a run killed between the two resumes before the epoch's end and comes by again."""
        if trainer.global_step > self.saved_step and trainer.strategy.reduce_boolean_decision(
            bool(torch.isfinite(self.loss))
        ):
            if epoch and (epoch % self.frequency == 0 or epoch == trainer.max_epochs):
                self._keep(trainer, self.folder / f"epoch={epoch}.ckpt")
            trainer.save_checkpoint(self.folder / LAST, weights_only=False)
            self.saved_step, self.saved_at = trainer.global_step, time.monotonic()

    def _keep(self, trainer: pl.Trainer, path: Path) -> None:
        trainer.save_checkpoint(path, weights_only=False)
        if trainer.is_global_zero and not self.keep_previous:
            for old in self.folder.glob("epoch=*.ckpt"):
                if old != path:
                    old.unlink()

    def _answer_signal(self, trainer: pl.Trainer) -> None:
        received = self.signal
        if trainer.world_size > 1:  # one process's signal stops all of them, at the same step
            received = int(
                trainer.strategy.reduce(
                    torch.tensor(received, device=trainer.strategy.root_device), reduce_op="max"
                )
            )
        if not received:
            return
        self._save_last(trainer)
        if received == self.requeue_signal:
            self.requeue(
                received, None
            )  # asks SLURM to start the job again; the checkpoint it leaves for itself is the one we have
            if trainer.is_global_zero:
                for extra in self.folder.glob("hpc_ckpt_*.ckpt"):
                    extra.unlink()
        path = self.folder / LAST
        how = (
            "the same command continues"
            if self.config["auto_resume"]["enabled"]
            else f"resume_from_checkpoint={path} continues"
        )
        raise UserError(
            f"stopped by {signal.Signals(received).name} after step {trainer.global_step}; "
            + (f"{how} from {path}" if path.exists() else "no step was made")
        )


class StopOnBrokenLoss(pl.Callback):
    """Stops the run when the loss is NaN or infinite, with the step, the learning rate and what to try.

    A loss is looked at one step late, from a copy that a GPU made on its way: the host waits for nothing that is not long done.

    Raises:
        UserError: at the step after the broken one, or at the end of the epoch.
    """

    pending: tuple[int, float, torch.Tensor, torch.cuda.Event | None] | None = None
    rate = 0.0

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.rate = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._check()
        loss = outputs["loss"].detach()
        copy = loss.to("cpu", non_blocking=True)
        self.pending = (
            trainer.global_step,
            self.rate,
            copy,
            torch.cuda.current_stream().record_event() if loss.is_cuda else None,
        )

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._check()

    def _check(self) -> None:
        if self.pending is not None:
            step, rate, loss, copied = self.pending
            if copied:
                copied.synchronize()
            if not torch.isfinite(loss):
                raise UserError(
                    f"the loss is {loss.item()} at step {step} (learning rate {rate:.3g}). "
                    f"Try a smaller optimizer.lr, or precision=32 if this run used fp16."
                )


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
            metrics["patches/s"] = (
                f"{self.batches * self.views_per_step * trainer.world_size / (time.perf_counter() - self.began):.0f}"
            )
        return metrics

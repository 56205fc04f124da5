"""What watches a run: checkpoints, signals, the check for a broken loss, the progress bar."""

import os
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from emp_plugin.errors import UserError
from emp_plugin.solo_learn import pl
from emp_plugin.training.folder import LAST, PREVIOUS
from emp_plugin.training.lightning import (
    REQUEUE_CHECKPOINTS,
    add_completed_epochs,
    add_epoch_sums,
    align_step_count,
    epoch_sums,
    requeue_signal,
    spare_broadcast_of_sigterm,
)

# where a checkpoint carries the run's configuration, and the sums behind its epoch's means
CONFIG_KEY = "emp_plugin_config"
EPOCH_KEY = "emp_plugin_epoch"


class AtomicCheckpointIO(pl.plugins.TorchCheckpointIO):
    """Writes a checkpoint under a temporary name and renames it.

    The ``last.ckpt`` that it replaces stays as ``previous.ckpt``.

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
            reason = str(error).splitlines()[0]
            raise UserError(
                f"cannot write {path}: {reason}; the checkpoint before it is kept"
            ) from error


class Checkpoints(pl.Callback):
    """Writes the checkpoints of a run, and answers signals.

    - ``last.ckpt``: within an epoch every few steps, and at its end.
    - ``epoch=K.ckpt``: every ``frequency`` epochs; K are completed.
    - ``step=N.ckpt``: if asked for.

    A checkpoint is of the moment between two steps. It is written when the next batch is about to
    be trained on, or training ends. The end of a batch would be too early: Lightning calls a
    callback's hook before the module's (momentum networks), and logs after both. SIGTERM, SIGINT
    and, under SLURM, the signal that asks to requeue are answered at the same moment, with several
    processes a step later: then all of them know.

    Args:
        folder: of the run.
        every_n_steps: optimiser steps between two writes of ``last.ckpt`` within an epoch.
        min_seconds: least time between them; a GPU makes 50 steps while a few are written.
        frequency: epochs between two kept checkpoints.
        keep_previous: keep all of these, or only the newest.
        config: the run's configuration in plain containers; every checkpoint carries it, so that
            the method can be rebuilt from the file.
        keep_every_n_steps: optimiser steps between two ``step=N.ckpt``, which are all kept; None:
            there are none.
        max_seconds: of training in this process; then it is stopped as by a signal. None: no limit.

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
        max_seconds: float | None = None,
    ):
        self.folder = folder
        self.every_n_steps = every_n_steps
        self.min_seconds = min_seconds
        self.frequency = frequency
        self.keep_previous = keep_previous
        self.config = config
        self.keep_every_n_steps = keep_every_n_steps
        self.max_seconds = max_seconds
        self.saved_step = 0
        self.loss = torch.zeros(())
        self.signal = 0
        self.asked: LateMaximum | None = None
        self.epoch_sums: dict[str, list[torch.Tensor]] = {}

    # what a checkpoint holds besides Lightning's own

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[CONFIG_KEY] = self.config
        # until the first step after a resume is made, the sums are those that it came with
        checkpoint[EPOCH_KEY] = epoch_sums(trainer) | self.epoch_sums

    def on_load_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.epoch_sums = checkpoint.get(EPOCH_KEY, {})

    # when it is written

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.saved_at = time.monotonic()
        spare_broadcast_of_sigterm(trainer)
        self.requeue_signal = requeue_signal(trainer)
        signals: list[int] = [signal.SIGTERM, signal.SIGINT]
        if self.requeue_signal:
            # Lightning's handler
            self.requeue: Any = signal.getsignal(self.requeue_signal)
            signals.append(self.requeue_signal)
        for number in signals:  # Lightning puts the old handlers back when the fit ends
            signal.signal(number, self._note_signal)
        if self.max_seconds:
            signal.signal(signal.SIGALRM, self._note_signal)
            signal.setitimer(signal.ITIMER_REAL, self.max_seconds)

    def on_exception(self, *args: Any) -> None:
        self._stop_clock()

    def _stop_clock(self) -> None:
        if self.max_seconds:
            signal.setitimer(signal.ITIMER_REAL, 0)

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
        elif step % self.every_n_steps == 0:
            due = time.monotonic() - self.saved_at >= self.min_seconds
            if trainer.strategy.reduce_boolean_decision(due):
                self._save_last(trainer)
        self._answer_signal(trainer, self._signal_of_all(trainer))

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
        self._stop_clock()
        epoch = trainer.current_epoch
        add_completed_epochs(trainer, -1)
        self._save_last(trainer, epoch)
        add_completed_epochs(trainer, 1)
        self._signal_of_all(trainer)
        self._answer_signal(trainer, self._signal_of_all(trainer))

    def _save_last(self, trainer: pl.Trainer, epoch: int = 0) -> None:
        """Write ``last.ckpt``, and before it that of a completed epoch.

        A run killed between the two resumes before the epoch's end, and comes by again.
        """
        if trainer.global_step <= self.saved_step:
            return
        finite = bool(torch.isfinite(self.loss))
        if not trainer.strategy.reduce_boolean_decision(finite):
            return
        if epoch and (epoch % self.frequency == 0 or epoch == trainer.max_epochs):
            self._save_epoch(trainer, self.folder / f"epoch={epoch}.ckpt")
        trainer.save_checkpoint(self.folder / LAST, weights_only=False)
        self.saved_step, self.saved_at = trainer.global_step, time.monotonic()

    def _save_epoch(self, trainer: pl.Trainer, path: Path) -> None:
        trainer.save_checkpoint(path, weights_only=False)
        if trainer.is_global_zero and not self.keep_previous:
            for old in self.folder.glob("epoch=*.ckpt"):
                if old != path:
                    old.unlink()

    def _signal_of_all(self, trainer: pl.Trainer) -> int:
        """The signal that stops all processes, at the same step; 0: none.

        With several processes it is one that any had at the call before.
        """
        if trainer.world_size == 1:
            return self.signal
        asked, device = self.asked, trainer.strategy.root_device
        self.asked = LateMaximum(self.signal, device, trainer.global_step)
        return asked.read() if asked else 0

    def _answer_signal(self, trainer: pl.Trainer, received: int) -> None:
        if not received:
            return
        self._save_last(trainer)
        if received == self.requeue_signal:
            self.requeue(received, None)  # asks SLURM to start the job again
            if trainer.is_global_zero:  # its checkpoint is the one that we have
                for extra in self.folder.glob(REQUEUE_CHECKPOINTS):
                    extra.unlink()
        path = self.folder / LAST
        if not path.exists():
            advice = "no step was made"
        elif self.config["auto_resume"]["enabled"]:
            advice = f"the same command continues from {path}"
        else:
            advice = f"resume_from_checkpoint={path} continues"
        name = signal.Signals(received).name.replace("SIGALRM", "max_time")
        raise UserError(f"stopped by {name} after step {trainer.global_step}; {advice}")


class LateCopy(NamedTuple):
    """A tensor copied from the GPU as it is made, to be read a step later without a wait."""

    step: int
    copy: torch.Tensor
    copied: torch.cuda.Event | None

    @classmethod
    def of(cls, value: torch.Tensor, step: int) -> "LateCopy":
        copy = value.to("cpu", non_blocking=True)
        copied = torch.cuda.current_stream().record_event() if value.is_cuda else None
        return cls(step, copy, copied)

    def read(self) -> torch.Tensor:
        if self.copied:
            self.copied.synchronize()
        return self.copy


class LateMaximum:
    """The greatest of all processes' numbers, to be read a step later without a wait.

    Args:
        number: this process's.
        device: where the processes exchange numbers.
        step: the trainer's.
    """

    def __init__(self, number: int, device: torch.device, step: int):
        self.value = torch.full((), number, device=device)
        self.work = dist.all_reduce(self.value, dist.ReduceOp.MAX, async_op=True)
        if self.value.is_cuda:
            self.work.wait()  # the GPU's stream does, not the host
            self.copy = LateCopy.of(self.value, step)

    def read(self) -> int:
        if self.value.is_cuda:
            return int(self.copy.read())
        self.work.wait()
        return int(self.value)


class StopOnBrokenLoss(pl.Callback):
    """Stops the run when the loss is NaN or infinite.

    It is looked at one step late, so that the host does not wait for a GPU.

    Raises:
        UserError: at the step after the broken one, or at the end of the epoch.
    """

    pending: tuple[LateCopy, float] | None = None
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
        self.pending = LateCopy.of(outputs["loss"].detach(), trainer.global_step), self.rate

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._check()

    def _check(self) -> None:
        if self.pending is None:
            return
        copy, rate = self.pending
        loss = copy.read()
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss is {loss.item()} at step {copy.step} (learning rate {rate:.3g}). "
                "Try a smaller optimizer.lr, or precision=32 if this run used fp16."
            )


class Progress(pl.callbacks.TQDMProgressBar):
    """Lightning's progress bar with the patches (views) per second since this process began."""

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
            views = self.batches * self.views_per_step * trainer.world_size
            metrics["patches/s"] = f"{views / (time.perf_counter() - self.began):.0f}"
        return metrics

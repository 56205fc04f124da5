"""A method's networks compiled for its training steps, or left as they are if a compiler fails."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from emp_plugin.errors import UserError
from emp_plugin.solo_learn import networks_of, pl


class Compiled(pl.Callback):
    """Compiles backbone and head with ``torch.compile``, and the teacher's, in training alone.

    A module's ``forward`` is replaced, not the module: the names in a checkpoint stay, and hooks
    run as ever. ``Module.compile`` would leave an ``nn.Sequential``, such as our heads, as it is:
    torch compiles no frame of ``torch.nn`` itself. Validation, and all that follows the training,
    is not compiled.

    Before the first step of a process everything is tried on its views, forward and backward, and
    the state put back. If that fails, one line says so, and the run is not compiled at all. Eager
    from its first bit on, it is the run that it would have been without this.

    A continued run stays what it was, compiled or not.

    Args:
        mode: ``default`` or ``reduce-overhead`` (CUDA graphs), as of ``torch.compile``.

    Raises:
        UserError: if a run that was compiled cannot be any more.
    """

    def __init__(self, mode: str):
        self.mode = mode
        # of each module its compiled forward; None: not tried yet
        self.forwards: dict[nn.Module, Any] | None = None
        self.before: bool | None = None  # whether the run was, before it was continued

    @property
    def compiled(self) -> bool:
        return bool(self.before if self.forwards is None else self.forwards)

    def state_dict(self) -> dict[str, bool]:
        return {"compiled": self.compiled}

    def load_state_dict(self, state: dict[str, bool]) -> None:
        self.before = state["compiled"]

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.forwards is None:
            self._begin(trainer, module, batch[1])
        # what CUDA graphs gave in one step may be overwritten from the next one on
        if self.mode == "reduce-overhead" and batch_idx % trainer.accumulate_grad_batches == 0:
            torch.compiler.cudagraph_mark_step_begin()

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._put_back()

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._put_in()

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._put_back()
        torch.compiler.reset()  # the memory of CUDA graphs is the evaluation's now

    def _begin(
        self, trainer: pl.Trainer, module: pl.LightningModule, views: Tensor | list[Tensor]
    ) -> None:
        if self.before is False:
            self.forwards = {}  # it goes on as it began
            return
        online, teacher = networks_of(module)
        # those of an earlier run in this process count: torch keeps eight versions of a function
        torch.compiler.reset()
        try:
            # a teacher's CUDA graphs have not been tried
            self.forwards = {part: self._compile(part, self.mode) for part in online}
            self.forwards |= {part: self._compile(part, "default") for part in teacher}
            self._put_in()
            with trainer.precision_plugin.train_step_context():
                _try(online, teacher, views)
        except Exception as error:  # whatever a compiler, or the code that it made, fails with
            self._put_back()
            self.forwards = {}
            lines = str(error).strip().splitlines() or [""]
            reason = f"the compiler failed ({type(error).__name__}: {lines[0]})"
            if self.before:
                raise UserError(
                    f"this run was compiled so far, and {reason}: mend it, or begin anew with "
                    "performance.compile=off"
                ) from error
            print(
                f"performance.compile={self.mode}: this run is not compiled, because {reason}",
                flush=True,
            )

    @staticmethod
    def _compile(part: nn.Module, mode: str) -> Any:
        # code for each shape by itself, so that which code runs does not depend on those before
        return torch.compile(part.forward, mode=mode, dynamic=False)

    def _put_in(self) -> None:
        for part, forward in (self.forwards or {}).items():
            part.forward = forward

    def _put_back(self) -> None:
        for part in self.forwards or {}:
            part.__dict__.pop("forward", None)  # its class has the own one


def _try(online: list[nn.Module], teacher: list[nn.Module], views: Tensor | list[Tensor]) -> None:
    """One pass of all views' shapes, with gradients; weights, buffers and random state stay."""
    views = [views.flatten(0, 1)] if isinstance(views, Tensor) else views
    of_each_shape = {view.shape: view for view in views}.values()
    with _unchanged([*online, *teacher], views[0].device):
        for x in of_each_shape:
            h = _through(online, x)
            weights = [p for part in online for p in part.parameters() if p.requires_grad]
            torch.autograd.grad(h.float().sum(), weights, allow_unused=True)
            with torch.no_grad():
                _through(teacher, x)


def _through(parts: list[nn.Module], x: Tensor) -> Tensor:
    for part in parts:
        x = part.forward(x)  # without hooks, which belong to the training's own steps
    return x


@contextmanager
def _unchanged(parts: list[nn.Module], device: torch.device) -> Iterator[None]:
    """After it, buffers (of BatchNorm) and random numbers are what they were before."""
    buffers = [buffer for part in parts for buffer in part.buffers()]
    before = [buffer.clone() for buffer in buffers]
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for buffer, value in zip(buffers, before):
            buffer.copy_(value)

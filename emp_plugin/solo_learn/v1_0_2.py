"""Makes solo-learn 1.0.2, written for torch 1.9 and Lightning 1.5, work on torch 2, Lightning 2 and torchmetrics 1.

Its files are not edited: :func:`apply_repairs` replaces single attributes of its classes. Every patch is one function, here or (if the
repository's head needs it too) in :mod:`repairs`, and says why it exists; the tests show for each what happens without it.
"""

import functools
import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytorch_lightning as pl
import torch
from torch.optim.lr_scheduler import LambdaLR

from emp_plugin.solo_learn.repairs import REPAIRS, exchange_checkpoints, over_processes
from emp_plugin.solo_learn.schedules import warmup_cosine

PL_BOLTS = ("pl_bolts", "pl_bolts.optimizers", "pl_bolts.optimizers.lr_scheduler")
LOGGED = tuple(
    f"{prefix}{name}"
    for prefix in ("", "momentum_")
    for name in ("val_loss", "val_acc1", "val_acc5")
)


class LinearWarmupCosineAnnealingLR(LambdaLR):
    """Stands in for pl_bolts' scheduler of this name, whose package does not import on Lightning 2. Moves by whatever unit steps it."""

    def __init__(
        self,
        optimizer,
        warmup_epochs: int,
        max_epochs: int,
        warmup_start_lr: float = 0.0,
        eta_min: float = 0.0,
        last_epoch: int = -1,
    ):
        def factor(group: dict[str, Any]):
            peak = group.get("initial_lr", group["lr"])
            return lambda epoch: (
                warmup_cosine(epoch, peak, warmup_epochs, max_epochs, warmup_start_lr, eta_min)
                / peak
                if peak
                else 1.0
            )

        super().__init__(optimizer, [factor(group) for group in optimizer.param_groups], last_epoch)


def import_solo() -> SimpleNamespace:
    """Import the wheel and return the modules that are patched.

    solo-learn imports pl_bolts and, in dino.py, distutils (gone from Python 3.12). Where they are missing or broken, stand-ins are in
    ``sys.modules`` during this import only, so that nobody else finds a fake package.
    """
    with _stand_ins(), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # of APIs that solo-learn uses; its user cannot change them
        warnings.simplefilter("ignore", FutureWarning)
        importlib.import_module("solo")
        return SimpleNamespace(
            **{
                name: importlib.import_module(f"solo.{path}")
                for name, path in (
                    ("base", "methods.base"),
                    ("linear", "methods.linear"),
                    ("dino", "methods.dino"),
                    ("swav", "methods.swav"),
                    ("knn", "utils.knn"),
                    ("lars", "utils.lars"),
                    ("metrics", "utils.metrics"),
                )
            }
        )


def apply_repairs(solo: SimpleNamespace) -> None:
    """Patch the modules of :func:`import_solo`; a second call does nothing."""
    if getattr(solo.base, "_patched_by_emp_plugin", False):
        return
    for patch in (
        *REPAIRS,
        log_validation_by_hook,
        accept_batch_end_without_loader_index,
        step_lars_at_once,
        separate_dinos_clipping,
        keep_prototypes_at_length_one,
    ):
        patch(solo)
    exchange_checkpoints(solo, "1.0.2")
    solo.base._patched_by_emp_plugin = True


@contextmanager
def _stand_ins() -> Iterator[None]:
    added = {**_pl_bolts_stand_in(), **_distutils_stand_in()}
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


def _imports(name: str) -> bool:
    """Whether a module can be imported; a failed attempt leaves nothing of its package behind."""
    before = set(sys.modules)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(name)
        return True
    except Exception:  # pl_bolts fails on Lightning 2 with more than ImportError
        package = name.split(".")[0]
        for leftover in set(sys.modules) - before:
            if leftover.split(".")[0] == package:
                del sys.modules[leftover]
        return False


def _pl_bolts_stand_in() -> dict[str, ModuleType]:
    if _imports(PL_BOLTS[-1]):
        return {}
    modules = {name: ModuleType(name) for name in PL_BOLTS}
    modules[PL_BOLTS[-1]].LinearWarmupCosineAnnealingLR = LinearWarmupCosineAnnealingLR
    return modules


def _distutils_stand_in() -> dict[str, ModuleType]:
    if _imports(
        "distutils.util"
    ):  # dino.py takes distutils.util from `import distutils`; this import also puts it there
        return {}
    distutils = ModuleType("distutils")
    distutils.util = SimpleNamespace(strtobool=_strtobool)
    return {"distutils": distutils}


def _strtobool(text: str) -> int:
    if text.lower() in ("y", "yes", "t", "true", "on", "1"):
        return 1
    if text.lower() in ("n", "no", "f", "false", "off", "0"):
        return 0
    raise ValueError(f"invalid truth value '{text}'")


def log_validation_by_hook(solo: SimpleNamespace) -> None:
    """Lightning 2 refuses modules with ``validation_epoch_end`` and no longer hands over the steps' outputs: they are kept by hooks."""

    def on_validation_epoch_start(self):
        self._validation_outputs = []

    def on_validation_batch_end(
        self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ):
        if outputs is not None:
            # momentum methods return a pair, the second None without a momentum classifier
            self._validation_outputs.append(outputs if isinstance(outputs, tuple) else (outputs,))

    def on_validation_epoch_end(self):
        parts = [part for part in zip(*self._validation_outputs) if part[0] is not None]
        self._validation_outputs = []
        log = {
            key: solo.metrics.weighted_mean(part, key, "batch_size")
            for part in parts
            for key in LOGGED
            if key in part[0]
        }
        # without training features (trainer.validate) there are no neighbours
        if (
            getattr(self, "knn_eval", False)
            and not self.trainer.sanity_checking
            and self.knn.train_features
        ):
            log["val_knn_acc1"], log["val_knn_acc5"] = self.knn.compute()
            self.knn.reset()
        images = sum(output["batch_size"] for output in parts[0]) if parts else 1
        self.log_dict(over_processes(self.trainer, log, images))

    for cls in (solo.base.BaseMethod, solo.linear.LinearModel):
        for hook in (on_validation_epoch_start, on_validation_batch_end, on_validation_epoch_end):
            setattr(cls, hook.__name__, hook)
    for cls in (solo.base.BaseMethod, solo.base.BaseMomentumMethod, solo.linear.LinearModel):
        del cls.validation_epoch_end


def accept_batch_end_without_loader_index(solo: SimpleNamespace) -> None:
    """Lightning 2 calls ``on_train_batch_end`` without the ``dataloader_idx`` that the momentum update's hook demands."""
    original = solo.base.BaseMomentumMethod.on_train_batch_end

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0):
        original(self, outputs, batch, batch_idx, dataloader_idx)

    solo.base.BaseMomentumMethod.on_train_batch_end = on_train_batch_end


def step_lars_at_once(solo: SimpleNamespace) -> None:
    """LARSWrapper scales the gradients first and hands the closure, in which Lightning computes them, to the inner optimiser: it scales the previous
    step's gradients (none, after zero_grad), and the new ones are used raw and without weight decay. So: closure first, then LARS.

    And it scales one weight after the other, with a dozen small operations and three questions (is the norm zero?) that each make the host wait for a GPU,
    which is idle meanwhile. So: all weights of a group in one call, without questions. On a CPU the bits are the wheel's.
    """

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        decays = [group.get("weight_decay", 0) for group in self.optim.param_groups]
        for group, decay in zip(self.optim.param_groups, decays):
            params = [
                p
                for p in group["params"]
                if p.grad is not None and (p.ndim != 1 or not self.exclude_bias_n_norm)
            ]
            if params:
                scale(self, params, group["lr"], decay)
            group["weight_decay"] = 0  # it is in the gradients
        self.optim.step()
        for group, decay in zip(self.optim.param_groups, decays):
            group["weight_decay"] = decay
        return loss

    def scale(self, params: list[torch.Tensor], lr: float, decay: float) -> None:
        gradients = [p.grad for p in params]
        p_norm, g_norm = (
            torch.stack(torch._foreach_norm(tensors)) for tensors in (params, gradients)
        )
        rate = (self.eta * p_norm) / (g_norm + p_norm * decay + self.eps)
        if self.clip:
            rate = (rate / lr).clamp(max=1)
        # a gradient of zeros stays one, and that of a weight of zeros as it is
        rate = torch.where(g_norm != 0, torch.where(p_norm != 0, rate, 1.0), 0.0)
        torch._foreach_add_(gradients, torch._foreach_mul(params, decay))
        torch._foreach_mul_(gradients, list(rate.unbind()))

    solo.lars.LARSWrapper.step = step


def separate_dinos_clipping(solo: SimpleNamespace) -> None:
    """DINO's ``clip_gradients(clip)`` hides Lightning's method of the same name, which Lightning 2 calls in every step."""
    original = solo.dino.DINO.clip_gradients

    def clip_gradients(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        if isinstance(optimizer, (int, float)):  # DINO's own call, with its threshold
            original(self, optimizer)
        else:
            pl.LightningModule.clip_gradients(
                self, optimizer, gradient_clip_val, gradient_clip_algorithm
            )

    solo.dino.DINO.clip_gradients = clip_gradients


def keep_prototypes_at_length_one(solo: SimpleNamespace) -> None:
    """SwAV's prototypes are of length 1 (arXiv 2006.09882), as in the repository's head, whose settings our recipe takes; the wheel's are of
    any length, 0.58 at the start, and learn it."""
    original = solo.swav.SwAV.__init__

    @functools.wraps(original)  # build.py reads its parameters
    def __init__(self, *args: Any, **kwargs: Any):
        original(self, *args, **kwargs)
        self.prototypes.weight_g.data.fill_(1)
        self.prototypes.weight_g.requires_grad = False

    solo.swav.SwAV.__init__ = __init__

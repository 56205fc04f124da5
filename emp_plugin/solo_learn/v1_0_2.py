"""Repairs that solo-learn 1.0.2 needs besides those of :mod:`repairs`.

It was written for torch 1.9 and Lightning 1.5.
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
from torch.optim.lr_scheduler import LambdaLR

from emp_plugin.solo_learn import repairs
from emp_plugin.solo_learn.schedules import warmup_cosine

PL_BOLTS = ("pl_bolts", "pl_bolts.optimizers", "pl_bolts.optimizers.lr_scheduler")


class LinearWarmupCosineAnnealingLR(LambdaLR):
    """Stands in for pl_bolts' scheduler of this name, whose package does not import on Lightning 2.

    It moves by whatever unit steps it.
    """

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
            if not peak:
                return lambda epoch: 1.0
            shape = (peak, warmup_epochs, max_epochs, warmup_start_lr, eta_min)
            return lambda epoch: warmup_cosine(epoch, *shape) / peak

        super().__init__(optimizer, [factor(group) for group in optimizer.param_groups], last_epoch)


def import_solo() -> SimpleNamespace:
    """Import solo-learn; the modules of :func:`repairs.import_modules`.

    solo-learn imports pl_bolts and, in dino.py, distutils (gone from Python 3.12). Where they are
    missing or broken, stand-ins are in ``sys.modules`` during this import only, so that nobody else
    finds a fake package.
    """
    with _stand_ins(), warnings.catch_warnings():
        # about APIs that solo-learn uses; its user cannot change them
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        return repairs.import_modules()


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
    # dino.py takes distutils.util from `import distutils`; this import also puts it there
    if _imports("distutils.util"):
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
    """The means of a validation are made in hooks, which also keep the outputs of its steps.

    Lightning 2 refuses modules with ``validation_epoch_end`` and hands over no outputs. They are
    kept where 1.0.6 keeps them.
    """

    def on_validation_epoch_start(self):
        self.validation_step_outputs = []

    def on_validation_batch_end(
        self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ):
        if outputs is not None:
            # momentum methods return a pair, the second None without a momentum classifier
            own, momentum = outputs if isinstance(outputs, tuple) else (outputs, None)
            self.validation_step_outputs.append({**own, **(momentum or {})})

    def on_validation_epoch_end(self):
        outputs = self.validation_step_outputs
        log = {
            key: solo.metrics.weighted_mean(outputs, key, "batch_size")
            for key in (outputs[0] if outputs else ())
            if key != "batch_size"
        }
        asks_knn = getattr(self, "knn_eval", False) and not self.trainer.sanity_checking
        # without training features (trainer.validate) there are no neighbours
        if asks_knn and self.knn.train_features:
            log["val_knn_acc1"], log["val_knn_acc5"] = self.knn.compute()
        self.log_dict(log, sync_dist=True)

    for cls in (solo.base.BaseMethod, solo.linear.LinearModel):
        for hook in (on_validation_epoch_start, on_validation_batch_end, on_validation_epoch_end):
            setattr(cls, hook.__name__, hook)
    for cls in (solo.base.BaseMethod, solo.base.BaseMomentumMethod, solo.linear.LinearModel):
        del cls.validation_epoch_end


def expect_no_loader_index(solo: SimpleNamespace) -> None:
    """Lightning 2 calls the end of a batch without the index of its loader."""
    solo.base.BaseMomentumMethod.on_train_batch_end.__defaults__ = (0,)


def separate_dinos_clipping(solo: SimpleNamespace) -> None:
    """DINO's ``clip_gradients(clip)`` hides the one that Lightning 2 calls in every step."""
    original = solo.dino.DINO.clip_gradients

    def clip_gradients(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        if isinstance(optimizer, (int, float)):  # DINO's own call, with its threshold
            original(self, optimizer)
        else:
            pl.LightningModule.clip_gradients(
                self, optimizer, gradient_clip_val, gradient_clip_algorithm
            )

    solo.dino.DINO.clip_gradients = clip_gradients


@functools.cache
def _warn_of_lars() -> None:
    warnings.warn(
        "LARS of solo-learn 1.0.2 trains as plain SGD without weight decay: it scales gradients "
        "before Lightning computes them. emp_plugin.solo_learn.corrected(METHODS[...]) is the "
        "method as the commands of emp_plugin train it, with LARS and with learning rates by step",
        stacklevel=3,
    )


def warn_of_lars(solo: SimpleNamespace) -> None:
    """Who trains by LARS without our correction of it hears once what that is."""
    original = solo.base.BaseMethod.configure_optimizers

    def configure_optimizers(self):
        if self.lars and "lars" not in getattr(self, "corrections", ()):
            _warn_of_lars()
        return original(self)

    solo.base.BaseMethod.configure_optimizers = configure_optimizers


REPAIRS = (
    *repairs.REPAIRS,
    log_validation_by_hook,
    expect_no_loader_index,
    separate_dinos_clipping,
    warn_of_lars,
)

"""Makes solo-learn 1.0.2, written for torch 1.9 and Lightning 1.5, work on torch 2, Lightning 2 and torchmetrics 1.

Its files are not edited: :func:`apply_patches` replaces single attributes of its classes. Every patch is one function here and says why
it exists; ``tests/solo_learn/test_wheel.py`` shows for each what happens without it.
"""
import functools
import importlib
import sys
import warnings
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any, Iterator

import pytorch_lightning as pl
import torch
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from emp_plugin.solo_learn.knn import knn_accuracy
from emp_plugin.solo_learn.schedules import STEPWISE, per_step, steps_of, warmup_cosine

PL_BOLTS = ("pl_bolts", "pl_bolts.optimizers", "pl_bolts.optimizers.lr_scheduler")
LOGGED = tuple(f"{prefix}{name}" for prefix in ("", "momentum_") for name in ("val_loss", "val_acc1", "val_acc5"))


class LinearWarmupCosineAnnealingLR(LambdaLR):
    """Stands in for pl_bolts' scheduler of this name, whose package does not import on Lightning 2. Moves by whatever unit steps it."""

    def __init__(self, optimizer, warmup_epochs: int, max_epochs: int, warmup_start_lr: float = 0.0, eta_min: float = 0.0, last_epoch: int = -1):
        def factor(group: dict[str, Any]):
            peak = group.get("initial_lr", group["lr"])
            return lambda epoch: warmup_cosine(epoch, peak, warmup_epochs, max_epochs, warmup_start_lr, eta_min) / peak if peak else 1.0

        super().__init__(optimizer, [factor(group) for group in optimizer.param_groups], last_epoch)


def import_solo() -> SimpleNamespace:
    """Import the wheel and return the modules that are patched.

    solo-learn imports pl_bolts and, in dino.py, distutils (gone from Python 3.12). Where they are missing or broken, stand-ins are in
    ``sys.modules`` during this import only, so that nobody else finds a fake package.
    """
    with _stand_ins(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of APIs that solo-learn uses; its user cannot change them
        warnings.simplefilter("ignore", FutureWarning)
        importlib.import_module("solo")
        return SimpleNamespace(**{name: importlib.import_module(f"solo.{path}") for name, path in (
            ("base", "methods.base"), ("linear", "methods.linear"), ("dino", "methods.dino"), ("swav", "methods.swav"),
            ("knn", "utils.knn"), ("lars", "utils.lars"), ("metrics", "utils.metrics"))})


def apply_patches(solo: SimpleNamespace) -> None:
    """Patch the modules of :func:`import_solo`; a second call does nothing."""
    if getattr(solo.base, "_patched_by_emp_plugin", False):
        return
    for patch in (log_validation_by_hook, accept_batch_end_without_loader_index, schedule_by_step, repair_knn, run_closure_before_lars,
                  allow_few_classes, separate_dinos_clipping, resume_momentum, keep_swavs_queue, resume_dinos_epoch):
        patch(solo)
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
    if _imports("distutils.util"):  # dino.py takes distutils.util from `import distutils`; this import also puts it there
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

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0):
        if outputs is not None:
            # momentum methods return a pair, the second None without a momentum classifier
            self._validation_outputs.append(outputs if isinstance(outputs, tuple) else (outputs,))

    def on_validation_epoch_end(self):
        parts = [part for part in zip(*self._validation_outputs) if part[0] is not None]
        self._validation_outputs = []
        log = {key: solo.metrics.weighted_mean(part, key, "batch_size") for part in parts for key in LOGGED if key in part[0]}
        # without training features (trainer.validate) there are no neighbours
        if getattr(self, "knn_eval", False) and not self.trainer.sanity_checking and self.knn.train_features:
            log["val_knn_acc1"], log["val_knn_acc5"] = self.knn.compute()
            self.knn.reset()
        images = sum(output["batch_size"] for output in parts[0]) if parts else 1
        self.log_dict(_over_processes(self.trainer, log, images))

    for cls in (solo.base.BaseMethod, solo.linear.LinearModel):
        for hook in (on_validation_epoch_start, on_validation_batch_end, on_validation_epoch_end):
            setattr(cls, hook.__name__, hook)
    for cls in (solo.base.BaseMethod, solo.base.BaseMomentumMethod, solo.linear.LinearModel):
        del cls.validation_epoch_end


def _over_processes(trainer: pl.Trainer, log: dict[str, Any], images: int) -> dict[str, Any]:
    """The means over the images of all processes, each image once (Lightning's own weights are rounded when their number is odd)."""
    if trainer.world_size == 1:
        return log
    sums = torch.tensor([float(images), *(float(value) * images for value in log.values())], device=trainer.strategy.root_device)
    total, *sums = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
    return {key: value / total for key, value in zip(log, sums)}


def accept_batch_end_without_loader_index(solo: SimpleNamespace) -> None:
    """Lightning 2 calls ``on_train_batch_end`` without the ``dataloader_idx`` that the momentum update's hook demands."""
    original = solo.base.BaseMomentumMethod.on_train_batch_end

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0):
        original(self, outputs, batch, batch_idx, dataloader_idx)

    solo.base.BaseMomentumMethod.on_train_batch_end = on_train_batch_end


def schedule_by_step(solo: SimpleNamespace) -> None:
    """solo-learn's schedules move once per epoch: in a run of one epoch the rate would stay at the start of the warm-up."""

    def by_step(original):
        def configure_optimizers(self):
            name = self.scheduler
            if name not in STEPWISE:  # "none", LinearModel's others, and solo-learn's own error for unknown names
                return original(self)
            self.scheduler = "none"
            try:
                optimizer = original(self)
            finally:
                self.scheduler = name
            total, epoch = steps_of(self.trainer)
            # LinearModel has no settings for the warm-up: ten epochs from 0 down to 0, always
            scheduler = per_step(optimizer, name, total, epoch, getattr(self, "warmup_epochs", 10), getattr(self, "warmup_start_lr", 0.0),
                                 getattr(self, "min_lr", 0.0), self.lr_decay_steps)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

        return configure_optimizers

    for cls in (solo.base.BaseMethod, solo.linear.LinearModel):
        cls.configure_optimizers = by_step(cls.configure_optimizers)


def repair_knn(solo: SimpleNamespace) -> None:
    """torchmetrics 1 has no ``compute_on_step``, and would compute in every ``forward``; :mod:`knn` says what was wrong with the rest."""

    def __init__(self, k: int = 20, T: float = 0.07, max_distance_matrix_size: int = int(5e6), distance_fx: str = "cosine",
                 epsilon: float = 0.00001, dist_sync_on_step: bool = False):
        Metric.__init__(self, dist_sync_on_step=dist_sync_on_step)
        self.k, self.T, self.max_distance_matrix_size = k, T, max_distance_matrix_size
        self.distance_fx, self.epsilon = distance_fx, epsilon
        for state in ("train_features", "train_targets", "test_features", "test_targets"):
            self.add_state(state, default=[], dist_reduce_fx="cat", persistent=state.startswith("train"))  # a run may be cut off between filling and asking

    def forward(self, *args: Any, **kwargs: Any):
        self.update(*args, **kwargs)

    def compute(self) -> tuple[float, float]:
        """k-NN accuracy @1 and @5 in percent; empties the memory banks."""
        banks = [dim_zero_cat(bank) for bank in (self.train_features, self.train_targets, self.test_features, self.test_targets)]
        accuracies = knn_accuracy(*banks, self.k, self.T, self.distance_fx, self.epsilon, self.max_distance_matrix_size)
        if not self._is_synced:  # the banks of several processes together are only lent: the hook above empties each one's own
            self.reset()
        return accuracies

    for function in (__init__, forward, compute):
        setattr(solo.knn.WeightedKNNClassifier, function.__name__, function)


def run_closure_before_lars(solo: SimpleNamespace) -> None:
    """Lightning's closure computes the gradients inside ``optimizer.step``.

    LARSWrapper scales the gradients first and hands the closure to the inner optimiser: it scales the previous step's gradients (none,
    after zero_grad), and the new ones are used raw and without weight decay. So: closure first, then LARS.
    """
    original = solo.lars.LARSWrapper.step

    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        original(self)
        return loss

    solo.lars.LARSWrapper.step = step


def allow_few_classes(solo: SimpleNamespace) -> None:
    """The momentum classifier and LinearModel ask for the top 5 of any number of classes; with fewer, top-5 is the top of all."""
    original = solo.metrics.accuracy_at_k

    def accuracy_at_k(outputs: torch.Tensor, targets: torch.Tensor, top_k=(1, 5)):
        return original(outputs, targets, [min(k, outputs.size(1)) for k in top_k])

    for module in (solo.metrics, solo.base, solo.linear):
        module.accuracy_at_k = accuracy_at_k


def separate_dinos_clipping(solo: SimpleNamespace) -> None:
    """DINO's ``clip_gradients(clip)`` hides Lightning's method of the same name, which Lightning 2 calls in every step."""
    original = solo.dino.DINO.clip_gradients

    def clip_gradients(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        if isinstance(optimizer, (int, float)):  # DINO's own call, with its threshold
            original(self, optimizer)
        else:
            pl.LightningModule.clip_gradients(self, optimizer, gradient_clip_val, gradient_clip_algorithm)

    solo.dino.DINO.clip_gradients = clip_gradients


def resume_momentum(solo: SimpleNamespace) -> None:
    """The momentum's tau is no part of a checkpoint: a resumed run would take its first step with the run's first tau."""
    original = solo.base.BaseMomentumMethod.on_train_start

    def on_train_start(self):
        original(self)
        self.last_step = self.trainer.global_step
        if self.last_step:  # as the last step before the checkpoint left it
            self.momentum_updater.update_tau(self.last_step * self.trainer.accumulate_grad_batches,
                                             len(self.trainer.train_dataloader) * self.trainer.max_epochs)

    solo.base.BaseMomentumMethod.on_train_start = on_train_start


def keep_swavs_queue(solo: SimpleNamespace) -> None:
    """SwAV makes its queue when training starts: too late for a checkpoint, which fails on the unexpected key, and always of zeros.

    Here it is there from the beginning. Each process has its own part of it; a checkpoint holds all of them.
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
            self.queue = kept[:, self.global_rank * size:(self.global_rank + 1) * size].clone()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]):
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

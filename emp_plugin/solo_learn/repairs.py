"""Repairs: changes that let solo-learn run on torch 2, Lightning 2 and torchmetrics 1.

Its files are not edited. Each repair is one function that replaces single attributes of its classes
and says why. Those of both versions are here, the others in :mod:`v1_0_2` and :mod:`v1_0_6`. The
tests show for each what happens without it.
"""

import functools
import importlib
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from emp_plugin.errors import UserError
from emp_plugin.evaluation.probes import nearest, vote, votes_of

MODULES = (
    "losses.vicreg",
    "methods.base",
    "methods.dino",
    "methods.linear",
    "methods.ressl",
    "methods.simclr",
    "methods.swav",
    "utils.knn",
    "utils.lars",
    "utils.metrics",
    "utils.momentum",
)
# what 1.0.2 calls a method's modules, and 1.0.6
NAMES_OF_1_0_6 = {"encoder": "backbone", "momentum_encoder": "momentum_backbone"}
WRITTEN_BY = "solo_learn_generation"  # the key in a checkpoint
FORMER_NAMES = {"wheel": "1.0.2", "head": "1.0.6"}  # what older checkpoints have there
BANKS = ("train_features", "train_targets", "test_features", "test_targets")


def import_modules() -> SimpleNamespace:
    """The modules of solo-learn that are repaired and corrected, by the last part of the name."""
    modules = {path.rpartition(".")[2]: importlib.import_module(f"solo.{path}") for path in MODULES}
    return SimpleNamespace(**modules)


def apply_repairs(solo: SimpleNamespace, repairs: Iterable[Callable], api: str) -> None:
    """Repair the modules of :func:`import_modules`; a second call does nothing."""
    if getattr(solo.base, "_repaired_by_emp_plugin", False):
        return
    for repair in repairs:
        repair(solo)
    exchange_checkpoints(solo, api)
    solo.base._repaired_by_emp_plugin = True


def repair_knn(solo: SimpleNamespace) -> None:
    """torchmetrics 1 has no ``compute_on_step``, and would compute in every ``forward``.

    Its ``compute`` counts the classes of the test set alone, which breaks when the training set has
    a label that the test set lacks, and 1.0.2 forgets to normalise features for the cosine.
    """

    def __init__(
        self,
        k: int = 20,
        T: float = 0.07,
        max_distance_matrix_size: int = int(5e6),
        distance_fx: str = "cosine",
        epsilon: float = 0.00001,
        dist_sync_on_step: bool = False,
    ):
        Metric.__init__(self, dist_sync_on_step=dist_sync_on_step)
        self.k, self.T, self.max_distance_matrix_size = k, T, max_distance_matrix_size
        self.distance_fx, self.epsilon = distance_fx, epsilon
        for bank in BANKS:
            # checkpoints keep those of training: a run may be cut off between filling and asking
            kept = bank.startswith("train")
            self.add_state(bank, default=[], dist_reduce_fx="cat", persistent=kept)

    def forward(self, *args: Any, **kwargs: Any):
        self.update(*args, **kwargs)

    def compute(self) -> tuple[float, float]:
        """k-NN accuracy @1 and @5 in percent, -1 (as in 1.0.6) without features.

        Empties the memory banks.
        """
        if not len(self.train_features) or not len(self.test_features):
            return -1.0, -1.0
        x, y, u, v = (dim_zero_cat(getattr(self, bank)) for bank in BANKS)
        limit = self.max_distance_matrix_size
        weights, neighbours = nearest(x, u, self.k, self.distance_fx, self.epsilon, limit)
        if self.distance_fx == "cosine":
            weights = votes_of(weights, self.T)
        accuracies = tuple(vote(weights, neighbours, y, v))
        if not self._is_synced:
            # Banks of several processes together are only lent; on_validation_epoch_end empties
            # each one's own.
            self.reset()
        return accuracies

    for function in (__init__, forward, compute):
        setattr(solo.knn.WeightedKNNClassifier, function.__name__, function)


def allow_few_classes(solo: SimpleNamespace) -> None:
    """With fewer than 5 classes, top-5 is the top of all.

    The momentum classifier and LinearModel ask for the top 5 of any number, which fails. Here all
    accuracies come from one running sum, in half as many calls; the bits are the same.
    """

    @torch.no_grad()
    def accuracy_at_k(outputs: Tensor, targets: Tensor, top_k=(1, 5)) -> list[Tensor]:
        top_k = [min(k, outputs.size(1)) for k in top_k]
        hits = outputs.topk(max(top_k), 1).indices == targets[:, None]
        shares = hits.sum(0).cumsum(0).float().mul_(100.0 / len(targets))
        return [shares[k - 1 : k] for k in top_k]

    for module in (solo.metrics, solo.base, solo.linear):
        module.accuracy_at_k = accuracy_at_k


def allow_no_labels(solo: SimpleNamespace) -> None:
    """A batch whose targets are all -1 has a classifier's loss of 0, and no accuracy.

    Its cross-entropy is a mean over nothing: NaN, which would be the whole loss of the step. Its
    accuracy would be 0.
    """

    def of_labels(original):
        def shared_step(self, X: Tensor, targets: Tensor) -> dict[str, Any]:
            out = original(self, X, targets)
            if "loss" in out:  # a momentum network without a classifier has none of them
                none = (targets < 0).all()
                for name, value in {"loss": 0.0, "acc1": torch.nan, "acc5": torch.nan}.items():
                    out[name] = out[name].masked_fill(none, value)
            return out

        return shared_step

    base, momentum = solo.base.BaseMethod, solo.base.BaseMomentumMethod
    base._base_shared_step = of_labels(base._base_shared_step)
    momentum._shared_step_momentum = of_labels(momentum._shared_step_momentum)


def keep_swavs_queue(solo: SimpleNamespace) -> None:
    """SwAV has its queue from the beginning, and a checkpoint holds the parts of all processes.

    solo-learn makes it when training starts, always of zeros. That is too late for a checkpoint,
    which fails on the unexpected key.

    As everywhere in solo-learn, it is a buffer. DDP hands the first process's buffers to all before
    every step, so that on several GPUs all of them use the first one's part.
    """
    make, start = solo.swav.SwAV.__init__, solo.swav.SwAV.on_train_start

    @functools.wraps(make)  # build.py reads its parameters
    def __init__(self, *args: Any, **kwargs: Any):
        make(self, *args, **kwargs)
        if self.queue_size > 0:
            self.register_buffer("queue", torch.zeros(2, self.queue_size, self.proj_output_dim))

    def on_train_start(self):
        kept = getattr(self, "queue", None)
        start(self)
        if kept is not None:
            size = self.queue.shape[1]
            self.queue = kept[:, self.global_rank * size : (self.global_rank + 1) * size].clone()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]):
        super(solo.swav.SwAV, self).on_save_checkpoint(checkpoint)
        if self.queue_size > 0 and self.trainer.world_size > 1:
            checkpoint["state_dict"]["queue"] = torch.cat(list(self.all_gather(self.queue)), dim=1)

    for function in (__init__, on_train_start, on_save_checkpoint):
        setattr(solo.swav.SwAV, function.__name__, function)


def resume_dinos_epoch(solo: SimpleNamespace) -> None:
    """A run of DINO that is resumed in the middle of an epoch tells its loss which one it is.

    solo-learn does so at the start of an epoch alone.
    """

    def on_train_start(self):
        super(solo.dino.DINO, self).on_train_start()
        self.dino_loss_func.epoch = self.current_epoch

    solo.dino.DINO.on_train_start = on_train_start


REPAIRS = (
    repair_knn,
    allow_few_classes,
    allow_no_labels,
    keep_swavs_queue,
    resume_dinos_epoch,
)


def over_processes(trainer: Any, log: dict[str, Any], images: int) -> dict[str, Any]:
    """Means over the images of all processes, from those of this one over its ``images``.

    Each image counts once. (Lightning rounds its own weights when their number is odd.)
    """
    if trainer.world_size == 1:
        return log
    sums = torch.tensor(
        [float(images), *(float(value) * images for value in log.values())],
        device=trainer.strategy.root_device,
    )
    total, *sums = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
    return {key: value / total for key, value in zip(log, sums)}


def exchange_checkpoints(solo: SimpleNamespace, api: str) -> None:
    """Checkpoints call the backbone what 1.0.6 calls it, whoever writes them; either name is read.

    The ``main_linear.py`` of 1.0.6 takes the weights called ``backbone``. If there are none it
    starts from random ones without a word. Only weights are exchanged. The optimisers' states
    differ, so a run is continued under the version that began it.
    """
    here = NAMES_OF_1_0_6 if api == "1.0.6" else {new: old for old, new in NAMES_OF_1_0_6.items()}
    original = solo.base.BaseMethod.load_state_dict

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = _rename(checkpoint["state_dict"], NAMES_OF_1_0_6)
        checkpoint[WRITTEN_BY] = api

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        try:
            continued = self.trainer.state.fn == "fit"
        except RuntimeError:  # load_from_checkpoint: there is no trainer
            continued = False
        writer = checkpoint.get(WRITTEN_BY, api)
        writer = FORMER_NAMES.get(writer, writer)
        if continued and writer != api:
            raise UserError(
                f"this checkpoint was written under solo-learn {writer}, and this is {api}: "
                "it can be evaluated here, but its training only continues there. "
                "Start another run with auto_resume.enabled=False"
            )

    def load_state_dict(self, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any):
        return original(self, _rename(state_dict, here), *args, **kwargs)

    for function in (on_save_checkpoint, on_load_checkpoint, load_state_dict):
        setattr(solo.base.BaseMethod, function.__name__, function)


def _rename(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """The state with other names for some of the method's modules."""
    parts = ((key.partition("."), value) for key, value in state.items())
    return {names.get(module, module) + dot + rest: value for (module, dot, rest), value in parts}

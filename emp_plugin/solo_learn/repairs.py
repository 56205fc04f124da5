"""Repairs: changes that let solo-learn run on torch 2, Lightning 2 and torchmetrics 1.

Where it ran before, no number depends on them. Its files are not edited. Each repair is one
function that replaces single attributes of its classes and says why. Those of both versions are
here, those of 1.0.2 in :mod:`v1_0_2`. The tests show for each what happens without it.
"""

import importlib
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

MODULES = (
    "methods.base",
    "methods.dino",
    "methods.linear",
    "utils.knn",
    "utils.metrics",
)


def import_modules() -> SimpleNamespace:
    """The modules of solo-learn that are repaired, by the last part of the name."""
    modules = {path.rpartition(".")[2]: importlib.import_module(f"solo.{path}") for path in MODULES}
    return SimpleNamespace(**modules)


class UpdatedMetric(Metric):
    """A metric with ``compute_on_step=False``, which torchmetrics 1 does not know any more.

    Its ``forward`` would compute every time.
    """

    def __init__(self, compute_on_step: bool, **kwargs: Any):
        super().__init__(**kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> None:
        self.update(*args, **kwargs)


def make_knn_possible(solo: SimpleNamespace) -> None:
    """solo-learn's k-NN classifier asks for ``compute_on_step=False``."""
    solo.knn.WeightedKNNClassifier.__bases__ = (UpdatedMetric,)


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


REPAIRS = (make_knn_possible, allow_few_classes)

"""Probes of frozen features: a linear classifier trained in memory, and weighted k-nearest neighbours."""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emp_plugin.solo_learn import WeightedKNNClassifier

PROBE_SEED = 0


class Accuracy(NamedTuple):
    """Top-1 and top-5 accuracy in percent; top-5 counts all classes where there are fewer than 5."""

    top1: float
    top5: float


def linear_probe(train: Tensor, train_targets: Tensor, test: Tensor, test_targets: Tensor, num_classes: int, epochs: int = 100,
                 lr: float = 0.03, weight_decay: float = 5e-5, batch_size: int = 100, device: torch.device | str = "cpu") -> Accuracy:
    """Train a linear classifier on frozen features by SGD and return its accuracy on the test features.

    Momentum 0.9, cosine to 0 by epoch, random order, incomplete last batches of training dropped (unless there is nothing else),
    as in the EMP-SSL authors' evaluation program (of arXiv 2304.03977). The last epoch is reported, not the best.

    Args:
        train, test: features (N, f) and (M, f).
        train_targets, test_targets: labels (N,) and (M,).
        num_classes: of the labels.
        epochs, lr, weight_decay, batch_size: of the SGD.
        device: where the features are kept during training.
    """
    draws = torch.Generator().manual_seed(PROBE_SEED)
    x, y = train.to(device), train_targets.to(device)
    bound = x.shape[1] ** -0.5  # torch's own initialisation of a linear layer, drawn from our generator
    layer = nn.Linear(x.shape[1], num_classes, device=device)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_((2 * torch.rand(parameter.shape, generator=draws) - 1) * bound)
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    batch_size = min(batch_size, len(x))
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=draws).to(device)
        for batch in order[:len(x) // batch_size * batch_size].split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(layer(x[batch]), y[batch]).backward()
            optimizer.step()
        schedule.step()
    with torch.inference_mode():
        logits = torch.cat([layer(part.to(device)) for part in test.split(10_000)])
    return top_k(logits, test_targets.to(device))


def top_k(scores: Tensor, targets: Tensor) -> Accuracy:
    """Accuracy of scores (M, c) against labels (M,), every sample counted once."""
    hits = scores.topk(min(5, scores.shape[1]), dim=1).indices == targets[:, None]
    return Accuracy(100 * hits[:, 0].double().mean().item(), 100 * hits.any(1).double().mean().item())


def knn_probe(train: Tensor, train_targets: Tensor, test: Tensor, test_targets: Tensor, k: int = 20, temperature: float = 0.07,
              device: torch.device | str = "cpu") -> Accuracy:
    """Weighted k-nearest neighbours by cosine similarity, with solo-learn's classifier.

    Args:
        train, test: features (N, f) and (M, f).
        train_targets, test_targets: labels (N,) and (M,).
        k: neighbours.
        temperature: T of the weights ``exp(similarity / T)``.
        device: where the similarities are computed.
    """
    classifier = WeightedKNNClassifier(k=k, T=temperature, distance_fx="cosine").to(device)
    classifier.update(train_features=train.to(device), train_targets=train_targets.to(device),
                      test_features=test.to(device), test_targets=test_targets.to(device))
    return Accuracy(*(float(value) for value in classifier.compute()))

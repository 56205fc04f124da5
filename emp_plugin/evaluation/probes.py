"""Probes of frozen features: a linear classifier trained in memory, and weighted k-nearest neighbours."""
import math
from typing import NamedTuple

import torch
from torch import Tensor

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
    weight, bias = train_linear(train.to(device), train_targets.to(device), num_classes, epochs, lr, weight_decay, batch_size)
    logits = torch.cat([torch.addmm(bias, part.to(device), weight.T) for part in test.split(10_000)])
    return top_k(logits, test_targets.to(device))


def train_linear(x: Tensor, y: Tensor, num_classes: int, epochs: int, lr: float, weight_decay: float, batch_size: int) -> tuple[Tensor, Tensor]:
    """Weight (c, f) and bias (c,) of the probe trained on features x (N, f) and labels y (N,), on their device."""
    draws = torch.Generator().manual_seed(PROBE_SEED)
    y, device = y[:, None], x.device
    bound = x.shape[1] ** -0.5  # torch's own initialisation of a linear layer, drawn from our generator
    weight, bias = ((2 * torch.rand(shape, generator=draws) - 1).mul_(bound).to(device) for shape in ((num_classes, x.shape[1]), (num_classes,)))
    weight_velocity, bias_velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    batch_size = min(batch_size, len(x))
    minus_one, inputs = torch.full((batch_size, 1), -1.0, device=device), torch.empty(batch_size, x.shape[1], device=device)
    # 50,000 steps this small are all overhead: the gradient in closed form takes half the time of autograd and torch.optim.SGD
    for epoch in range(epochs):
        rate = lr * (1 + math.cos(math.pi * epoch / epochs)) / 2
        order = torch.randperm(len(x), generator=draws).to(device)
        for batch in order[:len(x) // batch_size * batch_size].split(batch_size):
            torch.index_select(x, 0, batch, out=inputs)
            # the cross entropy's gradient with respect to the logits: probability, less 1 for the true class
            slope = torch.addmm(bias, inputs, weight.T).softmax(1).scatter_add_(1, y.index_select(0, batch), minus_one)
            weight_velocity.mul_(0.9).add_(weight, alpha=weight_decay).addmm_(slope.T, inputs, alpha=1 / batch_size)
            bias_velocity.mul_(0.9).add_(bias, alpha=weight_decay).add_(slope.mean(0))
            weight.sub_(weight_velocity, alpha=rate)
            bias.sub_(bias_velocity, alpha=rate)
    return weight, bias


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

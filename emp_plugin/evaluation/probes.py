"""Probes of frozen features: a linear classifier or one with a hidden layer, trained in memory, and weighted k-nearest neighbours."""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from emp_plugin.solo_learn import WeightedKNNClassifier

PROBE_SEED = 0


class Accuracy(NamedTuple):
    """Top-1 and top-5 accuracy in percent; top-5 counts all classes where there are fewer than 5."""

    top1: float
    top5: float


def labelled_part(targets: Tensor, fraction: float) -> Tensor | slice:
    """Indices, in order, of this fraction of the labels (N,): of every class the same, at least one. The same ones every time, and a smaller
    fraction's are among a larger one's."""
    if fraction == 1:
        return slice(None)
    draws = torch.Generator().manual_seed(PROBE_SEED)
    order = torch.randperm(len(targets), generator=draws)
    of_classes = [order[targets[order] == label] for label in targets.unique()]
    return (
        torch.cat([members[: max(1, round(fraction * len(members)))] for members in of_classes])
        .sort()
        .values
    )


def linear_probe(
    train: Tensor,
    train_targets: Tensor,
    test: Tensor,
    test_targets: Tensor,
    num_classes: int,
    epochs: int = 100,
    lr: float = 0.03,
    weight_decay: float = 5e-5,
    batch_size: int = 100,
    device: torch.device | str = "cpu",
    hidden: int = 0,
) -> Accuracy:
    """Train a linear classifier on frozen features by SGD and return its accuracy on the test features; with ``hidden``, a non-linear one.

    Momentum 0.9, cosine to 0 by epoch, random order, incomplete last batches of training dropped (unless there is nothing else),
    as in the EMP-SSL authors' evaluation program (of arXiv 2304.03977). The last epoch is reported, not the best.

    Args:
        train, test: features (N, f) and (M, f).
        train_targets, test_targets: labels (N,) and (M,).
        num_classes: of the labels.
        epochs, lr, weight_decay, batch_size: of the SGD.
        device: where the features are kept during training.
        hidden: width of a hidden layer of ReLUs between features and classes; 0: none.
    """
    layers = train_classifier(
        train.to(device),
        train_targets.to(device),
        num_classes,
        epochs,
        lr,
        weight_decay,
        batch_size,
        hidden,
    )
    logits = torch.cat([_forward(layers, part.to(device))[-1] for part in test.split(10_000)])
    return top_k(logits, test_targets.to(device))


def train_classifier(
    x: Tensor,
    y: Tensor,
    num_classes: int,
    epochs: int,
    lr: float,
    weight_decay: float,
    batch_size: int,
    hidden: int = 0,
) -> list[tuple[Tensor, Tensor]]:
    """Weight (out, in) and bias (out,) of each layer of the probe trained on features x (N, f) and labels y (N,), on their device."""
    draws = torch.Generator().manual_seed(PROBE_SEED)
    y, layers = y[:, None], []
    for inputs, outputs in pairwise(
        (x.shape[1], hidden, num_classes) if hidden else (x.shape[1], num_classes)
    ):
        bound = (
            inputs**-0.5
        )  # torch's own initialisation of a linear layer, drawn from our generator
        layers.append(
            tuple(
                (2 * torch.rand(shape, generator=draws) - 1).mul_(bound).to(x)
                for shape in ((outputs, inputs), (outputs,))
            )
        )
    velocities = [tuple(map(torch.zeros_like, layer)) for layer in layers]
    batch_size = min(batch_size, len(x))
    minus_one, batch_x = x.new_full((batch_size, 1), -1.0), x.new_empty(batch_size, x.shape[1])
    # 50,000 steps this small are all overhead: the gradient in closed form takes half the time of autograd and torch.optim.SGD
    for epoch in range(epochs):
        rate = lr * (1 + math.cos(math.pi * epoch / epochs)) / 2
        order = torch.randperm(len(x), generator=draws).to(x.device)
        for batch in order[: len(x) // batch_size * batch_size].split(batch_size):
            *inputs, logits = _forward(layers, torch.index_select(x, 0, batch, out=batch_x))
            # the cross entropy's gradient with respect to the logits: probability, less 1 for the true class
            slope = logits.softmax(1).scatter_add_(1, y.index_select(0, batch), minus_one)
            for number in reversed(range(len(layers))):
                (weight, bias), (weight_velocity, bias_velocity) = (
                    layers[number],
                    velocities[number],
                )
                below = (
                    (slope @ weight).mul_(inputs[number] > 0) if number else None
                )  # the gradient with respect to what enters the ReLUs
                weight_velocity.mul_(0.9).add_(weight, alpha=weight_decay).addmm_(
                    slope.T, inputs[number], alpha=1 / batch_size
                )
                bias_velocity.mul_(0.9).add_(bias, alpha=weight_decay).add_(slope.mean(0))
                weight.sub_(weight_velocity, alpha=rate)
                bias.sub_(bias_velocity, alpha=rate)
                slope = below
    return layers


def _forward(layers: list[tuple[Tensor, Tensor]], x: Tensor) -> list[Tensor]:
    """What enters each layer, x (b, f) first, and the logits (b, c) that leave the last one; between the layers are ReLUs."""
    values = [x]
    for weight, bias in layers:
        values.append(torch.addmm(bias, values[-1], weight.T))
        if len(values) <= len(layers):
            values[-1].relu_()
    return values


def top_k(scores: Tensor, targets: Tensor) -> Accuracy:
    """Accuracy of scores (M, c) against labels (M,), every sample counted once."""
    hits = scores.topk(min(5, scores.shape[1]), dim=1).indices == targets[:, None]
    return Accuracy(
        100 * hits[:, 0].double().mean().item(), 100 * hits.any(1).double().mean().item()
    )


def knn_probe(
    train: Tensor,
    train_targets: Tensor,
    test: Tensor,
    test_targets: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    device: torch.device | str = "cpu",
) -> Accuracy:
    """Weighted k-nearest neighbours by cosine similarity, with solo-learn's classifier.

    Args:
        train, test: features (N, f) and (M, f).
        train_targets, test_targets: labels (N,) and (M,).
        k: neighbours.
        temperature: T of the weights ``exp(similarity / T)``.
        device: where the similarities are computed.
    """
    classifier = WeightedKNNClassifier(k=k, T=temperature, distance_fx="cosine").to(device)
    classifier.update(
        train_features=train.to(device),
        train_targets=train_targets.to(device),
        test_features=test.to(device),
        test_targets=test_targets.to(device),
    )
    return Accuracy(*(float(value) for value in classifier.compute()))

"""Probes of frozen features: classifiers trained on them by SGD, and k nearest neighbours."""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PROBE_SEED = 0
DISTANCES_AT_ONCE = 25_000_000  # similarities that are in memory at a time
SQUARED_LENGTH = 16  # of standardised features, on average: the published rate fits any width
CONSTANT = 1e-5  # of the largest deviation; a feature that varies less counts as constant


class Accuracy(NamedTuple):
    """Top-1 and top-5 accuracy in percent; top-5 is of all classes where there are fewer than 5."""

    top1: float
    top5: float


def labelled_part(targets: Tensor, fraction: float) -> Tensor | slice:
    """Indices, in order, of this fraction of the labels (N,).

    Of every class the same fraction, and at least one image. They are the same ones every time, and
    a smaller fraction's are among a larger one's.
    """
    if fraction == 1:
        return slice(None)
    draws = torch.Generator().manual_seed(PROBE_SEED)
    order = torch.randperm(len(targets), generator=draws)
    of_classes = [order[targets[order] == label] for label in targets.unique()]
    counts = [max(1, round(fraction * len(members))) for members in of_classes]
    return torch.cat([members[:n] for members, n in zip(of_classes, counts)]).sort().values


def standardised(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets of features, (N, f) and (M, f), standardised by the training set.

    Every feature has mean 0 and the same deviation, 4 / sqrt(f), so that an image's features have a
    squared length of 16 on average: an SGD's learning rate then means the same for any f. Features
    whose deviation is below 1e-5 of the largest become 0. Statistics are of float64.
    """
    # in parts, as 50,000 x 4096 features are 1.6 GB in float64
    columns = (torch.std_mean(x.double(), dim=0, correction=0) for x in train.split(256, dim=1))
    deviation, mean = map(torch.cat, zip(*columns))
    varies = deviation > CONSTANT * deviation.max()
    scale = torch.where(varies, (SQUARED_LENGTH / train.shape[1]) ** 0.5 / deviation, 0.0)
    train, test = (
        torch.cat([torch.sub(x.double(), mean).mul_(scale).float() for x in part.split(1000)])
        for part in (train, test)
    )
    return train, test


@torch.inference_mode()
def linear_probe(
    train: Tensor,
    train_targets: Tensor,
    test: Tensor,
    test_targets: Tensor,
    num_classes: int,
    *,
    raw: bool = False,
    hidden: int = 0,
    epochs: int = 100,
    lr: float = 0.03,
    weight_decay: float = 5e-5,
    batch_size: int = 100,
    device: torch.device | str = "cpu",
) -> Accuracy:
    """Accuracy on the test features of a linear classifier trained on frozen features by SGD.

    Momentum 0.9, cosine to 0 by epoch, random order, incomplete last batches dropped (unless there
    is nothing else), as in the EMP-SSL authors' evaluation program (of arXiv 2304.03977). The last
    epoch is reported, not the best. Unlike there, features are standardised by the training set, so
    that neither their scale nor a shift matters.

    Args:
        train, test: features (N, f) and (M, f).
        train_targets, test_targets: labels (N,) and (M,).
        num_classes: of the labels.
        raw: leave the features as they are, as the authors' program does.
        hidden: width of a hidden layer of ReLUs between features and classes; 0: none.
        epochs, lr, weight_decay, batch_size: of the SGD.
        device: where the features are kept during training.
    """
    if not raw:
        train, test = standardised(train, test)
    sgd = epochs, lr, weight_decay, batch_size
    layers = train_classifier(train.to(device), train_targets.to(device), num_classes, hidden, *sgd)
    logits = torch.cat([_activations(layers, part.to(device))[-1] for part in test.split(10_000)])
    return top_k(logits, test_targets.to(device))


@torch.inference_mode()
def train_classifier(
    x: Tensor,
    y: Tensor,
    num_classes: int,
    hidden: int,
    epochs: int,
    lr: float,
    weight_decay: float,
    batch_size: int,
) -> list[list[Tensor]]:
    """The classifier of :func:`linear_probe`, trained on features x (N, f) and labels y (N,).

    Gradients are in closed form: 50,000 steps this small are mostly calls, and autograd and
    ``torch.optim`` make more of them (benchmarks/README.md).

    Returns:
        Of every layer its weight (out, in) and bias (out,).
    """
    draws = torch.Generator().manual_seed(PROBE_SEED)
    layers = []
    widths = (x.shape[1], hidden, num_classes) if hidden else (x.shape[1], num_classes)
    for before, after in pairwise(widths):
        # torch's own initialisation of a linear layer, from our generator
        starts = (2 * torch.rand(*of, generator=draws) - 1 for of in ((after, before), (after,)))
        layers.append([(start * before**-0.5).to(x) for start in starts])
    weights = [part for layer in layers for part in layer]
    velocities = [torch.zeros_like(part) for part in weights]
    batch_size = min(batch_size, len(x))
    mean = x.new_full((batch_size,), 1 / batch_size)
    of_class = F.one_hot(y, num_classes).to(x)
    for epoch in range(epochs):
        rate = lr * (1 + math.cos(math.pi * epoch / epochs)) / 2
        order = torch.randperm(len(x), generator=draws).to(x.device)
        for batch in order[: len(x) // batch_size * batch_size].split(batch_size):
            *inputs, logits = _activations(layers, x.index_select(0, batch))
            # the cross entropy's gradient with respect to the logits
            slope = logits.softmax(1).sub_(of_class.index_select(0, batch))
            for i in reversed(range(len(layers))):
                of_weight, of_bias = velocities[2 * i : 2 * i + 2]
                of_weight.addmm_(slope.T, inputs[i], beta=0.9, alpha=1 / batch_size)
                of_bias.addmv_(slope.T, mean, beta=0.9)
                if i:
                    slope = (slope @ layers[i][0]).mul_(inputs[i] > 0)
            torch._foreach_add_(velocities, weights, alpha=weight_decay)
            torch._foreach_add_(weights, velocities, alpha=-rate)
    return layers


def _activations(layers: list[list[Tensor]], x: Tensor) -> list[Tensor]:
    """What enters each layer, x (b, f) first, and the logits (b, c); between layers are ReLUs."""
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


# k nearest neighbours


def knn_probe(
    train: Tensor,
    train_targets: Tensor,
    test: Tensor,
    test_targets: Tensor,
    *,
    k: int = 20,
    temperature: float | None = 0.07,
    device: torch.device | str = "cpu",
) -> Accuracy:
    """Accuracy on the test features of k nearest neighbours by cosine similarity.

    Args:
        train, test: features (N, f) and (M, f).
        train_targets, test_targets: labels (N,) and (M,).
        k: neighbours.
        temperature: T of the weights exp(similarity / T) (Wu et al., arXiv 1805.01978; as in
            solo-learn). None: every neighbour has one vote, and of classes with equal votes the
            smallest wins, as in scikit-learn.
        device: where the similarities are computed.
    """
    similarity, neighbours = nearest(train.to(device), test.to(device), k)
    weights = votes_of(similarity, temperature)
    return vote(weights, neighbours, train_targets.to(device), test_targets.to(device))


def votes_of(similarity: Tensor, temperature: float | None) -> Tensor:
    """Weights of neighbours by their cosine similarity: exp(similarity / T), or 1 without a T."""
    return torch.ones_like(similarity) if temperature is None else (similarity / temperature).exp()


@torch.no_grad()
def nearest(
    train: Tensor,
    test: Tensor,
    k: int,
    distance: str = "cosine",
    epsilon: float = 0.0,
    at_once: int = DISTANCES_AT_ONCE,
) -> tuple[Tensor, Tensor]:
    """Similarities (M, k) and indices (M, k) of the k nearest of train (N, f) to test (M, f).

    Args:
        train, test: features.
        k: neighbours, at most N. The nearest comes first.
        distance: "cosine", the similarity itself; or "euclidean", 1 / (distance + epsilon).
        epsilon: of "euclidean".
        at_once: similarities that are in memory at a time.

    Raises:
        ValueError: for an unknown distance.
    """
    if distance not in ("cosine", "euclidean"):
        raise ValueError(f"distance must be 'cosine' or 'euclidean', got '{distance}'")
    train, test, k = train.float(), test.float(), min(k, len(train))
    if distance == "cosine":
        train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    found = []
    for x in test.split(max(1, at_once // len(train))):
        if distance == "cosine":
            found.append((x @ train.T).topk(k, dim=1))
        else:
            found.append((1 / (torch.cdist(x, train) + epsilon)).topk(k, dim=1))
    similarities, indices = zip(*found)
    return torch.cat(similarities), torch.cat(indices)


def vote(
    weights: Tensor, neighbours: Tensor, train_targets: Tensor, test_targets: Tensor
) -> Accuracy:
    """Accuracy of a weighted vote of neighbours. Of classes with equal votes the smallest wins.

    Args:
        weights, neighbours: (M, k), the neighbours as indices into ``train_targets``.
        train_targets, test_targets: labels (N,) and (M,).
    """
    # the test set may lack a class of the training set, and the other way round
    num_classes = int(max(train_targets.max(), test_targets.max())) + 1
    votes = weights.new_zeros(len(weights), num_classes)
    votes.scatter_add_(1, train_targets[neighbours], weights)
    # no more guesses than neighbours: what follows them has no votes at all
    most = min(5, weights.shape[1])
    guesses = votes.sort(dim=1, descending=True, stable=True).indices[:, :most]
    hits = guesses == test_targets[:, None]
    return Accuracy(
        100 * hits[:, 0].double().mean().item(), 100 * hits.any(1).double().mean().item()
    )

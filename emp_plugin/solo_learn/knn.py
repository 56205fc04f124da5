"""Weighted k-NN classification (Wu et al., arXiv 1805.01978), as solo-learn's WeightedKNNClassifier votes."""

import torch
import torch.nn.functional as F
from torch import Tensor


def knn_votes(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    num_classes: int,
    k: int,
    temperature: float,
    distance: str,
    epsilon: float,
) -> Tensor:
    """Votes (m, c) of the k nearest of train_x (n, f), labelled train_y (n), for test_x (m, f).

    A neighbour's weight is exp(cosine / temperature), for which the features have to be of length 1, or 1 / (distance + epsilon) for "euclidean".

    Raises:
        ValueError: unknown distance.
    """
    if distance == "cosine":
        similarity = test_x @ train_x.T
    elif distance == "euclidean":
        similarity = 1 / (torch.cdist(test_x, train_x) + epsilon)
    else:
        raise ValueError(f"distance_fx must be 'cosine' or 'euclidean', got '{distance}'")
    similarity, index = similarity.topk(min(k, len(train_x)), dim=1)
    weights = (similarity / temperature).exp() if distance == "cosine" else similarity
    return torch.zeros(
        len(test_x), num_classes, dtype=weights.dtype, device=weights.device
    ).scatter_add_(1, train_y[index], weights)


@torch.no_grad()
def knn_accuracy(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    k: int,
    temperature: float,
    distance: str,
    epsilon: float,
    max_matrix: int,
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy in percent; at most ``max_matrix`` distances are held at a time. Raises as :func:`knn_votes`."""
    # solo-learn counts the classes of the test set alone, which breaks when the training set has a label that it lacks
    num_classes = int(max(train_y.max(), test_y.max())) + 1
    train_x, test_x = train_x.float(), test_x.float()
    if distance == "cosine":  # the wheel forgets this, and the exponential overflows
        train_x, test_x = F.normalize(train_x, dim=1), F.normalize(test_x, dim=1)
    hits = torch.zeros(2, dtype=torch.long, device=train_x.device)
    for x, y in zip(*(t.split(max(1, max_matrix // len(train_x))) for t in (test_x, test_y))):
        votes = knn_votes(train_x, train_y, x, num_classes, k, temperature, distance, epsilon)
        # no more guesses than neighbours: what follows them has no votes at all
        top = votes.topk(min(5, k, len(train_x), num_classes), dim=1).indices.eq(y[:, None])
        hits += torch.stack([top[:, 0].sum(), top.sum()])
    top1, top5 = (100.0 * count / len(test_y) for count in hits.tolist())
    return top1, top5

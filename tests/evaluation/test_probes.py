from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from emp_plugin.evaluation import knn_probe, labelled_part, linear_probe
from emp_plugin.evaluation.probes import PROBE_SEED, top_k, train_classifier


def clouds(n, classes=6, d=12, noise=1.6, seed=0):
    """Gaussian clouds, one a class: (features, labels)."""
    draws = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(9))
    y = torch.randint(classes, (n,), generator=draws)
    return centres[y] + noise * torch.randn(n, d, generator=draws), y


def test_linear_probe_against_scikit_learn():
    (x, y), (u, v) = clouds(3000), clouds(1999, seed=1)
    reference = 100 * LogisticRegression(max_iter=2000).fit(x, y).score(u, v)
    ours = linear_probe(x, y, u, v, 6)
    assert ours.top1 == pytest.approx(reference, abs=1.5)
    assert ours.top1 < 90
    assert ours.top5 > ours.top1
    assert linear_probe(x, y, u, v, 6) == ours  # and it can be repeated


@pytest.mark.parametrize("widths", [(12, 6), (12, 20, 6)])
def test_probes_take_the_steps_of_torch(widths):
    x, y = clouds(333)
    x = x.double()  # in float32 a sum's order is seen, and ReLUs multiply it
    epochs, lr, decay = 3, 0.3, 1e-2
    draws = torch.Generator().manual_seed(PROBE_SEED)
    layers = [torch.nn.Linear(*pair) for pair in pairwise(widths)]
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters():
                parameter.copy_(
                    (2 * torch.rand(parameter.shape, generator=draws) - 1) * layer.in_features**-0.5
                )
    network = torch.nn.Sequential(*(part for layer in layers for part in (torch.nn.ReLU(), layer)))[
        1:
    ].double()
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(333, generator=draws)[:330].split(10):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(x[batch]), y[batch]).backward()
            optimizer.step()
        schedule.step()
    ours = train_classifier(x, y, 6, epochs, lr, decay, batch_size=10, hidden=sum(widths[1:-1]))
    assert len(ours) == len(layers)
    for (weight, bias), layer in zip(ours, layers):
        torch.testing.assert_close(weight, layer.weight.detach(), atol=1e-9, rtol=1e-6)
        torch.testing.assert_close(bias, layer.bias.detach(), atol=1e-9, rtol=1e-6)


def test_a_hidden_layer_solves_what_is_not_linear():
    draws = torch.Generator().manual_seed(3)
    x = torch.randn(2000, 2, generator=draws)
    x += (
        x.sign()
    )  # four clouds apart from each other: opposite ones are of one class (exclusive or)
    y = (x[:, 0] * x[:, 1] > 0).long()
    train, test = (x[:1500], y[:1500]), (x[1500:], y[1500:])
    assert linear_probe(*train, *test, 2, epochs=20).top1 < 65
    solved = linear_probe(*train, *test, 2, epochs=20, hidden=32)
    assert solved.top1 > 98
    assert linear_probe(*train, *test, 2, epochs=20, hidden=32) == solved


def test_linear_probe_learns_from_few_and_scores_all():
    x, y = clouds(37, noise=0.1)
    assert linear_probe(x, y, x, y, 6, batch_size=100).top1 == 100  # fewer samples than the batch
    assert linear_probe(x, y, x[:1], y[:1], 6).top1 in (0, 100)


def test_top_k():
    scores = torch.tensor([[3.0, 2, 1, 0, -1, -2], [0, 1, 2, 3, 4, 5], [9, 0, 1, 2, 3, 4]])
    assert top_k(scores, torch.tensor([0, 0, 1])) == (
        pytest.approx(100 / 3),
        pytest.approx(100 / 3),
    )
    assert top_k(scores[:, :3], torch.tensor([0, 0, 1])).top5 == 100


def test_knn_against_plain_numpy():
    (x, y), (u, v) = clouds(400), clouds(150, seed=1)
    a, b = (t.numpy().astype(np.float64) for t in (x, u))
    a, b = (t / np.linalg.norm(t, axis=1, keepdims=True) for t in (a, b))
    votes = np.zeros((150, 6))
    similarity = b @ a.T
    for i, row in enumerate(similarity):
        for j in np.argsort(-row)[:20]:
            votes[i, y[j]] += np.exp(row[j] / 0.07)
    top1 = 100 * (votes.argmax(1) == v.numpy()).mean()
    assert knn_probe(x, y, u, v).top1 == pytest.approx(top1, abs=0.01)
    assert knn_probe(1000 * x, y, 1000 * u, v).top1 == pytest.approx(
        top1, abs=0.01
    )  # cosine: the scale must not matter


def test_knn_with_classes_missing_from_the_test_set():
    x, y = clouds(300)
    assert 0 <= knn_probe(x, y, x[y == 5], y[y == 5]).top1 <= 100


def test_parts_of_the_labels_are_stratified_nested_and_fixed():
    y = torch.tensor([7] * 500 + [2] * 200 + [4] * 3)[torch.randperm(703)]
    few, some = labelled_part(y, 0.01), labelled_part(y, 0.1)
    assert [(y[part] == label).sum().item() for part in (few, some) for label in (7, 2, 4)] == [
        5,
        2,
        1,
        50,
        20,
        1,
    ]  # none without an image
    assert set(few.tolist()) < set(some.tolist())
    assert torch.equal(some, some.sort().values)
    torch.rand(5)
    assert torch.equal(some, labelled_part(y, 0.1))
    assert torch.equal(y[labelled_part(y, 1.0)], y)

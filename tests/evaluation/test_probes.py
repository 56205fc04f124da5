import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from emp_plugin.evaluation import knn_probe, linear_probe
from emp_plugin.evaluation.probes import PROBE_SEED, top_k, train_linear


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
    assert ours.top1 == pytest.approx(reference, abs=1.5) and ours.top1 < 90  # neither trivial nor hopeless
    assert ours.top5 > ours.top1
    assert linear_probe(x, y, u, v, 6) == ours  # and it can be repeated


def test_linear_probe_takes_the_steps_of_torch():
    x, y = clouds(333)
    epochs, lr, decay = 3, 0.3, 1e-2
    draws = torch.Generator().manual_seed(PROBE_SEED)
    layer = torch.nn.Linear(12, 6)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_((2 * torch.rand(parameter.shape, generator=draws) - 1) / 12**0.5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=0.9, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(333, generator=draws)[:330].split(10):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(layer(x[batch]), y[batch]).backward()
            optimizer.step()
        schedule.step()
    weight, bias = train_linear(x, y, 6, epochs, lr, decay, batch_size=10)
    torch.testing.assert_close(weight, layer.weight.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(bias, layer.bias.detach(), atol=1e-5, rtol=1e-4)


def test_linear_probe_learns_from_few_and_scores_all():
    x, y = clouds(37, noise=0.1)
    assert linear_probe(x, y, x, y, 6, batch_size=100).top1 == 100  # fewer samples than the batch
    assert linear_probe(x, y, x[:1], y[:1], 6).top1 in (0, 100)


def test_top_k():
    scores = torch.tensor([[3.0, 2, 1, 0, -1, -2], [0, 1, 2, 3, 4, 5], [9, 0, 1, 2, 3, 4]])
    assert top_k(scores, torch.tensor([0, 0, 1])) == (pytest.approx(100 / 3), pytest.approx(100 / 3))
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
    assert knn_probe(1000 * x, y, 1000 * u, v).top1 == pytest.approx(top1, abs=0.01)  # cosine: the scale must not matter


def test_knn_with_classes_missing_from_the_test_set():
    x, y = clouds(300)
    assert 0 <= knn_probe(x, y, x[y == 5], y[y == 5]).top1 <= 100

"""Probes against scikit-learn, numpy in float64, and solo-learn."""

import inspect

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from emp_plugin.evaluation import Evaluation, knn_probe, labelled_part, linear_probe
from emp_plugin.evaluation.probes import PROBE_SEED, standardised, top_k, train_classifier


def clouds(n, classes=6, d=12, noise=1.6, seed=0):
    """Gaussian clouds, one a class: (features, labels)."""
    draws = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(9))
    y = torch.randint(classes, (n,), generator=draws)
    return centres[y] + noise * torch.randn(n, d, generator=draws), y


# the linear probe


@pytest.mark.parametrize("width", ["pixels", 512, 4096])
def test_the_linear_probe_is_scikit_learns(digits, width):
    """On raw pixels and on random features of them; noise makes the digits harder."""
    draws = torch.Generator().manual_seed(1)
    x = torch.cat([data.images[:, 0].flatten(1) for data in digits]) / 255
    y = torch.cat([data.targets for data in digits])
    x = x + 0.5 * torch.randn(x.shape, generator=draws)
    if width != "pixels":
        x = torch.relu(x @ torch.randn(x.shape[1], width, generator=draws) / 32)
    (x, u), (y, v) = x.split(900), y.split(900)
    s, t = standardised(x, u)
    fits = [LogisticRegression(C=c, max_iter=300).fit(s, y) for c in (0.01, 0.1, 1.0)]
    best = max(100 * fit.score(t, v) for fit in fits)
    ours = linear_probe(x, y, u, v, 10)
    assert ours.top1 == pytest.approx(best, abs=1.0)
    assert 80 < ours.top1 < ours.top5
    assert linear_probe(x, y, u, v, 10) == ours  # and it can be repeated


def test_scale_and_shift_of_features_do_not_matter():
    (x, y), (u, v) = clouds(1500), clouds(999, seed=1)
    expected = linear_probe(x, y, u, v, 6, epochs=20).top1
    for scale, shift in ((1e-3, 0.0), (1e3, 0.0), (1.0, 100.0), (0.1, -7.0)):
        changed = linear_probe(scale * x + shift, y, scale * u + shift, v, 6, epochs=20).top1
        assert changed == pytest.approx(expected, abs=0.2)
    raw = [linear_probe(s * x, y, s * u, v, 6, raw=True, epochs=20).top1 for s in (1.0, 1e-3)]
    assert raw[0] - raw[1] > 5  # the published probe depends on it


def test_standardised_features():
    x = torch.tensor([[1.0, 1e-7, 5.0], [3.0, 2e-7, 5.0], [1.0, 0.0, 5.0], [3.0, 1e-7, 5.0]])
    train, test = standardised(x, 2 * x)
    unit = (16 / 3) ** 0.5
    assert train[:, 0].tolist() == pytest.approx([-unit, unit, -unit, unit])
    assert test[0, 0].item() == pytest.approx(0.0)
    assert not train[:, 1:].any()  # constant, up to 1e-5 of the largest deviation


def test_the_default_settings_are_the_published_ones():
    """The authors' program (tsb0601/EMP-SSL, evaluate.py): SGD, 100 epochs, batch 100."""
    published = {"epochs": 100, "lr": 0.03, "weight_decay": 5e-5, "batch_size": 100}
    assert vars(Evaluation().linear) == published
    defaults = inspect.signature(linear_probe).parameters
    assert {key: defaults[key].default for key in published} == published


@pytest.mark.parametrize("raw", [False, True])
def test_a_linear_probe_is_a_classifier_of_these_settings(raw):
    """With a weight decay strong enough to show in the accuracy."""
    (x, y), (u, v) = clouds(400), clouds(300, seed=1)
    sgd = {"epochs": 5, "lr": 0.3, "weight_decay": 0.05, "batch_size": 20}
    train, test = (x, u) if raw else standardised(x, u)
    [(weight, bias)] = train_classifier(train, y, 6, 0, *sgd.values())
    expected = top_k(test @ weight.T + bias, v)
    assert linear_probe(x, y, u, v, 6, raw=raw, **sgd) == expected
    other = linear_probe(x, y, u, v, 6, raw=raw, **(sgd | {"weight_decay": 5.0}))
    assert other.top1 < expected.top1 - 5


@pytest.mark.parametrize("hidden", [0, 20])
def test_sgd_against_numpy(hidden):
    """Momentum, weight decay, cosine by epoch: the same steps by hand in float64."""
    x, y = clouds(333)
    epochs, rate, decay = 3, 0.3, 1e-2
    draws = torch.Generator().manual_seed(PROBE_SEED)
    widths = (12, 20, 6) if hidden else (12, 6)
    layers = []
    for inputs, outputs in zip(widths, widths[1:]):
        weight = (2 * torch.rand(outputs, inputs, generator=draws) - 1) * inputs**-0.5
        bias = (2 * torch.rand(outputs, generator=draws) - 1) * inputs**-0.5
        layers += [weight.double().numpy(), bias.double().numpy()]
    velocity = [np.zeros_like(layer) for layer in layers]
    for epoch in range(epochs):
        lr = rate * (1 + np.cos(np.pi * epoch / epochs)) / 2
        for batch in torch.randperm(333, generator=draws)[:330].split(10):
            a, labels = x[batch].double().numpy(), y[batch].numpy()
            hidden_in = np.maximum(a @ layers[0].T + layers[1], 0) if hidden else a
            logits = hidden_in @ layers[-2].T + layers[-1]
            p = np.exp(logits - logits.max(1, keepdims=True))
            slope = (p / p.sum(1, keepdims=True) - np.eye(6)[labels]) / 10
            gradients = [slope.T @ hidden_in, slope.sum(0)]
            if hidden:
                below = (slope @ layers[-2]) * (hidden_in > 0)
                gradients = [below.T @ a, below.sum(0), *gradients]
            for i, gradient in enumerate(gradients):
                velocity[i] = 0.9 * velocity[i] + gradient + decay * layers[i]
                layers[i] = layers[i] - lr * velocity[i]
    ours = train_classifier(x.double(), y, 6, hidden, epochs, rate, decay, batch_size=10)
    for mine, theirs in zip(sum(ours, []), layers, strict=True):
        np.testing.assert_allclose(mine.numpy(), theirs, atol=1e-9, rtol=1e-6)


def test_probes_leave_the_random_numbers_alone():
    before = torch.get_rng_state()
    x, y = clouds(60)
    linear_probe(x, y, x, y, 6, epochs=1, hidden=3)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_probes_train_where_gradients_are_off(mode):
    x, y = clouds(60)
    expected = linear_probe(x, y, x, y, 6, epochs=2)
    with mode():
        assert linear_probe(x.clone(), y.clone(), x, y, 6, epochs=2) == expected


def test_a_hidden_layer_solves_what_is_not_linear():
    draws = torch.Generator().manual_seed(3)
    x = torch.randn(2000, 2, generator=draws)
    # four clouds apart from each other: opposite ones are of one class (exclusive or)
    x += x.sign()
    y = (x[:, 0] * x[:, 1] > 0).long()
    train, test = (x[:1500], y[:1500]), (x[1500:], y[1500:])
    assert linear_probe(*train, *test, 2, epochs=20).top1 < 65
    solved = linear_probe(*train, *test, 2, epochs=20, hidden=32)
    assert solved.top1 > 98
    assert linear_probe(*train, *test, 2, epochs=20, hidden=32) == solved


def test_linear_probe_learns_from_few():
    x, y = clouds(37, noise=0.1)
    assert linear_probe(x, y, x, y, 6, batch_size=100).top1 == 100  # fewer samples than the batch


def test_top_k():
    scores = torch.tensor([[3.0, 2, 1, 0, -1, -2], [0, 1, 2, 3, 4, 5], [9, 0, 1, 2, 3, 4]])
    assert top_k(scores, torch.tensor([0, 0, 1])) == (
        pytest.approx(100 / 3),
        pytest.approx(100 / 3),
    )
    assert top_k(scores[:, :3], torch.tensor([0, 0, 1])).top5 == 100


# nearest neighbours


def test_knn_against_numpy():
    (x, y), (u, v) = clouds(400), clouds(150, seed=1)
    a, b = (t.numpy().astype(np.float64) for t in (x, u))
    a, b = (t / np.linalg.norm(t, axis=1, keepdims=True) for t in (a, b))
    votes = np.zeros((150, 6))
    similarity = b @ a.T
    for i, row in enumerate(similarity):
        for j in np.argsort(-row)[:20]:
            votes[i, y[j]] += np.exp(row[j] / 0.07)
    ranks = np.argsort(-votes, axis=1)
    top1 = 100 * (ranks[:, 0] == v.numpy()).mean()
    top5 = 100 * (ranks[:, :5] == v.numpy()[:, None]).any(1).mean()
    for scale in (1, 1000):  # cosine: the scale must not matter
        ours = knn_probe(scale * x, y, scale * u, v)
        assert ours == (pytest.approx(top1, abs=0.01), pytest.approx(top5, abs=0.01))


@pytest.mark.parametrize("noise", [1.6, 6.0])
def test_knn10_is_scikit_learns_with_its_ties(noise):
    """In the noisy case two classes often have as many votes: the smallest wins."""
    (x, y), (u, v) = clouds(400, noise=noise), clouds(500, seed=1, noise=noise)
    theirs = KNeighborsClassifier(10, metric="cosine").fit(x.double(), y).score(u.double(), v)
    assert knn_probe(x, y, u, v, k=10, temperature=None).top1 == pytest.approx(100 * theirs)


def test_knn_with_classes_missing_from_one_of_the_sets():
    (x, y), (u, v) = clouds(300, noise=0.1), clouds(300, noise=0.1, seed=1)
    assert knn_probe(x, y, u[v == 5], v[v == 5]).top1 == 100
    assert knn_probe(x[y == 0], y[y == 0], u, v).top1 == pytest.approx(
        100 * (v == 0).double().mean().item()
    )


def test_parts_of_the_labels_are_stratified_nested_and_fixed():
    y = torch.tensor([7] * 500 + [2] * 200 + [4] * 3)[torch.randperm(703)]
    few, some = labelled_part(y, 0.01), labelled_part(y, 0.1)
    counts = [[(y[part] == label).sum().item() for label in (7, 2, 4)] for part in (few, some)]
    assert counts == [[5, 2, 1], [50, 20, 1]]  # none without an image
    assert set(few.tolist()) < set(some.tolist())
    assert torch.equal(some, some.sort().values)
    torch.rand(5)
    assert torch.equal(some, labelled_part(y, 0.1))
    assert torch.equal(y[labelled_part(y, 1.0)], y)

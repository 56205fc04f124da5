"""The k-NN classifier of our runs against one image at a time in float64, and solo-learn's own."""

import pytest
import torch
from solo.utils.knn import WeightedKNNClassifier

from emp_plugin.evaluation.probes import knn_probe, nearest
from emp_plugin.solo_learn import API
from emp_plugin.solo_learn.corrections import KNN


def reference(train_x, train_y, test_x, test_y, k, temperature, distance, epsilon):
    """One image at a time, in float64."""
    hits = [0, 0]
    for x, y in zip(test_x.double(), test_y.tolist()):
        if distance == "cosine":
            similarity = torch.stack([x @ t / (x.norm() * t.norm()) for t in train_x.double()])
        else:
            similarity = torch.stack([1 / ((x - t).norm() + epsilon) for t in train_x.double()])
        nearest = sorted(range(len(train_x)), key=lambda i: -similarity[i])[:k]
        votes = {}
        for i in nearest:
            weight = (
                torch.exp(similarity[i] / temperature) if distance == "cosine" else similarity[i]
            )
            votes[train_y[i].item()] = votes.get(train_y[i].item(), 0) + weight
        ranked = sorted(votes, key=lambda label: -votes[label])
        hits[0] += ranked[0] == y
        hits[1] += y in ranked[:5]
    return [100 * hit / len(test_y) for hit in hits]


def accuracy(knn, train_x, train_y, test_x, test_y):
    knn(
        train_features=train_x,
        train_targets=train_y,
        test_features=test_x,
        test_targets=test_y,
    )
    return knn.compute()


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize(("k", "max_matrix"), [(1, 10**6), (7, 100), (50, 10**6), (200, 1)])
def test_against_reference(distance, k, max_matrix):
    torch.manual_seed(0)
    train_x, train_y = 20 * torch.randn(60, 5), torch.randint(9, (60,))
    test_x, test_y = 20 * torch.randn(23, 5), torch.randint(8, (23,))
    expected = reference(train_x, train_y, test_x, test_y, k, 0.07, distance, 1e-5)
    knn = KNN(k, distance)
    knn.max_distance_matrix_size = max_matrix
    top1, top5 = accuracy(knn, train_x, train_y, test_x, test_y)
    assert top1 == pytest.approx(expected[0])
    # classes without a vote may fill up the five best
    assert top5 >= expected[1] - 1e-9


def test_unknown_distance():
    with pytest.raises(ValueError, match="manhattan"):
        nearest(torch.ones(2, 2), torch.ones(2, 2), 1, "manhattan")


def test_without_features_there_is_no_accuracy():
    assert KNN(20, "cosine").compute() == (-1, -1)


def test_class_updates_without_computing_and_empties_its_banks():
    knn = KNN(1, "cosine")
    knn(train_features=torch.eye(3).bfloat16(), train_targets=torch.arange(3))
    knn(test_features=torch.eye(3)[:2].bfloat16(), test_targets=torch.tensor([0, 2]))
    assert knn.compute() == (50.0, 50.0)
    assert knn.train_features == []
    assert knn.test_features == []


def test_untouched_class_cannot_be_made(untouched):
    with pytest.raises(ValueError, match="compute_on_step"):
        untouched.knn.WeightedKNNClassifier()


def solo_learns(distance):
    return WeightedKNNClassifier(k=3, distance_fx=distance)


@pytest.mark.skipif(
    API != "1.0.2",
    reason="about solo-learn 1.0.2; 1.0.6 normalises the features itself",
)
def test_solo_learns_cosine_overflows():
    """Features of length 20 point at their class, but exp(400 / 0.07) is infinite for all."""
    x = torch.tensor([[20.0, 19.0], [19.0, 20.0], [0.0, 20.0], [0.0, 19.0]])
    y, probe, label = torch.tensor([0, 0, 1, 1]), torch.tensor([[0.0, 20.0]]), torch.tensor([1])
    probe, label = torch.cat([probe, torch.tensor([[20.0, 20.0]])]), torch.tensor([1, 0])
    assert accuracy(KNN(3, "cosine"), x, y, probe, label)[0] == 100
    assert accuracy(solo_learns("cosine"), x, y, probe, label)[0] < 100


def test_solo_learns_breaks_on_classes_that_the_test_set_lacks():
    x, y = torch.eye(3), torch.arange(3)
    with pytest.raises((RuntimeError, IndexError)):
        accuracy(solo_learns("euclidean"), x, y, x[:2], y[:2])
    assert accuracy(KNN(3, "euclidean"), x, y, x[:2], y[:2])[0] == 100


def test_the_probe_is_solo_learns_where_that_is_right():
    """Features of length 1, and every class in both sets."""
    torch.manual_seed(0)
    x, u = (torch.nn.functional.normalize(torch.randn(n, 5), dim=1) for n in (120, 60))
    y, v = torch.arange(120) % 6, torch.arange(60) % 6
    theirs = accuracy(solo_learns("cosine"), x, y, u, v)
    assert knn_probe(x, y, u, v, k=3) == pytest.approx(tuple(map(float, theirs)), abs=1e-3)

import pytest
import torch

from emp_plugin.solo_learn import API, WeightedKNNClassifier
from emp_plugin.solo_learn.knn import knn_accuracy


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


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize(("k", "max_matrix"), [(1, 10**6), (7, 100), (50, 10**6), (200, 1)])
def test_against_reference(distance, k, max_matrix):
    torch.manual_seed(0)
    train_x, train_y = 20 * torch.randn(60, 5), torch.randint(9, (60,))
    test_x, test_y = 20 * torch.randn(23, 5), torch.randint(8, (23,))
    expected = reference(train_x, train_y, test_x, test_y, k, 0.07, distance, 1e-5)
    top1, top5 = knn_accuracy(train_x, train_y, test_x, test_y, k, 0.07, distance, 1e-5, max_matrix)
    assert top1 == pytest.approx(expected[0])
    # classes without a vote may fill up the five best
    assert top5 >= expected[1] - 1e-9


def test_unknown_distance():
    with pytest.raises(ValueError, match="manhattan"):
        knn_accuracy(
            torch.ones(2, 2),
            torch.zeros(2).long(),
            torch.ones(2, 2),
            torch.zeros(2).long(),
            1,
            1.0,
            "manhattan",
            0.0,
            10,
        )


def test_without_features_there_is_no_accuracy():
    assert WeightedKNNClassifier().compute() == (-1, -1)


def test_class_updates_without_computing_and_empties_its_banks():
    knn = WeightedKNNClassifier(k=1, distance_fx="cosine")
    knn(train_features=torch.eye(3).bfloat16(), train_targets=torch.arange(3))
    knn(test_features=torch.eye(3)[:2].bfloat16(), test_targets=torch.tensor([0, 2]))
    assert knn.compute() == (50.0, 50.0)
    assert knn.train_features == []
    assert knn.test_features == []


def test_unpatched_class_cannot_be_made(unpatched):
    with pytest.raises(ValueError, match="compute_on_step"):
        unpatched.knn.WeightedKNNClassifier()


def unpatched_accuracy(unpatched, distance, train_x, train_y, test_x, test_y):
    knn = unpatched.knn.WeightedKNNClassifier.__new__(unpatched.knn.WeightedKNNClassifier)
    knn.__dict__.update(
        train_features=[train_x],
        train_targets=[train_y],
        test_features=[test_x],
        test_targets=[test_y],
        k=3,
        T=0.07,
        max_distance_matrix_size=10**6,
        distance_fx=distance,
        epsilon=1e-5,
        reset=lambda: None,
    )
    return unpatched.knn.WeightedKNNClassifier.compute(knn)


@pytest.mark.skipif(
    API != "1.0.2",
    reason="about the wheel; solo-learn's head, in use, scales the features itself",
)
def test_unpatched_cosine_overflows(unpatched):
    """Features of length 20 point at their class, but exp(400 / 0.07) is infinite for all: ours is right, solo-learn's by chance."""
    x = torch.tensor([[20.0, 19.0], [19.0, 20.0], [0.0, 20.0], [0.0, 19.0]])
    y, probe, label = torch.tensor([0, 0, 1, 1]), torch.tensor([[0.0, 20.0]]), torch.tensor([1])
    probe, label = torch.cat([probe, torch.tensor([[20.0, 20.0]])]), torch.tensor([1, 0])
    assert knn_accuracy(x, y, probe, label, 3, 0.07, "cosine", 1e-5, 10**6)[0] == 100
    assert unpatched_accuracy(unpatched, "cosine", x, y, probe, label)[0] < 100


def test_unpatched_breaks_on_classes_that_the_test_set_lacks(unpatched):
    x, y = torch.eye(3), torch.arange(3)
    with pytest.raises((RuntimeError, IndexError)):
        unpatched_accuracy(unpatched, "euclidean", x, y, x[:2], y[:2])
    assert knn_accuracy(x, y, x[:2], y[:2], 3, 0.07, "euclidean", 1e-5, 10**6)[0] == 100

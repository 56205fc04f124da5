"""The rows of an evaluation, beside probes of features taken by hand."""

from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from emp_plugin.config import Probe, check_config
from emp_plugin.config.checks import check_evaluation
from emp_plugin.data import normalise
from emp_plugin.errors import UserError
from emp_plugin.evaluation import (
    PROTOCOLS,
    Network,
    evaluate,
    knn_probe,
    labelled_part,
    linear_probe,
)
from emp_plugin.transforms import PatchAugmentation

MEAN, STD = (0.3, 0.5, 0.6), (0.3, 0.25, 0.4)
SGD = {"epochs": 2, "lr": 0.05, "weight_decay": 0.1}
CROPS = PatchAugmentation(num_patches=2, patch_size=16, output_size=16, mean=MEAN, std=STD)


class Rows(nn.Module):
    """Some rows of pixels as features, and a pooled map; counts the images it is given."""

    def __init__(self, pooled=False):
        super().__init__()
        self.images = 0
        if pooled:
            self.pool = nn.Sequential(nn.AvgPool2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x):
        self.images += len(x)
        if hasattr(self, "pool"):
            pooled = self.pool(x)
            return {"backbone": pooled, "embedding": pooled**2}
        return {"backbone": x[:, 0, 3::4].flatten(1)}


def settings(**values):
    tiny = {"references": False, "linear": SGD, "mlp": {**SGD, "hidden": 8}}
    given = {"pretrained_feature_extractor": "last.ckpt", "evaluation": tiny | values}
    return check_config(given, Probe).evaluation


def rows_of(network, data, evaluation, augmentations=(CROPS,), **others):
    return list(evaluate([Network("emp", network)], *data, augmentations, evaluation, **others))


def test_probes_on_parts_of_the_labels(digits):
    train, test = digits[0].subset(range(300)), digits[1].subset(range(100))
    network = Rows()
    probes = ["linear", "published", "mlp", "knn", "knn10"]
    evaluation = settings(views=["whole"], probes=probes, label_fractions=[0.1, 1.0])
    rows = rows_of(network, (train, test), evaluation)
    assert network.images == 400  # features are taken once, and the test set stays whole
    x, u = (normalise(data.images, MEAN, STD)[:, 0, 3::4].flatten(1) for data in (train, test))
    part = labelled_part(train.targets, 0.1)
    assert 20 < len(part) < 40
    for fraction, which in ((0.1, part), (1.0, slice(None))):
        data = x[which], train.targets[which], u, test.targets
        for probe, expected in {
            "linear": linear_probe(*data, 10, **SGD),
            "published": linear_probe(*data, 10, raw=True, **SGD),
            "mlp": linear_probe(*data, 10, hidden=8, **SGD),
            "knn": knn_probe(*data),
            "knn10": knn_probe(*data, k=10, temperature=None),
        }.items():
            (row,) = [row for row in rows if (row["probe"], row["labels"]) == (probe, fraction)]
            assert (row["top1"], row["top5"]) == (round(expected.top1, 2), round(expected.top5, 2))
    assert len(rows) == 10


def test_what_the_columns_say(digits):
    data = digits[0].subset(range(60)), digits[1].subset(range(20))
    evaluation = settings(views=["whole", "dense", "bag"], probes=["knn"], bag_patches=3)
    larger = PatchAugmentation(2, 16, 32)
    rows = rows_of(Rows(pooled=True), data, evaluation, [larger])
    columns = ("features", "view", "view_patches", "augmented", "scale")
    assert [tuple(row[column] for column in columns) for row in rows] == [
        (features, *about)
        for about in (("whole", None, False, 1), ("dense", None, False, 2), ("bag", 3, False, 1))
        for features in ("backbone", "embedding")
    ]
    assert {row["protocol"] for row in rows} == {"custom"}
    assert {row["precision"] for row in rows} == {"32"}


def test_a_network_without_a_map_has_a_bag_of_16_plain_patches_for_dense(digits):
    data = digits[0].subset(range(60)), digits[1].subset(range(20))
    (row,) = rows_of(Rows(), data, settings(views=["dense"], probes=["knn"]))
    assert (row["view"], row["view_patches"], row["augmented"]) == ("bag", 16, False)


def test_protocols_are_constants(monkeypatch):
    """No GPU changes them. What they are is what DESIGN and the paper say."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert asdict(PROTOCOLS["standard"]) == {
        "views": ("whole", "dense"),
        "probes": ("linear", "knn", "knn10"),
        "bag_patches": 16,
        "bag_augmented": False,
        "images": None,
    }
    assert PROTOCOLS["quick"] == replace(PROTOCOLS["standard"], images=(10_000, 2_000))
    published = settings(protocol="published", linear={})
    assert (published.views, published.probes) == (["bag"], ["published"])
    assert (published.bag_patches, published.bag_augmented) == (128, True)
    standard = settings(linear={})
    assert (standard.protocol, standard.views) == ("standard", ["whole", "dense"])
    assert check_evaluation(standard) == standard
    assert settings(probes=["knn"], linear={}).protocol == "custom"
    assert settings(linear={"lr": 0.1}).protocol == "custom"
    with pytest.raises(UserError, match="quick is a constant.*evaluation.probes"):
        settings(protocol="quick", probes=["knn"], linear={})
    with pytest.raises(UserError, match="standard, published, quick, got 'fast'"):
        settings(protocol="fast")


def test_quick_is_standard_on_fewer_images_without_the_embeddings_sgd(digits, monkeypatch):
    few = dict(PROTOCOLS)
    few["quick"] = type(few["quick"])(**asdict(few["quick"]) | {"images": (200, 50)})
    monkeypatch.setattr("emp_plugin.evaluation.protocol.PROTOCOLS", few)
    network = Rows(pooled=True)
    rows = rows_of(network, digits, settings(protocol="quick", linear={}))
    # 250, within the classes' roundings; a pass for whole and dense; 6 zeros that measure maps
    assert abs(network.images - 256) <= 5
    probed = {(row["features"], row["probe"]) for row in rows}
    assert ("backbone", "linear") in probed
    assert ("embedding", "knn10") in probed
    assert ("embedding", "linear") not in probed
    assert {row["protocol"] for row in rows} == {"quick"}


def test_pixels_have_the_training_s_normalisation(digits):
    data = digits[0].subset(range(300)), digits[1].subset(range(200))
    evaluation = settings(views=["whole"], probes=["knn"], references=True)
    (row,) = list(evaluate([], *data, [CROPS], evaluation))
    # cosines of shifted pixels are others, so that a swap of mean and std shows
    x, u = (normalise(part.images, MEAN, STD).flatten(1) for part in data)
    assert row["top1"] == knn_probe(x, data[0].targets, u, data[1].targets).top1
    x, u = (normalise(part.images, STD, MEAN).flatten(1) for part in data)
    assert row["top1"] != knn_probe(x, data[0].targets, u, data[1].targets).top1


def test_linear_probes_of_pixels_do_not_depend_on_their_normalisation(digits):
    data = digits[0].subset(range(300)), digits[1].subset(range(200))
    evaluation = settings(
        views=["whole"], probes=["linear"], references=True, linear={"epochs": 20}
    )
    accuracies = []
    for mean, std in ((MEAN, STD), ((0.5,) * 3, (0.5,) * 3)):
        crops = PatchAugmentation(2, 16, 16, mean=mean, std=std)
        (row,) = list(evaluate([], *data, [crops], evaluation))
        assert (row["model"], row["features"]) == ("raw pixels", "pixels")
        accuracies.append(row["top1"])
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.1)

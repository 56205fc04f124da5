"""The rows of an evaluation, beside probes of features taken by hand."""

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from emp_plugin.config import Evaluation
from emp_plugin.data import normalise
from emp_plugin.evaluation import evaluate, knn_probe, labelled_part, linear_probe
from emp_plugin.transforms import PatchAugmentation

RECIPE = PatchAugmentation(num_patches=2, patch_size=16, output_size=16)


class Rows(nn.Module):
    """A method whose features are some rows of pixels, and which counts the images it is given."""

    def __init__(self):
        super().__init__()
        self.weight, self.images = nn.Parameter(torch.ones(())), 0

    def features(self, x):
        self.images += len(x)
        return {"backbone": x[:, 0, 3::4].flatten(1) * self.weight}


@pytest.fixture
def settings():
    def make(**values):
        return OmegaConf.merge(
            OmegaConf.structured(Evaluation),
            {
                "views": ["whole"],
                "bag_patches": 2,
                "references": False,
                "linear": {"epochs": 2},
                "bag_augmented": False,
                "mlp": {"epochs": 2, "hidden": 8},
            }
            | values,
        )

    return make


def test_probes_on_parts_of_the_labels(digits, settings):
    train, test = digits[0].subset(range(300)), digits[1].subset(range(100))
    method = Rows()
    rows = list(
        evaluate(
            method,
            Rows(),
            "emp",
            train,
            test,
            RECIPE,
            settings(probes=["linear", "mlp", "knn"], label_fractions=[0.1, 1.0]),
            0,
            False,
        )
    )
    assert method.images == 400  # features are taken once, and the test set stays whole
    x, u = (
        normalise(data.images, RECIPE.mean, RECIPE.std)[:, 0, 3::4].flatten(1)
        for data in (train, test)
    )
    part = labelled_part(train.targets, 0.1)
    assert 20 < len(part) < 40
    for fraction, which in ((0.1, part), (1.0, slice(None))):
        data = x[which], train.targets[which], u, test.targets
        for probe, expected in (
            ("linear", linear_probe(*data, 10, 2)),
            ("mlp", linear_probe(*data, 10, 2, hidden=8)),
            ("knn", knn_probe(*data)),
        ):
            (row,) = [row for row in rows if (row["probe"], row["labels"]) == (probe, fraction)]
            assert (row["top1"], row["top5"]) == (round(expected.top1, 2), round(expected.top5, 2))
    assert len(rows) == 6
    assert rows[2]["top1"] != rows[5]["top1"]

import math

import pytest
import torch
from torch import nn

from emp_plugin.data import normalise
from emp_plugin.errors import UserError
from emp_plugin.evaluation import extract_features, pixel_features
from emp_plugin.evaluation.features import FORWARD_PIXELS
from emp_plugin.transforms import PatchAugmentation

RECIPE = PatchAugmentation(num_patches=4, patch_size=16, output_size=16)


class Mean(nn.Module):
    """A method whose features are the mean colours, and which tells what it was given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.shapes = []

    def features(self, x):
        assert not self.training
        self.shapes.append(tuple(x.shape))
        return {"backbone": x.mean((2, 3)) * self.weight, "embedding": x.flatten(1)[:, :5]}


def test_whole_images_in_order_with_the_incomplete_batch(digits):
    test = digits[1]
    method = Mean().train()
    out = extract_features(method, test, RECIPE)
    torch.testing.assert_close(
        out.features["backbone"], normalise(test.images, RECIPE.mean, RECIPE.std).mean((2, 3))
    )
    assert torch.equal(out.targets, test.targets)
    assert out.features["embedding"].shape == (360, 5)
    assert method.training


def test_a_bag_is_the_mean_over_all_positions(digits):
    """With very many plain patches the mean colour of the patches tends to the mean over all crop positions."""
    test = digits[1].subset([0, 5, 9])
    out = extract_features(Mean(), test, RECIPE, "bag", num_patches=3000, augmented=False)
    crops = normalise(test.images, RECIPE.mean, RECIPE.std).unfold(2, 16, 1).unfold(3, 16, 1)
    torch.testing.assert_close(
        out.features["backbone"], crops.mean((2, 3, 4, 5)), atol=0.03, rtol=0
    )


def test_a_bag_depends_on_seed_and_place_alone(digits, monkeypatch):
    test = digits[1].subset(range(150))
    first = extract_features(Mean(), test, RECIPE, "bag", 6)
    torch.rand(10)
    monkeypatch.setitem(FORWARD_PIXELS, "cpu", 250 * 16 * 16)  # other memory, same patches
    method = Mean()
    again = extract_features(method, test, RECIPE, "bag", 6)
    torch.testing.assert_close(first.features["backbone"], again.features["backbone"])
    assert max(shape[0] for shape in method.shapes) <= 300
    other = extract_features(Mean(), test, RECIPE, "bag", 6, seed=1)
    assert not torch.allclose(first.features["backbone"], other.features["backbone"])


def test_plain_and_augmented_bags_differ(digits):
    test = digits[1].subset(range(20))
    plain = extract_features(Mean(), test, RECIPE, "bag", 6, augmented=False).features["backbone"]
    augmented = extract_features(Mean(), test, RECIPE, "bag", 6, augmented=True).features[
        "backbone"
    ]
    assert (
        (plain[:, 0] - plain[:, 1]).abs().max() < 1e-6 < (augmented - plain).abs().max()
    )  # digits are grey


def test_features_of_broken_weights_are_refused(digits):
    """Probes of NaN have the accuracy of chance, which could pass for a result."""
    method = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 4))
    method.features = lambda x: {"backbone": method(x)}
    extract_features(method, digits[1].subset(range(3)), RECIPE)
    method[1].weight.data[0, 0] = math.nan
    with pytest.raises(UserError, match="emp, whole, test: .*NaN.*diverged"):
        extract_features(method, digits[1].subset(range(3)), RECIPE, description="emp, whole, test")


def test_pixels_and_unknown_view(digits):
    assert pixel_features(digits[1], RECIPE).features["pixels"].shape == (360, 3072)
    with pytest.raises(ValueError, match="whole"):
        extract_features(Mean(), digits[1], RECIPE, "top")

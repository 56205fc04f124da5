"""Whole images, bags and dense views, against features made by hand."""

import math

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from emp_plugin.data import normalise
from emp_plugin.errors import UserError
from emp_plugin.evaluation import View, extract_features, pixel_features
from emp_plugin.evaluation import views as module
from emp_plugin.evaluation.views import dense_scale, extract_views
from emp_plugin.transforms import PatchAugmentation

MEAN, STD = (0.2, 0.5, 0.6), (0.3, 0.25, 0.4)  # mean and std differ, so that a swap shows
CROPS = PatchAugmentation(num_patches=4, patch_size=16, output_size=16)


def mean_colour(x):
    return x.mean((2, 3))


class Mean(nn.Module):
    """Mean colours, and a second kind of features; tells what it was given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.shapes = []

    def forward(self, x):
        assert not self.training
        self.shapes.append(tuple(x.shape))
        return {"backbone": mean_colour(x) * self.weight, "embedding": x.flatten(1)[:, :5]}


# whole images


def test_whole_images_in_order_with_the_incomplete_batch(digits):
    test = digits[1]
    network = Mean().train()
    out = extract_features(network, test, mean=MEAN, std=STD)
    torch.testing.assert_close(
        out.features["backbone"], mean_colour(normalise(test.images, MEAN, STD))
    )
    assert torch.equal(out.targets, test.targets)
    assert out.features["embedding"].shape == (360, 5)
    assert network.training


def test_pixels_are_normalised(digits):
    out = pixel_features(digits[1], MEAN, STD)
    by_hand = (digits[1].images[7] / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[
        :, None, None
    ]
    torch.testing.assert_close(out.features["pixels"][7], by_hand.flatten())


def test_features_of_broken_weights_are_refused(digits):
    """Probes of NaN have the accuracy of chance, which could pass for a result."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))
    few = digits[1].subset(range(3))
    extract_features(network, few)
    network[1].weight.data[0, 0] = math.nan
    with pytest.raises(UserError, match="emp, test: .*NaN.*diverged"):
        extract_features(network, few, description="emp, test")


def test_an_unknown_view_is_named():
    with pytest.raises(ValueError, match="whole, dense, bag, got 'top'"):
        extract_features(mean_colour, [], "top")


@pytest.mark.parametrize("view", ["dense", "bag"])
def test_patches_of_another_network_are_not_assumed(view):
    with pytest.raises(ValueError, match=rf"View\('{view}', .*patch_size=16, output_size=32"):
        extract_features(torchvision.models.resnet18(), [], view)


# bags


def bag(data, num_patches=6, augmented=True, **settings):
    view = View("bag", CROPS, num_patches=num_patches, augmented=augmented)
    return extract_features(mean_colour, data, view, **settings).features["backbone"]


def test_a_bag_is_the_mean_over_all_positions(digits):
    """With very many plain patches the mean colour tends to that over all crop positions."""
    few = digits[1].subset([0, 5, 9])
    crops = normalise(few.images, MEAN, STD).unfold(2, 16, 1).unfold(3, 16, 1)
    torch.testing.assert_close(
        bag(few, 3000, augmented=False, mean=MEAN, std=STD),
        crops.mean((2, 3, 4, 5)),
        atol=0.05,
        rtol=0,
    )


def test_a_bag_depends_on_seed_and_place_alone(digits, monkeypatch):
    some = digits[1].subset(range(150))
    first = bag(some)
    torch.rand(10)
    monkeypatch.setitem(module.FORWARD_PIXELS, "cpu", 250 * 16 * 16)  # other memory, same patches
    network = Mean()
    again = extract_features(network, some, View("bag", CROPS, num_patches=6, augmented=True))
    torch.testing.assert_close(first, again.features["backbone"])
    assert max(shape[0] for shape in network.shapes) <= 300
    assert not torch.allclose(first, bag(some, seed=1))


def test_every_image_has_a_bag_of_its_own(digits):
    """The same image at 250 places: patches are drawn for a hundred at a time, for each anew."""
    same = digits[1].subset([3] * 250)
    assert len(bag(same).unique(dim=0)) == 250


def test_plain_and_augmented_bags_differ(digits):
    some = digits[1].subset(range(20))
    plain, augmented = bag(some, augmented=False), bag(some)
    assert (plain[:, 0] - plain[:, 1]).abs().max() < 1e-6  # digits are grey
    assert (augmented - plain).abs().max() > 1e-3


def test_a_bag_of_float_images_is_refused():
    with pytest.raises(ValueError, match="uint8 images, got torch.float32"):
        bag(TensorDataset(torch.rand(4, 3, 32, 32), torch.zeros(4)))


# the dense view


def without_padding(backbone):
    """The same network with every kernel as large as its stride: no cell sees another's pixels."""
    for parent in list(backbone.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Conv2d):
                k = layer.stride[0]
                made = nn.Conv2d(layer.in_channels, layer.out_channels, k, k, bias=False)
                setattr(parent, name, made)
            elif isinstance(layer, nn.MaxPool2d):
                setattr(parent, name, nn.MaxPool2d(2))
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.uniform_(layer.running_mean, -0.1, 0.1)
                nn.init.uniform_(layer.weight, 0.5, 1.5)
    return backbone.eval().double()


@pytest.fixture(params=["cifar-18", "imagenet100-18", "cifar-50", "imagenet100-50"])
def resnet(request, config):
    """(backbone of the installed solo-learn, stride of its map, side of a patch, of an image)."""
    from emp_plugin.solo_learn import backbone_of, build_method

    images, depth = request.param.split("-")
    sizes = {"cifar": (8, 16, 32), "imagenet100": (32, 64, 128)}
    cfg = config(f"{images}/emp", f"backbone.name=resnet{depth}", "backbone.stem_padding=null")
    return backbone_of(build_method(cfg)), *sizes[images]


def test_a_dense_view_is_the_mean_over_all_windows(resnet):
    """Equal to the features of all crops at multiples of the stride, each on its own."""
    backbone, stride, patch, side = resnet
    layers = nn.LazyLinear(7), nn.BatchNorm1d(7), nn.ReLU()  # an embedding, for every window
    network = nn.Sequential(without_padding(backbone), *layers).double().eval()
    images = torch.rand(3, 3, side, side, dtype=torch.float64)
    view = View("dense", PatchAugmentation(patch_size=patch, output_size=patch))
    data = TensorDataset(images, torch.arange(3))
    whole, dense = (
        extract_features(network, data, v).features["backbone"] for v in ("whole", view)
    )
    places = range(0, side - patch + 1, stride)
    crops = [images[..., y : y + patch, x : x + patch] for y in places for x in places]
    with torch.inference_mode():
        windows = torch.stack([network(crop) for crop in crops])
        expected = network(images)
    assert len(windows) >= 9
    torch.testing.assert_close(dense, windows.mean(0), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(whole, expected, atol=1e-10, rtol=1e-10)
    assert (dense - whole).abs().max() > 1e-6


def test_whole_and_dense_share_a_pass_where_the_image_keeps_its_size(digits):
    network = torchvision.models.resnet18(num_classes=4).eval()
    passes = []
    network.conv1.register_forward_hook(lambda _, inputs, out: passes.append(inputs[0].shape))
    some = digits[1].subset(range(6))
    views = [View("whole"), View("dense", CROPS, scale=1.0)]
    (whole, _), (dense, scale) = extract_views(network, some, views)
    assert [tuple(shape) for shape in passes[3:]] == [
        (6, 3, 32, 32)
    ]  # the first three measure maps
    alone = extract_features(network, some)
    torch.testing.assert_close(whole.features["backbone"], alone.features["backbone"])
    assert scale == 1
    assert dense.features["backbone"].shape == (6, 4)


@pytest.mark.parametrize(
    ("crops", "side", "size"),
    [
        ({"patch_size": 16, "output_size": 32}, 32, 64),
        ({"patch_size": 16, "output_size": 16}, 32, 32),
        ({"patch_size": None, "scale": (0.08, 1.0)}, 32, 48),
        ({"patch_size": None, "scale": (0.2, 1.0)}, 32, 40),
        ({"patch_size": None, "scale": (0.25, 0.25)}, 32, 64),
        ({"patch_size": None, "scale": (0.08, 1.0)}, 96, 48),  # crops have the size trained on
    ],
)
def test_the_scale_of_a_dense_view(crops, side, size):
    view = View("dense", PatchAugmentation(**crops))
    assert module.dense_side((side, side), view, stride=8) == (size, size)
    # never less than a window
    assert module.dense_side((side, side), view, stride=8, window=(9, 9)) == (
        (72, 72) if size != side else (size, size)
    )


def test_the_scale_is_the_mean_over_all_views():
    """Of 2 views with crops of half the side, and 6 with the whole."""
    crops = [
        PatchAugmentation(n, None, 32, scale=(share, share)) for n, share in ((2, 0.25), (6, 1.0))
    ]
    assert dense_scale(crops, 32) == pytest.approx(32 / 28)
    with pytest.raises(ValueError, match="evaluation.dense_scale"):
        dense_scale([CROPS, PatchAugmentation(4, 8, 16)], 32)


def test_a_network_without_a_pooling_layer_has_no_dense_view(digits):
    with pytest.raises(ValueError, match="nn.AdaptiveAvgPool2d"):
        extract_features(mean_colour, digits[1], View("dense", CROPS))
    unused = nn.AdaptiveAvgPool2d(1)
    with pytest.raises(ValueError, match="not where this network averages"):
        extract_features(mean_colour, digits[1], View("dense", CROPS), pool=unused)


# networks and data of other people


@pytest.mark.parametrize(
    "network",
    [
        timm.create_model("resnet18", num_classes=0),
        torchvision.models.vgg11(num_classes=5),  # has an attribute `features`
        nn.Flatten(),  # has no parameters
        mean_colour,
    ],
    ids=["timm", "vgg", "flatten", "function"],
)
@pytest.mark.parametrize("loader", [False, True])
def test_any_network_and_any_data(network, loader):
    images = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)
    data = TensorDataset(images, torch.arange(5))
    out = extract_features(
        network, DataLoader(data, 2) if loader else data, "whole", mean=MEAN, std=STD
    )
    if isinstance(network, nn.Module):
        network.eval()
    with torch.inference_mode():
        expected = network(normalise(images, MEAN, STD))
    torch.testing.assert_close(out.features["backbone"], expected, atol=1e-4, rtol=1e-4)
    assert out.targets.tolist() == [0, 1, 2, 3, 4]


def test_timm_and_pil_images_in_a_dense_view():
    network = timm.create_model("resnet18", num_classes=0).eval()
    data = torchvision.datasets.FakeData(3, (3, 64, 64))
    view = View("dense", PatchAugmentation(patch_size=32, output_size=64))
    [(out, scale)] = extract_views(network, data, [view])
    assert scale == 2
    assert out.features["backbone"].shape == (3, 512)


def test_float_images_are_taken_as_they_are():
    images = torch.rand(4, 3, 8, 8)
    out = extract_features(mean_colour, TensorDataset(images, torch.zeros(4)), mean=MEAN, std=STD)
    torch.testing.assert_close(out.features["backbone"], mean_colour(images))


def test_devices():
    data = TensorDataset(torch.rand(2, 3, 8, 8), torch.zeros(2))
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        extract_features(mean_colour, data, device="gpu")
    # a device that is neither cpu nor cuda: it computes nothing, so the features are not finite
    with pytest.raises(NotImplementedError):
        extract_features(mean_colour, data, device="meta")

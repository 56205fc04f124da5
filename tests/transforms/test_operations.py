"""Every operation of the batched pipeline is torchvision's, patch by patch, in float32."""

import itertools

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from emp_plugin.transforms import BatchMultiPatch, PatchAugmentation, PatchParameters
from emp_plugin.transforms.ops import blur, colour, crop

TOLERANCE = dict(rtol=0, atol=1e-5)
OFTEN = dict(flip_prob=0.5, jitter_prob=0.8, grey_prob=0.3, blur_prob=0.4, solarize_prob=0.4)


def images(count=6, height=32, width=32, seed=0):
    """Random pixels, and grey, black, white and saturated patches: the corners of HSV."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)
    noise[0] = torch.linspace(0, 255, width).to(torch.uint8)
    noise[1, :, : height // 2] = 0
    noise[1, 0, height // 2 :] = 255
    noise[2, 1] = noise[2, 0]
    return noise


def generator(seed):
    return torch.Generator().manual_seed(seed)


def reference_jitter(x, order, factors):
    operations = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    for which in order.tolist():
        x = operations[which](x, factors[which].item())
    return x


def reference_crop(image, box, size, interpolation):
    """The box (top, left, height, width) of a uint8 image, resized, in [0, 1]."""
    mode = InterpolationMode(interpolation)
    x = TF.resized_crop(image.float() / 255, *box, [size, size], mode, antialias=True)
    return x.clamp(0, 1)


def reference_patch(image, params, augmentation):
    """One patch by torchvision alone; ``params`` holds the values of this patch."""
    box = (params.top.item(), params.left.item(), params.height.item(), params.width.item())
    x = reference_crop(image, box, augmentation.output_size, augmentation.interpolation)
    if params.flip:
        x = TF.hflip(x)
    if params.jitter:
        x = reference_jitter(x, params.order, params.factors)
    if params.grey:
        x = TF.rgb_to_grayscale(x, 3)
    if params.blur:
        kernel = 2 * blur.blur_radius(augmentation.blur_sigma[1], augmentation.output_size) + 1
        x = TF.gaussian_blur(x, kernel, params.sigma.item())
    if params.solarize:
        x = TF.solarize(x, 0.5)
    return TF.normalize(x, augmentation.mean, augmentation.std)


OWN_STATISTICS = dict(mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26))
BICUBIC = dict(interpolation="bicubic", **OFTEN)
WIDE = dict(scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
AUGMENTATIONS = [
    PatchAugmentation(12, 16, 16, **OFTEN),
    PatchAugmentation(12, 16, 32, **OFTEN),
    PatchAugmentation(12, 16, 32, **OWN_STATISTICS, **BICUBIC),
    PatchAugmentation(8, 31, 20, jitter=(0.8, 0.8, 0.8, 0.5), **OFTEN),
    PatchAugmentation(8, 5, 4, **OFTEN),
    PatchAugmentation(8, None, 32, **WIDE, **BICUBIC),
    PatchAugmentation(8, None, 24, scale=(0.3, 1.0), ratio=(0.5, 2.0), **OFTEN),
    # from here on resized by interpolation, and blurred in pieces
    PatchAugmentation(3, 30, 70, **OFTEN),
    PatchAugmentation(3, 30, 70, **BICUBIC),
    PatchAugmentation(3, None, 70, scale=(0.25, 1.0), ratio=(0.5, 2.0), **BICUBIC),
]


@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=str)
@pytest.mark.parametrize("shape", [(32, 32), (40, 33)])
def test_whole_pipeline_equals_torchvision(augmentation, shape):
    source = images(6, *shape)
    transform = BatchMultiPatch.from_augmentation(augmentation)
    params = transform.sample(6, *shape, generator(1))
    patches = transform.make(source, params)
    atol = 1e-5 / min(augmentation.std)  # an output unit is 1 / std of a pixel unit
    for i, j in itertools.product(range(augmentation.num_patches), range(6)):
        one = PatchParameters(*(field[i, j] for field in params))
        wanted = reference_patch(source[j], one, augmentation)
        torch.testing.assert_close(patches[i, j], wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("output", [7, 16, 32, 50])
def test_resized_crops(interpolation, output):
    source = images(5, 36, 30)
    top, left = [0, 3, 20, 35, 0], [0, 4, 13, 29, 0]
    height, width = [36, 20, 16, 1, 2], [30, 9, 17, 1, 30]
    boxes = torch.tensor([[0, 1, 2, 3, 4], top, left, height, width])
    settings = (36, 30), output, interpolation
    plan = crop.resized_crops_plan(source.shape, boxes, *settings)
    made = crop.resized_crops(source, plan, *settings)
    for image, patch, box in zip(source, made, zip(top, left, height, width)):
        wanted = reference_crop(image, box, output, interpolation)
        torch.testing.assert_close(patch, wanted, **TOLERANCE)


@pytest.mark.parametrize("matrices", [False, True])
@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_jitter_in_every_order(order, matrices):
    x = images(9, 12, 12).float() / 255
    factors = torch.rand(9, 4, generator=generator(2)) * 1.6 + 0.2
    factors[:, 3] = torch.linspace(-0.5, 0.5, 9)
    order = torch.tensor(order)
    wanted = torch.stack([reference_jitter(x[i], order, factors[i]) for i in range(9)])
    hue_counts = [9 * (operation == colour.HUE) for operation in order.tolist()]
    table = colour.jitter_table(order.expand(9, 4), factors)
    table = colour.jitter_matrices(table) if matrices else table
    colour.color_jitter(x, hue_counts, factors[:, 3:], table)
    torch.testing.assert_close(x, wanted, **TOLERANCE)


@pytest.mark.parametrize("turns", [-0.5, -0.31, -0.1, 0.0, 0.05, 1 / 6, 0.4, 0.5])
def test_hue_on_a_grid_of_colours(turns):
    levels = torch.linspace(0, 1, 18)
    colours = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, -1)
    made = colours.clone()
    colour.rotate_hue(made, torch.tensor([[turns]]))
    torch.testing.assert_close(made, TF.adjust_hue(colours[..., None], turns)[..., 0], **TOLERANCE)


BLURS = [(size, 2.0) for size in (1, 2, 8, 16, 32, 33, 101)] + [(24, 0.5), (64, 1.0)]


@pytest.mark.parametrize(("size", "max_sigma"), BLURS)
def test_blur(size, max_sigma):
    x = torch.rand(7, 3, size, size, generator=generator(3))
    sigma = torch.linspace(0.1, max_sigma, 7)
    radius = blur.blur_radius(max_sigma, size)
    wanted = torch.stack([TF.gaussian_blur(p, 2 * radius + 1, s.item()) for p, s in zip(x, sigma)])
    made = blur.gaussian_blur(x, blur.gaussian_taps(sigma, radius))
    torch.testing.assert_close(made, wanted, **TOLERANCE)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [7, 30, 45, 64, 65, 100])
def test_resize_of_equal_crops(interpolation, size):
    x = images(4, 36, 70).float() / 255
    wanted = TF.resize(x, [size, size], InterpolationMode(interpolation), antialias=True)
    made = crop.resize(x, size, interpolation)
    torch.testing.assert_close(made, wanted.clamp(0, 1), **TOLERANCE)


def test_blur_kernel_is_wide_enough():
    assert blur.blur_radius(2.0, 32) == 8  # kernel of 17
    x = torch.rand(1, 3, 64, 64, generator=generator(4))
    wide = TF.gaussian_blur(x, 51, 2.0)
    assert (
        blur.gaussian_blur(x, blur.gaussian_taps(torch.tensor([2.0]), 8)) - wide
    ).abs().max() < 1e-3


def test_solarize_and_grey():
    x = images(4).float() / 255
    torch.testing.assert_close(colour.solarize(x), TF.solarize(x, 128 / 255 - 1e-4), **TOLERANCE)
    torch.testing.assert_close(colour.grey(x), TF.rgb_to_grayscale(x)[:, 0], **TOLERANCE)

"""What is drawn is as the settings say, and what is applied is what was drawn."""

import itertools

import pytest
import scipy.stats
import torch
from torchvision import transforms

from emp_plugin.transforms import BatchMultiPatch, PatchAugmentation


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(count=8, height=32, width=32):
    shape = (count, 3, height, width)
    return torch.randint(0, 256, shape, generator=generator(9), dtype=torch.uint8)


def uniform_p_value(values, cells):
    return scipy.stats.chisquare(torch.bincount(values.flatten(), minlength=cells).numpy()).pvalue


@pytest.mark.parametrize("shape", [(32, 32), (20, 27)])
def test_crops_are_exactly_those_sampled(shape):
    height, width = shape
    # A pixel's colour says where it is, and blue which image it belongs to.
    source = torch.empty(5, 3, height, width, dtype=torch.uint8)
    source[:, 0] = torch.arange(height)[:, None]
    source[:, 1] = torch.arange(width)
    source[:, 2] = torch.arange(5)[:, None, None]
    off = dict(jitter_prob=0, grey_prob=0, blur_prob=0, solarize_prob=0)
    transform = BatchMultiPatch(60, 16, 16, mean=(0, 0, 0), std=(1, 1, 1), **off)
    params = transform.sample(5, height, width, generator())
    patches = (transform.make(source, params) * 255).round().long()
    assert 0 < params.flip.float().mean() < 1
    for i, j in itertools.product(range(60), range(5)):
        columns = params.left[i, j] + torch.arange(16)
        if params.flip[i, j]:
            columns = columns.flip(0)
        rows = params.top[i, j] + torch.arange(16)[:, None]
        assert torch.equal(patches[i, j, 0], rows.expand(16, 16))
        assert torch.equal(patches[i, j, 1], columns.expand(16, 16))
        assert (patches[i, j, 2] == j).all()


def test_crop_positions_are_uniform_and_inside():
    params = BatchMultiPatch(40, 16, 16).sample(700, 32, 24, generator())
    assert params.top.min() == 0
    assert params.top.max() == 16
    assert params.left.min() == 0
    assert params.left.max() == 8
    assert 1e-3 < uniform_p_value(params.top * 9 + params.left, 17 * 9) < 1 - 1e-3


def test_crop_as_large_as_the_image():
    params = BatchMultiPatch(3, 32, 32).sample(4, 32, 32, generator())
    assert not params.top.any()
    assert not params.left.any()


@pytest.mark.parametrize(
    ("shape", "scale", "ratio"),
    [
        ((32, 32), (0.08, 1.0), (3 / 4, 4 / 3)),
        ((32, 32), (0.25, 0.25), (1.0, 1.0)),
        ((20, 60), (0.2, 1.0), (3 / 4, 4 / 3)),  # often no try fits
        ((60, 20), (0.9, 1.0), (3 / 4, 4 / 3)),  # never
        ((21, 40), (1.0, 1.0), (1.0, 1.0)),
    ],
)
def test_random_resized_boxes_equal_torchvisions_in_distribution(shape, scale, ratio):
    transform = BatchMultiPatch(4, None, 32, scale=scale, ratio=ratio)
    params = transform.sample(1000, *shape, generator())
    torch.manual_seed(0)
    image = torch.empty(3, *shape)
    draw = transforms.RandomResizedCrop.get_params
    theirs = torch.tensor([draw(image, scale, ratio) for _ in range(2500)])
    for name, column in zip(("top", "left", "height", "width"), theirs.T):
        ours = getattr(params, name).flatten()
        values, expected = ours.unique().tolist(), column.unique().tolist()
        assert values == expected or len(values) > 5
        assert scipy.stats.ks_2samp(ours.numpy(), column.numpy()).pvalue > 1e-3, name
    assert (params.top >= 0).all()
    assert (params.top + params.height <= shape[0]).all()
    assert (params.left >= 0).all()
    assert (params.left + params.width <= shape[1]).all()
    our_areas = (params.height * params.width).flatten()
    their_areas = theirs[:, 2] * theirs[:, 3]
    assert scipy.stats.ks_2samp(our_areas.numpy(), their_areas.numpy()).pvalue > 1e-3


def test_all_orders_are_equally_likely():
    order = BatchMultiPatch(20).sample(600, 32, 32, generator()).order
    assert torch.equal(order.sort(-1).values, torch.arange(4).expand_as(order))
    codes = (order * torch.tensor([64, 16, 4, 1])).sum(-1).unique(return_inverse=True)[1]
    assert codes.max() == 23
    assert 1e-3 < uniform_p_value(codes, 24) < 1 - 1e-3


def test_strengths_and_shares_follow_the_augmentation():
    augmentation = PatchAugmentation(50, jitter=(0.4, 0.3, 1.5, 0.2))
    params = BatchMultiPatch.from_augmentation(augmentation).sample(400, 32, 32, generator())
    drawn = [*params.factors.unbind(-1), params.sigma]
    ranges = [(0.6, 1.4), (0.7, 1.3), (0.0, 2.5), (-0.2, 0.2), (0.1, 2.0)]
    for values, (low, high) in zip(drawn, ranges):
        unit = ((values.double() - low) / (high - low)).flatten().numpy()
        assert scipy.stats.kstest(unit, "uniform").pvalue > 1e-3
    for name, share in dict(flip=0.5, jitter=0.8, grey=0.2, blur=0.1, solarize=0.1).items():
        happened = int(getattr(params, name).sum())
        assert scipy.stats.binomtest(happened, 20000, share).pvalue > 1e-3, name


@pytest.mark.parametrize(
    "augmentation",
    [
        PatchAugmentation(7, 16, 16),
        PatchAugmentation(7, 16, 32),
        PatchAugmentation(7, None, 32, scale=(0.1, 1), ratio=(0.75, 1.33), interpolation="bicubic"),
    ],
    ids=str,
)
def test_same_patches_however_the_batch_is_split(augmentation):
    source = random_images(12)
    transform = BatchMultiPatch.from_augmentation(augmentation)
    whole = transform(source, generator(5))
    assert torch.equal(whole, transform(source, generator(5)))
    assert not torch.equal(whole, transform(source, generator(6)))
    params = transform.sample(12, 32, 32, generator(5))
    for patches, images in itertools.product(
        [slice(0, 7), slice(0, 1), slice(1, 4), slice(4, None)],
        [slice(0, 12), slice(0, 5), slice(5, 6), slice(6, 12)],
    ):
        part = transform.make(source[images], params.select(patches, images))
        # The last bit may depend on how a matrix product is tiled.
        torch.testing.assert_close(part, whole[patches, images], rtol=0, atol=2e-6)


def test_block_size_does_not_matter(monkeypatch):
    transform, source = BatchMultiPatch(9, 16, 24), random_images()
    whole = transform(source, generator())
    for size in (1, 30000, 2**30):
        monkeypatch.setattr("emp_plugin.transforms.batch.CPU_BLOCK_BYTES", size)
        torch.testing.assert_close(transform(source, generator()), whole, rtol=0, atol=2e-6)


def test_global_generator_by_default():
    transform, source = BatchMultiPatch(2, 16, 16), random_images()
    torch.manual_seed(3)
    first = transform(source)
    torch.manual_seed(3)
    assert torch.equal(first, transform(source))


def test_layout_autocast_and_input():
    transform, source = BatchMultiPatch(4, 16, 32), random_images()
    before = source.clone()
    patches = transform(source, generator())
    assert torch.equal(source, before)
    assert patches.shape == (4, 8, 3, 32, 32)
    assert patches.dtype == torch.float32
    flat = patches.flatten(0, 1)
    assert flat.data_ptr() == patches.data_ptr()
    assert flat.is_contiguous(memory_format=torch.channels_last)
    as_channels_last = source.contiguous(memory_format=torch.channels_last)
    assert torch.equal(transform(as_channels_last, generator()), patches)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(transform(source, generator()), patches)
    assert not transform.state_dict()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("patch_size", [16, None])
def test_cuda_equals_cpu_without_synchronisation(patch_size):
    transform, source = BatchMultiPatch(6, patch_size, 32), random_images()
    wanted = transform(source, generator())
    on_device = source.cuda()
    transform(on_device, generator())  # the first call may load kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = transform(on_device, generator())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(made.cpu(), wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 32, 32), "uint8"),
        (torch.zeros(2, 1, 32, 32, dtype=torch.uint8), "uint8"),
        (torch.zeros(3, 32, 32, dtype=torch.uint8), "uint8"),
        (torch.zeros(0, 3, 32, 32, dtype=torch.uint8), "at least 1"),
        (torch.zeros(2, 3, 12, 32, dtype=torch.uint8), "patch_size 16 does not fit .* at most 12"),
    ],
)
def test_refuses_images(images, message):
    with pytest.raises(ValueError, match=message):
        BatchMultiPatch()(images)


def test_refuses_parameters_of_another_batch():
    transform = BatchMultiPatch()
    with pytest.raises(ValueError, match=r"for 5 images, the batch has 8.*select"):
        transform.make(random_images(8), transform.sample(5, 32, 32))

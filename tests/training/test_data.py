import random
from types import SimpleNamespace

import pytest
import torch

from emp_plugin.data import StepSampler, make_views
from emp_plugin.data.batches import EvaluationDataset, StepDataset, normalise
from emp_plugin.data.image_views import ViewDataset
from emp_plugin.training.data import PretrainData, image_transform
from emp_plugin.transforms import BatchMultiPatch


def steps(num_images=23, batch_size=4, seed=3, position=(0, 0), **kwargs):
    return list(StepSampler(num_images, batch_size, seed, lambda: position, **kwargs))


def test_an_epoch_visits_every_image_once_in_a_new_order():
    first, second = steps(num_images=24), steps(num_images=24, position=(1, 0))
    for epoch in (first, second):
        assert torch.cat([step.indices for step in epoch]).sort().values.tolist() == list(range(24))
    assert not torch.equal(first[0].indices, second[0].indices)
    assert not torch.equal(first[0].indices, steps(num_images=24, seed=4)[0].indices)
    # the incomplete batch is dropped
    assert len(steps(num_images=23)) == len(StepSampler(23, 4, 0, None)) == 5


def test_a_continued_epoch_is_the_rest_of_the_uninterrupted_one():
    whole, rest = steps(), steps(position=(0, 3))
    assert [s.step for s in rest] == [3, 4]
    assert all(torch.equal(a.indices, b.indices) for a, b in zip(whole[3:], rest))


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_the_global_batch(world_size):
    """Disjoint slices that in order make the one process's batch; their patches are its patches."""
    single = steps(batch_size=8, num_images=40)
    size = 8 // world_size
    shares = [
        steps(batch_size=size, num_images=40, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    images = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8)
    views = [BatchMultiPatch(num_patches=3, patch_size=8, output_size=8)]
    for together, *apart in zip(single, *shares):
        assert torch.equal(together.indices, torch.cat([share.indices for share in apart]))
        (expected,), *got = (
            make_views(views, images[step.indices], step, seed=1, global_batch=8)
            for step in (together, *apart)
        )
        torch.testing.assert_close(torch.cat([made for (made,) in got], 1), expected)


def test_views_depend_on_seed_epoch_and_step_alone():
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    views = [
        BatchMultiPatch(num_patches=2, patch_size=8, output_size=8),
        BatchMultiPatch(num_patches=1, patch_size=16, output_size=16),
    ]
    step = steps(batch_size=4)[0]
    once = make_views(views, images, step, 0, 4)
    torch.rand(100)  # the global generator must not matter
    again = make_views(views, images, step, 0, 4)
    assert [x.shape for x in once] == [(2, 4, 3, 8, 8), (1, 4, 3, 16, 16)]
    assert all(torch.equal(a, b) for a, b in zip(once, again))
    for other in (
        make_views(views, images, step, 1, 4),
        make_views(views, images, step._replace(step=1), 0, 4),
        make_views(views, images, step._replace(epoch=1), 0, 4),
    ):
        assert not torch.equal(once[0], other[0])


def test_two_augmentations_draw_different_crops():
    """Of the same images, with the same settings: the second is no copy of the first."""
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    views = [BatchMultiPatch(num_patches=1, patch_size=8, output_size=8) for _ in range(2)]
    first, second = make_views(views, images, steps(batch_size=4)[0], 0, 4)
    assert not any(torch.equal(a, b) for a, b in zip(first[0], second[0]))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_reach_the_method_in_solo_learn_s_form(digits, monkeypatch, num_workers):
    monkeypatch.setattr("emp_plugin.training.data.batches_trained", lambda trainer: 0)
    mean, std = (0.2, 0.5, 0.6), (0.3, 0.25, 0.4)
    views = [BatchMultiPatch(num_patches=3, patch_size=16, output_size=16, mean=mean, std=std)]
    data = PretrainData(*digits, views, 8, 0, num_workers, stacked=True)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    data.trainer = SimpleNamespace(
        limit_train_batches=1.0, global_rank=0, world_size=1, strategy=strategy
    )
    loader = data.train_dataloader()
    batch = next(iter(loader))
    assert batch.images.dtype == torch.uint8
    assert len(loader) == len(digits[0]) // 8
    indices, x, targets = data.on_after_batch_transfer(batch, 0)
    assert x.shape == (3, 8, 3, 16, 16)
    assert torch.equal(digits[0].targets[indices], targets)
    data.stacked = False
    x = data.on_after_batch_transfer(batch, 0)[1]
    assert [view.shape for view in x] == [(8, 3, 16, 16)] * 3
    validation = [data.on_after_batch_transfer(batch, 0) for batch in data.val_dataloader()]
    # the incomplete last batch counts
    assert torch.equal(torch.cat([y for _, y in validation]), digits[1].targets)
    expected = normalise(digits[1].images[:256], mean, std)
    torch.testing.assert_close(validation[0][0], expected)


def test_normalise():
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    got = normalise(images, (0.0, 0.5, 0.2), (1.0, 0.25, 0.1))
    assert got.flatten().tolist() == pytest.approx([0, 2, 0], abs=1e-6)


def test_datasets_fetch_whole_batches(digits):
    train, test = digits
    step = steps(num_images=len(train))[0]
    batch = StepDataset(train).__getitems__(step)
    assert torch.equal(batch.images, train.images[step.indices])
    assert torch.equal(EvaluationDataset(test).__getitems__([2, 0])[1], test.targets[[2, 0]])


def test_views_of_images_depend_on_seed_and_place_alone(digits):
    """And leave the random state of the process as it was."""
    views = [
        BatchMultiPatch(
            num_patches=2,
            patch_size=None,
            output_size=20,
            ratio=(3 / 4, 4 / 3),
            interpolation="bicubic",
            blur_prob=0.5,
        ),
        BatchMultiPatch(num_patches=1, patch_size=16, output_size=16),
    ]
    whole, *_ = steps(batch_size=8, num_images=40)
    half, *_ = steps(batch_size=4, num_images=40, rank=1, world_size=2)
    before = torch.get_rng_state(), random.getstate()
    transforms = [image_transform(view.augmentation) for view in views]
    batch, part = (
        ViewDataset(digits[0], transforms, seed=1).__getitems__(step) for step in (whole, half)
    )
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert [x.shape for x in batch.images] == [(2, 8, 3, 20, 20), (1, 8, 3, 16, 16)]
    # a process's slice of the global batch
    assert all(torch.equal(a[:, 4:], b) for a, b in zip(batch.images, part.images))
    for other in (
        ViewDataset(digits[0], transforms, seed=2).__getitems__(whole),
        ViewDataset(digits[0], transforms, seed=1).__getitems__(whole._replace(step=1)),
    ):
        assert not torch.equal(batch.images[0], other.images[0])

"""Stages of a run: other numbers and sizes of patches, early and late."""

import pytest

from emp_plugin.config import stages, views_per_image
from emp_plugin.errors import UserError
from emp_plugin.methods import EMP
from emp_plugin.training.flops import training_flops
from support.runs import TINY_EMP, pretrain

SETTINGS = (*TINY_EMP, "data.patch_size=8", "data.output_size=8")
EARLY, LATE = ("augmentations.0.num_crops=2",), ("augmentations.0.num_crops=6",)
SMALL, LARGE = ("augmentations.0.crop_size=8",), ("augmentations.0.crop_size=16",)
BOTH = ("augmentations.0.num_crops=[2,6]", "augmentations.0.crop_size=[8,16]")


def test_each_stage_has_its_patches(tmp_path, monkeypatch):
    """Of two epochs of three steps, the fourth step is the first of the second half."""
    shapes, step = [], EMP.training_step

    def note(self, batch, batch_idx):
        if len(batch[0]) == 4:  # not the steps that are made to count FLOPs
            shapes.append(tuple(batch[1].shape))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(EMP, "training_step", note)
    few = ("optimizer.batch_size=4", "limit_train_batches=3", "limit_val_batches=0", "max_epochs=2")
    assert pretrain(tmp_path, *SETTINGS, *BOTH, *few, "evaluation.enabled=False") == 0
    assert shapes == [(2, 4, 3, 8, 8)] * 3 + [(6, 4, 3, 16, 16)] * 3


def test_flops_and_patches_are_means_of_the_stages(config):
    both = config("digits/emp", *SETTINGS, *BOTH)
    early = config("digits/emp", *SETTINGS, *EARLY, *SMALL)
    late = config("digits/emp", *SETTINGS, *LATE, *LARGE)
    assert stages(both) == [*stages(early), *stages(late)]
    assert views_per_image(both) == 4
    mean = (training_flops(early) + training_flops(late)) / 2
    assert training_flops(both) == pytest.approx(mean, abs=1)


@pytest.mark.parametrize(
    "wrong",
    [
        ["augmentations.0.num_crops=[2,6]", "augmentations.0.crop_size=[8,8,16]"],
        ["augmentations.0.num_crops=[]"],
        ["augmentations.0.num_crops=[2,6]", "data.views=image"],
        ["augmentations.0.patch_size=[8,64]"],
    ],
)
def test_impossible_stages_are_named(config, wrong):
    with pytest.raises(UserError, match="augmentations|patch_size"):
        config("digits/emp", *SETTINGS, *wrong)

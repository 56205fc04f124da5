"""Which runs the paper's figures may stand beside."""

import pytest

from emp_plugin.studies.paper import paper_name
from support import SCRIPTS


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("cifar/emp", [], "EMP-SSL 20 patches"),
        (
            "cifar/emp",
            [
                "data.num_patches=200",
                "method_kwargs.patch_chunk=20",
                "data.dataset=cifar100",
                "max_epochs=10",
            ],
            "EMP-SSL 200 patches",
        ),
        (
            "cifar/emp",
            ["devices=2", "optimizer.batch_size=50", "precision=32", "data.views=image"],
            "EMP-SSL 20 patches",
        ),
        ("cifar/byol", ["max_epochs=1"], "BYOL"),
        ("tiny-imagenet/emp", ["data.num_patches=200"], "EMP-SSL 200 patches"),
    ],
)
def test_the_papers_name_is_of_its_own_settings(config, name, overrides, expected):
    assert paper_name(config(name, *overrides), folder_of(name)) == expected


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("cifar/emp", ["data.num_patches=8"]),
        ("cifar/emp", ["augmentations=emp_crop_grey"]),
        ("cifar/emp_crop_grey", []),
        ("cifar/emp_native", []),
        ("cifar/emp", ["data.patch_size=24"]),
        ("cifar/emp", ["method_kwargs.invariance_weight=100"]),
        ("cifar/emp", ["method_kwargs.eps=0.4"]),
        ("cifar/emp", ["method_kwargs.preset=paper"]),
        ("cifar/emp", ["optimizer.batch_size=50"]),
        ("cifar/emp", ["optimizer.lr=0.1"]),
        ("cifar/emp", ["evaluation.linear.epochs=10"]),
        ("cifar/emp", ["backbone.name=resnet50"]),
        ("cifar/emp", ["data.fraction=0.2"]),
        ("cifar/emp", ["data.holdout=0.1"]),
        ("cifar/byol", ["max_epochs=1", "augmentations=crop_grey"]),
        ("cifar/byol", ["max_epochs=1", "momentum.base_tau=0.9"]),
        ("cifar/simclr", ["max_epochs=1", "scheduler.warmup_epochs=0"]),
        ("tiny-imagenet/byol", ["max_epochs=1"]),
        ("digits/emp", ["data.num_patches=20"]),
    ],
)
def test_the_paper_has_no_run_of_other_settings(config, name, overrides):
    assert paper_name(config(name, *overrides), folder_of(name)) == ""


def folder_of(name):
    return SCRIPTS / "pretrain" / name.split("/")[0]

"""EMP with other backbones than the recipes' ResNet-18, from training to evaluation."""

import json

import pytest
import torch

from emp_plugin import cli
from emp_plugin.errors import UserError
from support.runs import TINY_EMP, pretrain, the_run

SETTINGS = [
    *TINY_EMP,
    "optimizer.batch_size=8",
    "data.holdout=0.03",
    "data.fraction=0.03",
    "limit_train_batches=2",
    "max_epochs=1",
    "evaluation.probes=[knn]",
    "evaluation.references=False",
]
VIT = [
    "backbone.name=vit_tiny",
    "backbone.kwargs={patch_size: 8}",
    "backbone.stem_padding=null",
    "data.image_size=32",
]
BAG = ["evaluation.views=[bag]", "limit_val_batches=0"]


@pytest.mark.parametrize(
    ("settings", "width", "views"),
    [
        (["backbone.name=resnet50"], 2048, ["whole", "dense"]),
        ([*VIT, *BAG], 192, ["bag"]),
        ([*VIT, "data.output_size=32"], 192, ["whole", "bag"]),
    ],
)
def test_a_run_from_training_to_evaluation(tmp_path, settings, width, views, capsys):
    assert pretrain(tmp_path, *SETTINGS, *settings) == 0
    run = the_run(tmp_path)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 2
    assert [(row["features"], row["view"]) for row in summary["evaluation"]] == [
        (name, view) for view in views for name in ("backbone", "embedding")
    ]
    state = torch.load(run / "last.ckpt", weights_only=True)["state_dict"]
    assert state["classifier.weight"].shape[1] == width
    if views == ["bag"]:
        assert cli.main(["probe", str(run / "last.ckpt")]) == 1
        message = "cannot take whole images of 32x32: set evaluation.views=[bag]"
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            VIT,
            "vit_tiny is built for 16x16 pixels and cannot take whole images of 32x32: "
            "set evaluation.views=\\[bag\\]",
        ),
        ([*VIT, "evaluation.views=[bag]"], "limit_val_batches=0"),
        (
            [*VIT, *BAG, "backbone.kwargs={img_size: 24, patch_size: 8}"],
            "built for 24x24 pixels, but views have 16x16",
        ),
    ],
)
def test_sizes_that_do_not_fit_a_transformer(config, settings, message):
    with pytest.raises(UserError, match=message):
        config("digits/emp", *settings)

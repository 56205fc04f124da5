"""On which images a checkpoint is probed, and where its rows go."""

import pytest

from emp_plugin.config import Probe, check_config
from emp_plugin.errors import UserError
from emp_plugin.training import probing


def probe_of(**settings):
    return check_config({"pretrained_feature_extractor": "last.ckpt", **settings}, Probe)


@pytest.mark.parametrize(
    ("trained", "given", "expected"),
    [
        ({"val_path": "v"}, {}, {"train_path": "t", "val_path": "v", "holdout": 0.0}),
        ({"holdout": 0.1}, {"fraction": 0.5}, {"train_path": "t", "holdout": 0.1, "fraction": 0.5}),
        (
            {"val_path": "v"},
            {"train_path": "u", "holdout": 0.2},
            {"train_path": "u", "val_path": None, "holdout": 0.2},
        ),  # v is of t's classes
        (
            {"holdout": 0.1},
            {"train_path": "u", "val_path": "w"},
            {"train_path": "u", "val_path": "w", "holdout": 0.0},
        ),  # not a tenth of u
        ({"holdout": 0.1}, {"val_path": "w", "holdout": 0.2}, {"val_path": "w", "holdout": 0.2}),
        ({"image_size": 48}, {"fraction": 0.5}, {"image_size": 48}),
        ({"image_size": 48}, {"dataset": "digits"}, {"dataset": "digits", "image_size": None}),
        ({"image_size": 48}, {"dataset": "digits", "image_size": 16}, {"image_size": 16}),
    ],
)
def test_what_is_given_takes_the_place_of_the_checkpoints_data(
    config, monkeypatch, trained, given, expected
):
    cfg, asked = (
        config(
            "custom/emp",
            "data.train_path=t",
            *(f"data.{key}={value}" for key, value in trained.items()),
        ),
        [],
    )
    monkeypatch.setattr(probing, "load_method", lambda path: (None, cfg, {}))
    monkeypatch.setattr(probing, "load_data", lambda data: asked.append(data) or (None, None))
    with pytest.raises(UserError, match="nothing to probe"):
        probing.probe_checkpoint(probe_of(data=given))
    assert {key: getattr(asked[0], key) for key in expected} == expected


def test_patches_larger_than_the_other_images_are_named_before_anything_is_probed(
    config, digits, monkeypatch
):
    cfg = config("custom/emp", "data.train_path=t", "data.patch_size=48", "data.scale=null")
    monkeypatch.setattr(probing, "load_method", lambda path: (None, cfg, {}))
    monkeypatch.setattr(probing, "load_data", lambda data: digits)
    with pytest.raises(
        UserError,
        match="patches of 48x48 pixels, as last.ckpt was trained on, do not fit into images of "
        "32x32: set evaluation.views",
    ):
        probing.probe_checkpoint(probe_of(data={"dataset": "digits"}))


def test_what_differs_in_an_evaluation_has_a_file_of_its_own():
    def name(**values):
        return probing._evaluation_name(probe_of(evaluation=values).evaluation)

    assert name() == "standard"
    assert name(protocol="quick") == "quick"
    views = {"views": ["whole", "bag"], "probes": ["knn"]}
    assert name(**views) == "knn-whole-bag-16plain"
    assert name(**views, bag_patches=4, bag_augmented=True) == "knn-whole-bag-4augmented"
    others = [
        {"linear": {"epochs": 10}},
        {"linear": {"epochs": 20}},
        {"mlp": {"hidden": 64}},
        {"dense_scale": 1.5},
        {"label_fractions": [0.1]},
    ]
    names = [name(**other) for other in others]
    assert len({"standard", *names}) == 6
    assert name(dense_scale=1.5) == names[3]

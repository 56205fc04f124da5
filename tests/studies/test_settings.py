"""Settings of a study: whose they are, which are refused, and those of the shipped studies."""

import shlex
from operator import attrgetter

import pytest

from emp_plugin import cli
from emp_plugin.config import to_dict
from emp_plugin.errors import UserError
from emp_plugin.studies.plan import plan
from emp_plugin.studies.recipes import reference_inputs
from emp_plugin.studies.settings import read_comparison
from support import SCRIPTS


def read(*overrides, name="digits"):
    return read_comparison(name, list(overrides))


@pytest.mark.parametrize(
    ("name", "recipes"),
    [
        ("digits", "digits"),
        ("cifar10", "cifar"),
        ("cifar100", "cifar"),
        ("tiny-imagenet", "tiny-imagenet"),
        ("imagenet100", "imagenet100"),
        ("custom", "custom"),
    ],
)
def test_shipped_comparisons_are_of_all_six(name, recipes, config):
    cfg, rest = read(name=name)
    assert cfg.recipes == recipes
    assert len(cfg.methods) == 6
    assert rest == []
    assert list(cfg.overrides) == ([f"data.dataset={name}"] if recipes == "cifar" else [])
    read_recipes = [config(f"{recipes}/{method}", *cfg.overrides) for method in cfg.methods]
    assert {recipe.data.dataset for recipe in read_recipes} == {name}


def test_crop_and_grey_alone_stand_beside_the_whole_augmentation(config):
    cfg, _ = read("methods=[emp,emp_crop_grey]", name="cifar10")
    full, crop = (to_dict(config(f"cifar/{trial.method}")) for trial in plan(cfg))
    assert {key for key in full if full[key] != crop[key]} == {"name", "augmentations"}
    off = ("horizontal_flip", "color_jitter", "gaussian_blur", "solarization")
    assert crop["augmentations"] == [
        {key: value for key, value in full["augmentations"][0].items() if key not in off}
    ]


@pytest.mark.parametrize("augmented", [False, True])
def test_methods_with_the_same_crops_share_their_references(config, augmented):
    """Colours are a bag's only if it is augmented; VICReg's crops are larger."""
    setting = f"evaluation.bag_augmented={augmented}"
    bags = {
        name: reference_inputs(config(f"cifar/{name}", setting, "evaluation.views=[bag]"))
        for name in ("simclr", "swav", "byol", "ressl", "vicreg")
    }
    assert bags["simclr"] == bags["swav"]
    assert bags["vicreg"] not in (bags["simclr"], bags["byol"])
    assert augmented or bags["simclr"] == bags["ressl"]
    assert (bags["simclr"] == bags["byol"]) is not augmented


def test_references_are_of_a_scale_and_a_normalisation(config):
    def inputs(name, *overrides):
        return reference_inputs(config(f"cifar/{name}", *overrides))

    assert inputs("simclr") == inputs("byol") == inputs("swav")
    assert inputs("vicreg") != inputs("simclr")  # its crops are larger, the scale of dense smaller
    whole = "evaluation.views=[whole]"
    assert inputs("vicreg", whole) == inputs("simclr", whole)
    assert inputs("emp", whole) != inputs("simclr", whole)  # mean and deviation of one half
    assert inputs("simclr", "evaluation.dense_scale=2") != inputs("simclr")
    assert inputs("simclr", "evaluation.references=False") == inputs("simclr")
    assert inputs("simclr", "evaluation.probes=[knn]") != inputs("simclr")
    sizes = ("augmentations.0.crop_size=24", "augmentations.0.patch_size=null")
    with pytest.raises(UserError, match="several sizes.*set evaluation.dense_scale"):
        inputs("byol", *sizes)


def test_own_settings_and_those_of_the_recipes():
    cfg, rest = read(
        "methods=[emp,byol]",
        "epochs=0.5",
        "seeds=[0,1,2]",
        "emp.data.num_patches=4",
        "precision=32",
        "schedule=[fitted,snapshot]",
        "epochs=[1,2]",
    )
    assert list(cfg.methods) == ["emp", "byol"]
    assert list(cfg.seeds) == [0, 1, 2]
    assert list(cfg.schedule) == ["fitted", "snapshot"]
    assert rest == ["emp.data.num_patches=4", "precision=32"]
    assert list(read("epochs=0.5")[0].epochs) == [0.5]  # a list of one without brackets


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["budget=hours"], "budget must be one of"),
        (["schedule=cosine"], "schedule knows"),
        (["budget=minutes", "minutes=[]"], "minutes=\\[...\\]"),
        (["epochs=[0]"], "all positive"),
        (["budget=flops", "schedule=snapshot"], "leave budget at epochs"),
        (["schedule=snapshot", "epochs=[0.5]"], "whole epochs"),
        (["seeds=[a]"], "digits: "),
        (["methods=[]"], "must not be empty"),
        (["evaluate_every=0"], "evaluate_every is a number of epochs"),
        (["evaluate_every=often"], "could not be converted to Float"),
        (["ablate=data.num_patches"], "needs both"),
        (["ablate=data.num_patches", "values=[few,many]"], "must be numbers"),
    ],
)
def test_mistakes_are_named(overrides, message):
    with pytest.raises(UserError, match=message):
        read(*overrides)


def test_a_study_that_is_not_there():
    with pytest.raises(UserError, match="no study 'imagenet'.*imagenet100, custom"):
        read(name="imagenet")
    with pytest.raises(UserError, match="my.yaml is not a file"):
        read(name="nowhere/my.yaml")


def test_a_study_of_ones_own(tmp_path):
    (tmp_path / "mine.yaml").write_text("recipes: digits\nmethods: emp\n")
    cfg, rest = read("epochs=2", "optimizer.lr=1", name=str(tmp_path / "mine.yaml"))
    assert (cfg.recipes, list(cfg.methods), list(cfg.epochs)) == ("digits", ["emp"], [2])
    assert (cfg.results_dir, rest) == ("outputs/compare-mine", ["optimizer.lr=1"])


@pytest.mark.parametrize("name", ["patches", "batch_size"])
def test_the_shipped_ablations(name, config, monkeypatch):
    """What the script hands over, with a setting of the user's.

    Every value gives a recipe that differs in that setting alone.
    """
    script = (SCRIPTS / "ablation" / f"{name}.sh").read_text().replace('"$@"', "")
    _, _, arguments = script.partition('/bin/emp" ')
    asked = []
    monkeypatch.setattr("emp_plugin.studies.run.compare", lambda *what: asked.append(what))
    assert cli.main([*shlex.split(arguments), "optimizer.lr=0.1"]) == 0
    ((cfg, _, rest),) = asked
    assert rest == ["optimizer.lr=0.1"]
    assert cfg.results_dir == f"outputs/ablation-{cfg.ablate}"
    assert len(cfg.values) > 2
    for trial in plan(cfg):
        recipe = config(f"{cfg.recipes}/{trial.method}", *cfg.overrides, *trial.override)
        assert recipe.method == "emp"
        assert recipe.data.fraction == 0.2
        assert attrgetter(cfg.ablate)(recipe) == float(trial.override[0].split("=")[1])


def test_an_ablation_on_images_of_ones_own(config):
    """The README's."""
    items = [
        "ablate=data.num_patches",
        "values=[2,5]",
        "recipes=custom",
        "overrides=[]",
        "methods=[emp]",
        "data.train_path=photos",
        "data.holdout=0.1",
        "results_dir=outputs/patches-photos",
    ]
    cfg, rest = read_comparison("ablation", items)
    recipes = [
        config(f"{cfg.recipes}/{trial.method}", *cfg.overrides, *rest, *trial.override)
        for trial in plan(cfg)
    ]
    assert [
        (recipe.data.dataset, recipe.data.fraction, recipe.data.num_patches) for recipe in recipes
    ] == [("custom", -1, 2), ("custom", -1, 5)]

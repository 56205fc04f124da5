import shlex

import pytest
from omegaconf import OmegaConf

from emp_plugin.errors import UserError
from emp_plugin.studies.plan import (
    Job,
    describe_length,
    plan,
    split_steps,
    steps_for_passes,
    views_per_image,
)
from emp_plugin.studies.run import evaluated
from emp_plugin.studies.settings import read_comparison
from support import SCRIPTS


def read(*overrides, name="digits"):
    return read_comparison(str(SCRIPTS / "compare"), name, list(overrides))


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
    assert {
        config(f"{recipes}/{method}", *cfg.overrides).data.dataset for method in cfg.methods
    } == {name}


def test_crop_and_grey_alone_stand_beside_the_whole_augmentation(config):
    full, crop = (
        OmegaConf.to_container(config(f"cifar/{job.method}"))
        for job in plan(read("methods=[emp,emp_crop_grey]", name="cifar10")[0])
    )
    assert {key for key in full if full[key] != crop[key]} == {"name", "augmentations"}
    off = ("horizontal_flip", "color_jitter", "gaussian_blur", "solarization")
    assert crop["augmentations"] == [
        {key: value for key, value in full["augmentations"][0].items() if key not in off}
    ]


@pytest.mark.parametrize("augmented", [False, True])
def test_methods_with_the_same_crops_share_their_references(config, augmented):
    """Colours are a bag's only if it is augmented; VICReg's crops are larger."""
    bags = {
        name: evaluated(config(f"cifar/{name}", f"evaluation.bag_augmented={augmented}"), "bag")
        for name in ("simclr", "swav", "byol", "ressl", "vicreg")
    }
    assert bags["simclr"] == bags["swav"]
    assert bags["vicreg"] not in (bags["simclr"], bags["byol"])
    assert augmented or bags["simclr"] == bags["ressl"]
    assert (bags["simclr"] == bags["byol"]) is not augmented


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
        (["budget=passes", "schedule=snapshot"], "leave budget at epochs"),
        (["schedule=snapshot", "epochs=[0.5]"], "whole epochs"),
        (["seeds=[a]"], "digits.yaml: "),
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


def test_missing_file():
    with pytest.raises(UserError, match="is not a file"):
        read(name="imagenet")


def test_plan_has_short_runs_first_and_methods_side_by_side():
    jobs = plan(read("methods=[emp,byol]", "seeds=[0,1]", "epochs=[3,1]")[0])
    assert [(job.length, job.seed, job.method) for job in jobs] == [
        (length, seed, method) for length in (1, 3) for seed in (0, 1) for method in ("emp", "byol")
    ]
    jobs = plan(read("methods=[emp]", "epochs=[1,10]", "schedule=[fitted,snapshot]")[0])
    assert jobs == [
        Job("emp", 0, "snapshot", "epochs", 10, (1, 10)),
        Job("emp", 0, "fitted", "epochs", 1, (1,)),
        Job("emp", 0, "fitted", "epochs", 10, (10,)),
    ]


def test_plan_of_an_ablation():
    jobs = plan(
        read(
            "methods=[emp]",
            "ablate=data.num_patches",
            "values=[2,5]",
            "budget=[epochs,minutes]",
            "minutes=2",
            "epochs=1",
        )[0]
    )
    assert [(job.budget, job.length, job.override) for job in jobs] == [
        (budget, length, (f"data.num_patches={n}",))
        for budget, length in (("epochs", 1), ("minutes", 2))
        for n in (2, 5)
    ]
    assert str(jobs[1]) == "emp, data.num_patches=5, seed 0, 1 epoch, schedule fitted"


@pytest.mark.parametrize("name", ["patches", "batch_size"])
def test_the_shipped_ablations(name, config):
    """What the script hands over, with a setting of the user's; every value gives a recipe that differs in that setting alone."""
    *_, line = (SCRIPTS / "ablation" / f"{name}.sh").read_text().replace('"$@"', "").splitlines()
    cfg, rest = read_comparison(
        str(SCRIPTS / "ablation"), "cifar10", [*shlex.split(line), "optimizer.lr=0.1"]
    )
    assert rest == ["optimizer.lr=0.1"]
    assert cfg.results_dir == f"results/ablation-{cfg.ablate}"
    assert len(cfg["values"]) > 2
    for job in plan(cfg):
        recipe = config(f"{cfg.recipes}/{job.method}", *cfg.overrides, *job.override)
        assert recipe.method == "emp"
        assert recipe.data.fraction == 0.2
        assert OmegaConf.select(recipe, cfg.ablate) == float(job.override[0].split("=")[1])


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
    ]
    cfg, rest = read_comparison(
        str(SCRIPTS / "ablation"), "cifar10", [*items, "results_dir=results/patches-photos"]
    )
    recipes = [
        config(f"{cfg.recipes}/{job.method}", *cfg.overrides, *rest, *job.override)
        for job in plan(cfg)
    ]
    assert [
        (recipe.data.dataset, recipe.data.fraction, recipe.data.num_patches) for recipe in recipes
    ] == [("custom", -1, 2), ("custom", -1, 5)]


@pytest.mark.parametrize("steps", [1, 7, 194.6, 195, 196, 390, 391, 1000, 12345])
def test_split_steps_comes_near(steps):
    epochs, limit = split_steps(steps, 195)
    assert 1 <= limit <= 195
    assert abs(epochs * limit - steps) <= epochs / 2 + 0.5
    assert epochs == 1 or (epochs - 1) * 195 < steps + 1  # no more epochs than it takes


def test_equal_passes(config):
    emp, byol = config("cifar/emp"), config("cifar/byol")
    assert (views_per_image(emp), views_per_image(byol)) == (20, 2)
    steps = steps_for_passes(1, emp, byol, 50_000)
    assert steps * 256 * 2 == pytest.approx(500 * 100 * 20)
    assert steps_for_passes(1, emp, emp, 50_000) == 500


@pytest.mark.parametrize(
    ("budget", "length", "text"),
    [
        ("epochs", 1, "1 epoch"),
        ("epochs", 0.5, "0.5 epochs"),
        ("minutes", 5, "5 minutes of training"),
        ("passes", 1, "1 epoch of EMP-SSL in backbone passes"),
    ],
)
def test_lengths_in_words(budget, length, text):
    assert describe_length(budget, length) == text

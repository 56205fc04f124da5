"""Recipes of solo-learn 1.0.6 as our input, and ours as that of its main_pretrain.py."""

import importlib
import importlib.util
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from emp_plugin.config import augmentations, read_config, trainer_arguments
from emp_plugin.solo_learn import API, METHODS
from emp_plugin.training.probing import fresh_method
from support import SCRIPTS

BASELINES = ("simclr", "byol", "vicreg", "swav", "ressl")


@pytest.fixture
def theirs():
    """Folder of the recipes of 1.0.6: the one in use, or the checkout that SOLO_LEARN names."""
    root = Path(os.environ.get("SOLO_LEARN", "nowhere"))
    if API == "1.0.6":
        root = Path(importlib.util.find_spec("solo").origin).parents[1]
    if not (root / "scripts" / "pretrain" / "cifar").is_dir():
        pytest.skip("needs SOLO_LEARN=<checkout of solo-learn 1.0.6>")
    return root / "scripts" / "pretrain"


def read_theirs(folder, name):
    overrides = ["wandb.enabled=False", "accelerator=cpu", "strategy=auto"]
    return read_config(str(folder), name, overrides)


@pytest.mark.parametrize("name", BASELINES)
def test_we_read_their_recipes(theirs, name):
    cfg = read_theirs(theirs / "cifar", name)
    assert cfg.method == name
    assert (cfg.data.num_large_crops, cfg.data.num_small_crops) == (2, 0)
    assert {augmentation.output_size for augmentation in augmentations(cfg)} == {32}
    assert trainer_arguments(cfg)["devices"] == 1
    assert isinstance(fresh_method(cfg), METHODS[name])


@pytest.mark.parametrize(("folder", "ours"), [("cifar", "cifar"), ("imagenet-100", "imagenet100")])
@pytest.mark.parametrize("name", BASELINES)
def test_our_recipes_say_what_theirs_say(theirs, name, folder, ours):
    theirs = read_theirs(theirs / folder, name)
    ours = read_config(str(SCRIPTS / "pretrain"), f"{ours}/{name}", [])
    assert theirs.method_kwargs.items() - ours.method_kwargs.items() <= {
        ("base_tau_momentum", 0.99),
        ("final_tau_momentum", 1.0),
        ("momentum_classifier", None),
    }
    assert theirs.momentum == ours.momentum
    assert theirs.scheduler.warmup_epochs == ours.scheduler.warmup_epochs
    assert theirs.max_epochs == ours.max_epochs
    for key in ("name", "lr", "classifier_lr", "weight_decay"):
        assert getattr(theirs.optimizer, key) == getattr(ours.optimizer, key)
    assert theirs.optimizer.kwargs.items() <= ours.optimizer.kwargs.items()
    images = [cfg.optimizer.batch_size * len(cfg.devices) for cfg in (theirs, ours)]
    assert images[0] == images[1]
    alike = {"mean": (0.5,) * 3, "std": (0.5,) * 3}  # theirs are in the code
    made = [
        [replace(augmentation, **alike) for augmentation in augmentations(cfg)]
        for cfg in (theirs, ours)
    ]
    assert made[0] == made[1]


@pytest.mark.skipif(
    API != "1.0.6", reason="about solo-learn 1.0.6: SOLO_LEARN=<checkout> bash scripts/test.sh"
)
@pytest.mark.parametrize("name", BASELINES)
def test_main_pretrain_reads_our_recipes(name):
    """All that it reads of a recipe, before it makes datasets and a Trainer."""
    parse_cfg = importlib.import_module("solo.args.pretrain").parse_cfg
    pipeline = importlib.import_module("solo.data.pretrain_dataloader").build_transform_pipeline
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(SCRIPTS / "pretrain"), version_base="1.2"):
        cfg = compose(config_name=f"cifar/{name}")
    OmegaConf.set_struct(cfg, False)
    cfg = parse_cfg(cfg)
    made = [
        pipeline(cfg.data.dataset, entry)
        for entry in cfg.augmentations
        for _ in range(entry.num_crops)
    ]
    assert len(made) == cfg.data.num_large_crops == 2
    assert cfg.strategy == "auto"
    assert cfg.data.val_path
    assert cfg.checkpoint.enabled
    assert isinstance(METHODS[cfg.method](cfg), METHODS[name])

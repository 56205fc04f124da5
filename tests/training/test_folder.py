"""What tells one training from another."""

import json

import pytest

from emp_plugin.training import folder
from emp_plugin.training.folder import identity


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "data.num_workers=3",
        "data.train_path=elsewhere",
        "log_every_n_steps=7",
        "enable_progress_bar=False",
        "limit_val_batches=0",
        "checkpoint.dir=elsewhere",
        "evaluation.protocol=quick",
        "wandb.project=other",
    ],
)
def test_what_does_not_matter_to_a_training(config, override):
    assert identity(config("cifar/emp", override)) == identity(config("cifar/emp"))


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.lr=0.2",
        "seed=6",
        "max_epochs=2",
        "precision=16-mixed",
        "data.fraction=0.5",
        "data.num_patches=21",
        "method_kwargs.eps=0.3",
        "limit_train_batches=3",
    ],
)
def test_what_matters(config, override):
    assert identity(config("cifar/emp", override)) != identity(config("cifar/emp"))


def test_the_folder_of_own_images_matters(config):
    holdout = "data.holdout=0.1"
    here, there, busy = (
        config("custom/emp", holdout, f"data.train_path={path}", f"data.num_workers={workers}")
        for path, workers in (("a", 0), ("b", 0), ("a", 2))
    )
    assert identity(here) != identity(there)
    assert identity(here) == identity(busy)


def test_a_training_of_another_version_is_another(config, tmp_path, monkeypatch):
    """It is not continued: the folder says what it was when it began."""
    cfg = config("cifar/emp", f"checkpoint.dir={tmp_path}")
    before = identity(cfg)
    begun = folder.new_folder(cfg)
    with folder.claim(begun, cfg, 0, {}):
        pass
    assert folder.unfinished_folder(cfg) == begun
    monkeypatch.setattr(folder, "TRAINING_VERSION", folder.TRAINING_VERSION + 1)
    assert identity(cfg) != before
    assert folder.unfinished_folder(cfg) is None


def test_each_time_a_run_is_continued_is_noted(config, tmp_path):
    cfg = config("cifar/emp", f"checkpoint.dir={tmp_path}")
    begun = folder.new_folder(cfg)
    for times in (1, 2):
        with folder.claim(begun, cfg, 0, {}):
            pass
        assert len(folder.versions_of(begun)) == times
    older = folder.versions_of(begun)[0]
    (begun / "versions.json").write_text(json.dumps(older))
    assert folder.versions_of(begun) == [older]
    assert folder.identity_of(begun) == identity(cfg)


@pytest.mark.parametrize(
    ("name", "settings", "known"),
    [
        ("cifar/emp", [], "99c1182d9f2a"),
        ("cifar/byol", ["accumulate_grad_batches=2", "devices=2"], "8d4a2ad3f5cc"),
        ("digits/swav", ["limit_train_batches=0.5", "num_nodes=1"], "8d883640ada2"),
    ],
)
def test_an_identity_stays_what_it_was(config, monkeypatch, name, settings, known):
    """Runs and results that are there name it. Other numbers in a recipe make it another."""
    monkeypatch.setattr(folder, "TRAINING_VERSION", 1)
    assert identity(config(name, "precision=32", *settings)) == known

"""Runs on a user's own images: what is listed, what happens when it changes, what is counted."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from support.runs import TINY_EMP, at_step, pretrain, the_run

SETTINGS = [
    *TINY_EMP,
    "data.dataset=custom",
    "data.image_size=16",
    "data.patch_size=8",
    "data.output_size=8",
    "backbone.stem_padding=null",
    "optimizer.batch_size=8",
    "checkpoint.every_n_steps=1",
    "checkpoint.min_seconds=0",
    "evaluation.enabled=False",
    "max_epochs=1",
]


def write(folder: Path, number: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(number):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")


def stop(trainer):
    raise SystemError("killed")


def test_a_run_is_not_continued_on_other_images(tmp_path, monkeypatch, capsys):
    images, runs = tmp_path / "images", tmp_path / "runs"
    write(images, 32)
    settings = [*SETTINGS, f"data.train_path={images}"]
    with monkeypatch.context() as patch:
        at_step(patch, 2, stop)
        with pytest.raises(SystemError):
            pretrain(runs, *settings)
    removed = (images / "020.png").read_bytes()
    (images / "020.png").unlink()
    assert pretrain(runs, *settings) == 1
    message = capsys.readouterr().err
    assert "the training images changed" in message
    assert "32 images of 1 classes then, 31" in message
    assert "auto_resume.enabled=False" in message
    assert not list(runs.glob("*/*/summary.json"))
    (images / "020.png").write_bytes(removed)
    assert pretrain(runs, *settings) == 0
    assert json.loads((the_run(runs) / "summary.json").read_text())["steps"] == 4


def test_a_run_started_among_the_images_is_no_class(tmp_path, monkeypatch):
    for name in ("a", "b"):
        write(tmp_path / name, 20)
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        settings = ["data.train_path=.", "data.holdout=0.2", f"seed={seed}"]
        assert pretrain(Path("trained_models"), *SETTINGS, *settings) == 0
    for run in Path("trained_models").glob("*/*"):
        if run.is_dir():
            assert yaml.safe_load((run / "config.yaml").read_text())["data"]["num_classes"] == 2
            listed = json.loads((run / "data.json").read_text())
            assert listed["train"]["classes"] == ["a", "b"]
            assert listed["train"]["images"] == 32


def test_folders_that_are_no_classes(tmp_path, capsys):
    for name in ("2023/may", "2024/june"):
        write(tmp_path / "images" / name, 20)
    path = f"data.train_path={tmp_path / 'images'}"
    assert pretrain(tmp_path / "runs", *SETTINGS, path) == 1
    assert "data.no_labels=True" in capsys.readouterr().err
    assert pretrain(tmp_path / "runs", *SETTINGS, path, "data.no_labels=True") == 0
    summary = json.loads((the_run(tmp_path / "runs") / "summary.json").read_text())
    assert summary["images"] == 40


def test_other_files_and_rare_classes_are_named(tmp_path, capsys):
    (tmp_path / "dicom").mkdir()
    (tmp_path / "dicom" / "1.dcm").write_bytes(b"")
    assert pretrain(tmp_path, *SETTINGS, f"data.train_path={tmp_path / 'dicom'}") == 1
    assert "no images and no class folders (1 .dcm; read are .png" in capsys.readouterr().err
    write(tmp_path / "images" / "common", 30)
    write(tmp_path / "images" / "rare", 1)
    settings = [f"data.train_path={tmp_path / 'images'}", "data.holdout=0.2"]
    assert pretrain(tmp_path, *SETTINGS, *settings) == 1
    message = capsys.readouterr().err
    assert "have a single image, such as rare" in message
    assert "data.val_path" in message


def test_images_of_an_incomplete_last_step_are_counted_once(tmp_path):
    """9 batches in steps of 4, 4 and 1."""
    write(tmp_path / "images", 72)
    settings = [f"data.train_path={tmp_path / 'images'}", "accumulate_grad_batches=4"]
    assert pretrain(tmp_path / "runs", *SETTINGS, *settings) == 0
    summary = json.loads((the_run(tmp_path / "runs") / "summary.json").read_text())
    assert (summary["steps"], summary["images"], summary["patches"]) == (3, 72, 144)

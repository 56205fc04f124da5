"""Images that stay on disk, through the data module, the features and whole runs."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from emp_plugin import cli
from emp_plugin.data import ImageData, files, in_order, load_dataset
from emp_plugin.data.files import ImageFiles, read_image
from emp_plugin.errors import UserError
from emp_plugin.evaluation import View, extract_features, pixel_features
from emp_plugin.transforms import PatchAugmentation
from support.runs import TINY_EMP, pretrain, the_run

SETTINGS = [
    *TINY_EMP,
    "data.dataset=custom",
    "data.image_size=32",
    "optimizer.batch_size=8",
    "backbone.stem_padding=null",
    "evaluation.linear.epochs=2",
    "evaluation.bag_patches=2",
    "evaluation.views=[bag]",
    "max_epochs=1",
]


def write(folder, count, seed=0, size=(48, 40)):
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.random.default_rng([seed, i]).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.jpg")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """train/ and val/ of two classes."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 13), ("val", 4)):
        for seed, name in enumerate(("ant", "bee")):
            write(root / split / name, count, seed)
    return root


def test_images_on_disk_give_the_features_of_images_in_memory(folders):
    train, _ = load_dataset(
        "custom", str(folders / "train"), val_path=str(folders / "val"), image_size=32
    )
    assert isinstance(train, ImageFiles)
    memory = ImageData(train.read_all("reading"), train.targets, train.classes)
    for workers in (0, 2):
        assert torch.equal(torch.cat(list(in_order(train, 7, workers))), memory.images)
    layers = torch.nn.AvgPool2d(16), torch.nn.Flatten(), torch.nn.Linear(12, 5)
    network, crops = torch.nn.Sequential(*layers), PatchAugmentation(2, 16, 32)
    for view in (View("whole"), View("bag", crops, num_patches=3, augmented=True)):
        on_disk = extract_features(network, train, view)
        in_memory = extract_features(network, memory, view)
        assert torch.equal(on_disk.features["backbone"], in_memory.features["backbone"])
        assert torch.equal(on_disk.targets, train.targets)


def test_a_worker_that_dies_is_reported_with_its_image(folders, tmp_path, monkeypatch, capsys):
    def read_image(path, size, window, read=files.read_image):
        if path.endswith("bee/005.jpg"):
            os.kill(os.getpid(), signal.SIGKILL)  # as the system does when memory is short
        return read(path, size, window)

    monkeypatch.setattr(files, "read_image", read_image)
    paths = f"data.train_path={folders}/train", f"data.val_path={folders}/val"
    assert pretrain(tmp_path, *SETTINGS, *paths, "data.num_workers=2") == 1
    message = capsys.readouterr().err
    assert "a data worker died after step" in message
    assert f"reading {folders}/train/bee/005.jpg (" in message
    assert "Traceback" not in message


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named_in_one_line(tmp_path, capsys, workers):
    write(tmp_path / "flat", 9)
    (tmp_path / "flat" / "004.jpg").write_bytes(b"no image")
    images = f"data.train_path={tmp_path / 'flat'}"
    assert pretrain(tmp_path, *SETTINGS, images, f"data.num_workers={workers}") == 1
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if "error: " in line or "Traceback" in line]
    assert line.startswith(f"error: {tmp_path}/flat/004.jpg: not a readable image")


def test_pixels_of_large_images_are_averaged_down(folders):
    train, _ = load_dataset(
        "custom", str(folders / "train"), val_path=str(folders / "val"), image_size=64
    )
    pixels = pixel_features(train).features["pixels"]
    image = train.fetch(torch.tensor([3]))[0].double() / 255 * 2 - 1
    expected = image.view(3, 32, 2, 32, 2).mean((2, 4)).flatten()
    torch.testing.assert_close(pixels[3].double(), expected, atol=1e-5, rtol=0)


def test_a_run_on_class_folders_and_its_probe(folders, tmp_path):
    paths = f"data.train_path={folders}/train", f"data.val_path={folders}/val"
    assert pretrain(tmp_path, *SETTINGS, *paths, "data.num_workers=2") == 0
    run = the_run(tmp_path)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 3
    assert len(summary["evaluation"]) > 4
    settings = ["evaluation.views=[whole]", "evaluation.linear.epochs=1"]
    assert cli.main(["probe", str(run / "last.ckpt"), *settings]) == 0


def test_a_run_on_images_without_labels(tmp_path, capsys):
    write(tmp_path / "flat", 17)
    assert pretrain(tmp_path, *SETTINGS, f"data.train_path={tmp_path / 'flat'}") == 0
    assert "no labels" in capsys.readouterr().out
    run = the_run(tmp_path)
    assert json.loads((run / "summary.json").read_text())["evaluation"] == []
    metrics = pd.read_csv(run / "metrics.csv")
    assert metrics.train_loss.notna().all()
    assert metrics.train_acc1.isna().all()


@pytest.fixture(scope="module")
def tiny_imagenet(tmp_path_factory):
    """The layout of Tiny ImageNet as distributed, with two images of each class."""
    root = tmp_path_factory.mktemp("tiny-imagenet-200")
    for i in range(200):
        write(root / "train" / f"n{i:03}" / "images", 2, i, (64, 64))
    write(root / "val" / "images", 3, 999, (64, 64))
    rows = [f"{i:03}.jpg\tn{i:03}\t0\t0\t9\t9\n" for i in range(3)]
    (root / "val" / "val_annotations.txt").write_text("".join(rows))
    return root


def test_tiny_imagenet_is_read_into_memory(tiny_imagenet):
    train, test = load_dataset("tiny-imagenet", str(tiny_imagenet))
    assert isinstance(train, ImageData)
    assert train.images.shape == (400, 3, 64, 64)
    assert test.targets.tolist() == [0, 1, 2]
    third = read_image(tiny_imagenet / "train" / "n001" / "images" / "000.jpg", 64)
    assert torch.equal(train.images[2], third)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("emp", ["data.num_patches=2", "method_kwargs.embedding_dim=0"]),
        ("byol", ["method_kwargs.pred_hidden_dim=16"]),
    ],
)
def test_tiny_imagenet_s_recipes_run_to_the_end(tiny_imagenet, tmp_path, method, settings):
    small = [
        f"data.train_path={tiny_imagenet}",
        "method_kwargs.proj_hidden_dim=16",
        "method_kwargs.proj_output_dim=16",
        "optimizer.batch_size=16",
        "limit_train_batches=2",
        "max_epochs=1",
        "evaluation.references=False",
        "evaluation.probes=[knn]",
    ]
    assert pretrain(tmp_path, *small, *settings, recipe=f"tiny-imagenet/{method}") == 0
    run = the_run(tmp_path)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 2
    assert [row["view"] for row in summary["evaluation"]] == ["whole", "dense"]
    weights = torch.load(run / "last.ckpt", weights_only=True)["state_dict"]
    assert weights["backbone.conv1.weight"].shape[-1] == 7  # ImageNet's stem, as in the paper


def test_imagenet100_takes_its_classes_from_the_whole(tmp_path):
    listed = Path(files.__file__).with_name("imagenet100.txt").read_text().split()
    assert len(set(listed)) == 100
    for split in ("train", "val"):
        for name in [*listed, "n99999999"]:
            write(tmp_path / split / name, 1, size=(20, 30))
    train, test = load_dataset("imagenet100", str(tmp_path), image_size=16)
    assert train.classes == sorted(listed)
    assert len(train) == len(test) == 100
    assert train.fetch(torch.tensor([5])).shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("dataset", "paths", "message"),
    [
        ("tiny-imagenet", {"train_path": "nothing"}, "tiny-imagenet-200.zip"),
        (
            "tiny-imagenet",
            {"train_path": "images"},
            "val_annotations.txt is missing|2 class folders",
        ),
        ("imagenet100", {"train_path": "images"}, "lacks 100 of 100 class folders"),
        ("imagenet100", {"train_path": "nothing"}, "train is not a folder"),
        ("custom", {"train_path": "images/train"}, "data.val_path"),
        ("custom", {"train_path": "images/train", "val_path": "images"}, "different class folders"),
        ("custom", {"train_path": "images/train/ant", "holdout": 0.1}, "without labels"),
        (
            "custom",
            {"train_path": "images", "holdout": 0.1},
            "holds train and val, no class folders: set data.train_path=.*/train",
        ),
        ("custom", {"train_path": "nothing"}, "is not a folder"),
        ("custom", {"train_path": None}, "data.train_path is not set"),
    ],
)
def test_what_cannot_be_read_says_what_to_do(folders, dataset, paths, message):
    paths = dict(paths)
    for key in paths.keys() & {"train_path", "val_path"}:
        if paths[key] is not None:
            paths[key] = str(folders.parent / paths[key].replace("images", folders.name))
    with pytest.raises(UserError, match=message):
        load_dataset(dataset, **paths)

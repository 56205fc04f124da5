import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10

from emp_plugin.data import load_dataset
from emp_plugin.errors import UserError


@pytest.mark.parametrize("size", [32, 16])
def test_digits_are_real_and_split_once(size):
    train, test = digits = load_dataset("digits", None, image_size=size)
    assert (len(train), len(test)) == (1437, 360)
    assert train.images.shape[1:] == (3, size, size)
    assert train.images.dtype == torch.uint8
    shares = [torch.bincount(split.targets, minlength=10) / len(split) for split in digits]
    assert (shares[0] - shares[1]).abs().max() < 0.01  # stratified
    grey = torch.cat([split.images[:, 0] for split in digits]).float() * 16 / 255
    small = grey.view(-1, 8, size // 8, 8, size // 8).mean((2, 4))
    originals = load_digits()
    sources = torch.from_numpy(originals.images).float()
    nearest = torch.cdist(small.flatten(1), sources.flatten(1)).min(1)
    assert nearest.values.max() < 18
    assert len(nearest.indices.unique()) > 1780
    targets = torch.cat([split.targets for split in digits])
    assert torch.equal(torch.from_numpy(originals.target)[nearest.indices], targets)
    again = load_dataset("digits", None, image_size=size)
    assert torch.equal(again[0].images, train.images)


def test_holdout_and_fraction_never_touch_the_test_set(digits):
    train, held = load_dataset("digits", None, holdout=0.1)
    assert len(train) + len(held) == len(digits[0])
    known = {image.numpy().tobytes() for image in digits[0].images}
    assert all(image.numpy().tobytes() in known for image in held.images)
    part, test = load_dataset("digits", None, fraction=0.1)
    assert len(part) == pytest.approx(0.1 * len(digits[0]), abs=1)
    assert torch.equal(test.images, digits[1].images)
    with pytest.raises(UserError, match="data.holdout"):
        load_dataset("digits", None, holdout=0.001)


def write_folders(root, classes=10, per_class=2, form="png"):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in range(classes):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(per_class):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.{form}")


@pytest.mark.parametrize("form", ["png", "webp", "bmp"])
def test_folders(tmp_path, form):
    write_folders(tmp_path, form=form)
    train, test = load_dataset("cifar10", str(tmp_path))
    assert len(train) == len(test) == 20
    assert train.classes == [f"class{i}" for i in range(10)]
    with Image.open(tmp_path / "train" / "class3" / f"1.{form}") as image:
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(train.images[7].permute(1, 2, 0).numpy(), expected)


def test_torchvision_s_layout(tmp_path, monkeypatch):
    """The original archive's pickled batches, made small; torchvision's checksum is set aside."""
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    pixels = {}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        pixels[name] = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels[name], "labels": [0, 1, 2, 3]}))
    names = {"label_names": [str(i) for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names))
    train, test = load_dataset("cifar10", str(tmp_path))
    assert len(train) == 20
    assert np.array_equal(test.images.numpy().reshape(4, -1), pixels["test_batch"])
    assert np.array_equal(train.images[5].numpy().ravel(), pixels["data_batch_2"][1])


def test_failed_download_says_what_was_tried(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    with pytest.raises(UserError) as caught:
        load_dataset("cifar10", str(tmp_path / "data"))
    message = str(caught.value)
    for part in ("no route to host", "cifar-10-batches-py", "<class>", "data.train_path=DIR"):
        assert part in message
    assert "emp pretrain digits/emp" in message


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda root: (root / "train" / "class0" / "0.png").write_text("not an image"),
            "0.png: not a readable image",
        ),
        (
            lambda root: Image.new("RGB", (8, 8)).save(root / "train" / "class0" / "0.png"),
            "8x8 pixels, expected 32x32",
        ),
        (
            lambda root: (root / "test" / "class9").rename(root / "test" / "other"),
            "different class folders",
        ),
        (
            lambda root: (root / "train" / "empty").mkdir(),
            "no images in this class folder",
        ),
    ],
)
def test_broken_folders_are_named(tmp_path, damage, message):
    write_folders(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        load_dataset("cifar10", str(tmp_path))


def test_wrong_number_of_classes(tmp_path):
    write_folders(tmp_path, classes=3)
    with pytest.raises(UserError, match="3 class folders, but cifar100 has 100"):
        load_dataset("cifar100", str(tmp_path))
    with pytest.raises(UserError, match="unknown data.dataset"):
        load_dataset("mnist", None)
    with pytest.raises(UserError, match="train_path is not set"):
        load_dataset("cifar10", None)

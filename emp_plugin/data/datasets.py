"""Where images come from: a dataset's name and a path -> images in memory as uint8."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder

from emp_plugin.data.files import (
    ImageFiles,
    class_folders,
    image_paths,
    list_flat,
    list_folder,
    list_tiny_imagenet,
    open_image,
)
from emp_plugin.errors import UserError

CIFAR = {"cifar10": CIFAR10, "cifar100": CIFAR100}
# None: whatever the folder holds
NUM_CLASSES = {
    "digits": 10,
    "cifar10": 10,
    "cifar100": 100,
    "tiny-imagenet": 200,
    "imagenet100": 100,
    "custom": None,
}
IMAGE_SIZE = {
    "digits": 32,
    "cifar10": 32,
    "cifar100": 32,
    "tiny-imagenet": 64,
    "imagenet100": 224,
    "custom": 224,
}  # pixels
RESIZABLE = (
    "digits",
    "imagenet100",
    "custom",
)  # to data.image_size; the last two are streamed from disk
SPLITS = {"train", "val", "valid", "validation", "test"}  # folders that are no classes
UNLABELLED = ["unlabelled"]  # the one class of a folder without classes
SPLIT_SEED = 0  # digits' test set and every hold-out are the same for all runs and seeds


@dataclass(frozen=True)
class ImageData:
    """Images in memory: ``images`` uint8 (N, 3, H, W), ``targets`` int64 (N,), and the names of the classes."""

    images: Tensor
    targets: Tensor
    classes: list[str]

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, indices: Tensor) -> Tensor:
        """The images at ``indices``, uint8 (b, 3, H, W)."""
        return self.images[indices]

    def subset(self, indices) -> "ImageData":
        """The images at ``indices``, in that order."""
        indices = torch.as_tensor(indices)
        return replace(self, images=self.images[indices], targets=self.targets[indices])


def load_dataset(
    name: str,
    train_path: str | None,
    holdout: float = 0.0,
    fraction: float = -1,
    val_path: str | None = None,
    image_size: int | None = None,
) -> tuple[ImageData | ImageFiles, ImageData | ImageFiles | None]:
    """Load the training and the evaluation images of a dataset; the second is None for images without labels.

    Args:
        name: ``digits`` (scikit-learn's, needs no files), ``cifar10``, ``cifar100``, ``tiny-imagenet`` (in memory), ``imagenet100`` or
            ``custom`` (decoded when a step asks for them).
        train_path: CIFAR: torchvision's layout or ``train/<class>/*`` and ``test/<class>/*``; downloaded into if empty. Tiny ImageNet: the folder
            as distributed. ImageNet-100: ImageNet's, with ``train/<wnid>/*`` and ``val/<wnid>/*``, of which 100 classes are read.
            Custom: a folder of class folders, or of images without labels.
        holdout: if positive, evaluate on this fraction of the training images (stratified, taken out of training) instead of the
            test images: for choosing settings without looking at the test set.
        fraction: if positive, keep only this (stratified) fraction of the training images.
        val_path: custom: class folders to evaluate on.
        image_size: ``digits``, ``imagenet100`` and ``custom``: side in pixels that every image is resized to; None: 32, 224 and 224.

    Raises:
        UserError: for an unknown name, missing or broken files, or fractions outside (0, 1).
    """
    if name not in NUM_CLASSES:
        raise UserError(f"unknown data.dataset '{name}'; choose one of {', '.join(NUM_CLASSES)}")
    if name == "digits":
        train, test = _digits(image_size or IMAGE_SIZE[name])
    elif not train_path:
        raise UserError(
            f"data.train_path is not set; {name} needs a folder to read from"
            + (" or to download into" if name in CIFAR else "")
        )
    else:
        root, size = Path(train_path).expanduser(), image_size or IMAGE_SIZE[name]
        if name in CIFAR:
            train, test = _cifar(name, root)
        elif name == "tiny-imagenet":
            train, test = _tiny_imagenet(root, size)
        elif name == "imagenet100":
            classes = Path(__file__).with_name("imagenet100.txt").read_text().split()
            train, test = (
                list_folder(root / "train", size, classes),
                list_folder(root / "val", size, classes),
            )
        else:
            train, test = _custom(
                root, Path(val_path).expanduser() if val_path else None, size, holdout
            )
    if holdout:
        train, test = _stratified_split(train, holdout, "data.holdout")
    if fraction > 0 and fraction != 1:
        _, train = _stratified_split(train, fraction, "data.fraction")
    if name == "tiny-imagenet":
        train, test = (
            ImageData(files.read_all(f"{name}, {split}"), files.targets, files.classes)
            for split, files in (("train", train), ("val", test))
        )
    return train, test


def count_classes(name: str, train_path: str | None) -> int:
    """Number of classes of a dataset, of which ``custom`` is the only one that is looked at; 1 without labels."""
    if NUM_CLASSES[name] is not None:
        return NUM_CLASSES[name]
    root = Path(train_path or ".").expanduser()
    return max(1, len(class_folders(root))) if root.is_dir() and not _is_flat(root) else 1


def _stratified_split(
    data: ImageData, fraction: float, setting: str
) -> tuple[ImageData, ImageData]:
    """Split off ``fraction`` of the images, every class in proportion; order within each part is the original one."""
    if not 0 < fraction < 1:
        raise UserError(f"{setting} must be between 0 and 1, got {fraction}")
    try:
        rest, part = train_test_split(
            np.arange(len(data)),
            test_size=fraction,
            stratify=data.targets.numpy(),
            random_state=SPLIT_SEED,
        )
    except ValueError as error:
        raise UserError(
            f"{setting}={fraction} cannot split {len(data)} images into {len(data.classes)} classes: {error}"
        ) from error
    return data.subset(np.sort(rest)), data.subset(np.sort(part))


def _digits(size: int) -> tuple[ImageData, ImageData]:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, as RGB of another size; a fifth is the test set."""
    digits = load_digits()
    grey = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    images = (
        F.interpolate(grey, size=size, mode="bilinear")
        .round()
        .clamp(0, 255)
        .to(torch.uint8)
        .expand(-1, 3, -1, -1)
        .contiguous()
    )
    return _stratified_split(
        ImageData(
            images, torch.from_numpy(digits.target).long(), [str(c) for c in digits.target_names]
        ),
        0.2,
        "test",
    )


def _tiny_imagenet(root: Path, size: int) -> tuple[ImageFiles, ImageFiles]:
    if not (root / "train").is_dir():
        raise UserError(
            f"no train/ in {root.resolve()}: download and unpack tiny-imagenet-200.zip (http://cs231n.stanford.edu/tiny-imagenet-200.zip) and set "
            f"data.train_path to its folder tiny-imagenet-200. `bash scripts/pretrain/digits/emp.sh` needs no download."
        )
    train, test = list_tiny_imagenet(root, size)
    if len(train.classes) != NUM_CLASSES["tiny-imagenet"]:
        raise UserError(
            f"{root / 'train'}: {len(train.classes)} class folders, but tiny-imagenet has {NUM_CLASSES['tiny-imagenet']} classes; "
            f"for a part of it set data.dataset=custom"
        )
    return train, test


def _custom(
    root: Path, evaluation: Path | None, size: int, holdout: float
) -> tuple[ImageFiles, ImageFiles | None]:
    if _is_flat(root):
        if holdout or evaluation:
            raise UserError(
                f"images lie in {root} itself, so they are without labels and nothing can be evaluated: leave data.holdout and data.val_path out, "
                "or move them into class folders"
            )
        return list_flat(root, size, UNLABELLED), None
    train = list_folder(root, size)
    if "train" in train.classes and set(train.classes) <= SPLITS:
        raise UserError(
            f"{root} holds {' and '.join(train.classes)}, no class folders: set data.train_path={root / 'train'}, and data.val_path likewise"
        )
    test = list_folder(evaluation, size) if evaluation else None
    if test is None and not holdout:
        raise UserError(
            "data.dataset=custom: set data.val_path to class folders to evaluate on, or data.holdout=0.1 to take a tenth of the training images"
        )
    if test and test.classes != train.classes:
        raise UserError(
            f"{evaluation} and {root} have different class folders: {', '.join(sorted(set(train.classes) ^ set(test.classes))[:5])}"
        )
    return train, test


def _is_flat(root: Path) -> bool:
    """Images lie in the folder itself: there are no labels."""
    return root.is_dir() and bool(image_paths(root, below=False))


def _cifar(name: str, root: Path) -> tuple[ImageData, ImageData]:
    if (root / "train").is_dir():
        return _folders(root, name)
    dataset = CIFAR[name]
    try:
        splits = [dataset(str(root), train=train, download=False) for train in (True, False)]
    except RuntimeError:  # torchvision: not found, or its checksum differs
        try:
            splits = [dataset(str(root), train=train, download=True) for train in (True, False)]
        except Exception as error:  # whatever the download raised (no network, no room, broken archive), the advice is the same
            raise UserError(
                f"no {name} in {root.resolve()} and the download failed ({type(error).__name__}: {error}).\n"
                f"Looked for torchvision's folder {root / dataset.base_folder} and for {root / 'train'}/<class>/*.\n"
                f"Put either there, or point data.train_path=DIR at it. "
                f"`bash scripts/pretrain/digits/emp.sh` needs no download."
            ) from error
    return tuple(
        ImageData(
            torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(),
            torch.tensor(split.targets),
            list(split.classes),
        )
        for split in splits
    )


def _folders(root: Path, name: str) -> tuple[ImageData, ImageData]:
    """``root/train/<class>/*`` and ``root/test/<class>/*``, any image format that Pillow reads.

    Grey, 16-bit grey, palette and CMYK images become RGB, transparency is dropped. Images that cannot be read whole, or are of
    another size than the dataset's, are refused by their path: nothing is skipped, so that all runs see the same images.
    """
    train, test = (_read_folder(root / split, IMAGE_SIZE[name]) for split in ("train", "test"))
    if train.classes != test.classes:
        raise UserError(
            f"{root}: train/ and test/ have different class folders: "
            f"{', '.join(sorted(set(train.classes) ^ set(test.classes))[:5])}"
        )
    if len(train.classes) != NUM_CLASSES[name]:
        raise UserError(
            f"{root}: {len(train.classes)} class folders, but {name} has {NUM_CLASSES[name]} classes"
        )
    return train, test


def _read_folder(folder: Path, size: int) -> ImageData:
    try:
        listing = ImageFolder(
            str(folder),
            is_valid_file=lambda path: Path(path).suffix.lower() in Image.registered_extensions(),
        )
    except FileNotFoundError as error:
        raise UserError(f"{folder}: expected one folder of images per class ({error})") from error
    images = torch.empty(len(listing), 3, size, size, dtype=torch.uint8)
    for i, (path, _) in enumerate(listing.samples):
        pixels = np.array(open_image(path))
        if pixels.shape != (size, size, 3):
            raise UserError(
                f"{path}: {pixels.shape[1]}x{pixels.shape[0]} pixels, expected {size}x{size}"
            )
        images[i] = torch.from_numpy(pixels).permute(2, 0, 1)
    return ImageData(images, torch.tensor(listing.targets), listing.classes)

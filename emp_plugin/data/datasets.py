"""Where images come from: a dataset's name and a path -> uint8 images, in memory or on disk."""

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100

from emp_plugin.data.files import (
    ImageFiles,
    Window,
    class_folders,
    image_paths,
    list_flat,
    list_folder,
    list_tiny_imagenet,
    open_image,
    seen_instead,
)
from emp_plugin.errors import UserError

CIFAR = {"cifar10": CIFAR10, "cifar100": CIFAR100}
NUM_CLASSES = {  # None: whatever the folder holds
    "digits": 10,
    "cifar10": 10,
    "cifar100": 100,
    "tiny-imagenet": 200,
    "imagenet100": 100,
    "custom": None,
}
IMAGE_SIZE = {  # pixels
    "digits": 32,
    "cifar10": 32,
    "cifar100": 32,
    "tiny-imagenet": 64,
    "imagenet100": 224,
    "custom": 224,
}
RESIZABLE = ("digits", "imagenet100", "custom")  # to data.image_size
SPLITS = {"train", "val", "valid", "validation", "test"}  # folders that are no classes
SPLIT_SEED = 0  # digits' test set and every hold-out are the same for all runs and seeds
NEEDS_NO_DOWNLOAD = "`emp pretrain digits/emp` needs no download."


@dataclass(frozen=True)
class ImageData:
    """Images in memory, with their labels."""

    images: Tensor  # uint8 (N, 3, H, W)
    targets: Tensor  # int64 (N,)
    classes: list[str]  # their names

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, indices: Tensor) -> Tensor:
        """The images at ``indices``, uint8 (b, 3, H, W)."""
        return self.images[indices]

    def subset(self, indices: Tensor) -> "ImageData":
        """The images at ``indices``, in that order."""
        indices = torch.as_tensor(indices)
        return replace(self, images=self.images[indices], targets=self.targets[indices])

    def digest(self) -> str:
        """A hash of images and labels in their order."""
        content = hashlib.sha256(self.targets.numpy().data)
        content.update(self.images.numpy().data)
        return content.hexdigest()[:16]


Images = ImageData | ImageFiles


def load_dataset(
    name: str,
    train_path: str | None,
    holdout: float = 0.0,
    fraction: float = -1,
    val_path: str | None = None,
    image_size: int | None = None,
    window: Window = None,
    no_labels: bool = False,
) -> tuple[Images, Images | None]:
    """Load the training and the evaluation images of a dataset.

    Args:
        name: ``digits`` (scikit-learn's, needs no files), ``cifar10``, ``cifar100`` or
            ``tiny-imagenet`` (all in memory), ``imagenet100`` or ``custom`` (decoded when a step
            asks for them).
        train_path: where the images are.
            CIFAR: torchvision's layout, or ``train/<class>/*`` and ``test/<class>/*``; if empty,
            the dataset is downloaded into it.
            Tiny ImageNet: the folder as distributed.
            ImageNet-100: ImageNet's ``train/<wnid>/*`` and ``val/<wnid>/*``, of which 100 classes
            are read.
            Custom: a folder of class folders, or of images without labels.
        holdout: if positive, evaluate on this fraction of the training images instead of the test
            images: for choosing settings without looking at the test set. It is stratified, and
            taken out of training.
        fraction: if positive, keep only this (stratified) fraction of the training images.
        val_path: custom: class folders to evaluate on.
        image_size: ``digits``, ``imagenet100`` and ``custom``: side in pixels that every image is
            resized to; None: 32, 224 and 224.
        window: of images on disk, see :func:`emp_plugin.data.files.open_image`.
        no_labels: custom: all images in ``train_path`` and below, whose folders are no classes.

    Returns:
        Training and evaluation images; the latter None if the images have no labels.

    Raises:
        UserError: for an unknown name, missing or broken files, or fractions outside (0, 1).
    """
    if name not in NUM_CLASSES:
        raise UserError(f"unknown data.dataset '{name}'; choose one of {', '.join(NUM_CLASSES)}")
    size = image_size or IMAGE_SIZE[name]
    train: Images
    test: Images | None
    if name == "digits":
        train, test = _digits(size)
    elif not train_path:
        download = " or to download into" if name in CIFAR else ""
        raise UserError(f"data.train_path is not set; {name} needs a folder to read from{download}")
    else:
        root = Path(train_path).expanduser()
        if name in CIFAR:
            train, test = _cifar(name, root, window)
        elif name == "tiny-imagenet":
            train, test = _tiny_imagenet(root, size, window)
        elif name == "imagenet100":
            train, test = _imagenet100(root, size, window)
        else:
            val_root = Path(val_path).expanduser() if val_path else None
            train, test = _custom(root, val_root, size, holdout, window, no_labels)
    if holdout:
        train, test = _stratified_split(train, holdout, "data.holdout")
    if fraction > 0 and fraction != 1:
        _, train = _stratified_split(train, fraction, "data.fraction")
    if name == "tiny-imagenet":  # read after the splits, so that nothing is decoded in vain
        train, test = (
            ImageData(files.read_all(f"{name}, {split}"), files.targets, files.classes)
            for split, files in (("train", train), ("val", test))
            if isinstance(files, ImageFiles)
        )
    return train, test


def count_classes(name: str, train_path: str | None, no_labels: bool = False) -> int:
    """Number of classes of a dataset; 1 without labels. Only ``custom`` is looked at on disk."""
    if (known := NUM_CLASSES[name]) is not None:
        return known
    root = Path(train_path or ".").expanduser()
    if no_labels or not root.is_dir() or _is_flat(root):
        return 1
    return max(1, len(class_folders(root)))


def _stratified_split(data: Images, fraction: float, setting: str) -> tuple[Images, Images]:
    """Split off ``fraction`` of the images, every class in proportion; both parts keep the order.

    Returns:
        The rest, and the part.
    """
    if not 0 < fraction < 1:
        raise UserError(f"{setting} must be between 0 and 1, got {fraction}")
    from sklearn.model_selection import train_test_split  # takes a second to import

    try:
        rest, part = train_test_split(
            np.arange(len(data)),
            test_size=fraction,
            stratify=data.targets.numpy(),
            random_state=SPLIT_SEED,
        )
    except ValueError as error:
        number = data.targets.clamp_min(0).bincount(minlength=len(data.classes))
        single = [data.classes[label] for label in (number == 1).nonzero()[:, 0].tolist()]
        reason = (
            f"{len(single)} of the {len(data.classes)} classes have a single image, such as "
            f"{single[0]}: add images to them, take them out, or set data.val_path"
            if single
            else f"{len(data)} images of {len(data.classes)} classes: {error}"
        )
        raise UserError(f"{setting}={fraction} cannot split the images: {reason}") from error
    rest, part = (torch.from_numpy(np.sort(indices)) for indices in (rest, part))
    return data.subset(rest), data.subset(part)


def _digits(size: int) -> tuple[Images, Images]:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, as RGB of another size.

    A fifth is the test set.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    resized = F.interpolate(grey, size=size, mode="bilinear").round().clamp(0, 255)
    images = resized.to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    targets = torch.from_numpy(digits.target).long()
    classes = [str(name) for name in digits.target_names]
    return _stratified_split(ImageData(images, targets, classes), 0.2, "test")


def _tiny_imagenet(root: Path, size: int, window: Window) -> tuple[ImageFiles, ImageFiles]:
    if not (root / "train").is_dir():
        raise UserError(
            f"no train/ in {root.resolve()}: download and unpack tiny-imagenet-200.zip "
            "(http://cs231n.stanford.edu/tiny-imagenet-200.zip) and set data.train_path to its "
            f"folder tiny-imagenet-200. {NEEDS_NO_DOWNLOAD}"
        )
    train, test = list_tiny_imagenet(root, size, window)
    if len(train.classes) != NUM_CLASSES["tiny-imagenet"]:
        raise UserError(
            f"{root / 'train'}: {len(train.classes)} class folders, but tiny-imagenet has "
            f"{NUM_CLASSES['tiny-imagenet']} classes; for a part of it set data.dataset=custom"
        )
    return train, test


def _imagenet100(root: Path, size: int, window: Window) -> tuple[ImageFiles, ImageFiles]:
    classes = Path(__file__).with_name("imagenet100.txt").read_text().split()
    train, test = (list_folder(root / split, size, window, classes) for split in ("train", "val"))
    return train, test


def _custom(
    root: Path,
    evaluation: Path | None,
    size: int,
    holdout: float,
    window: Window,
    no_labels: bool,
) -> tuple[ImageFiles, ImageFiles | None]:
    if no_labels or _is_flat(root):
        if holdout or evaluation:
            raise UserError(
                f"the images in {root} are without labels (data.no_labels=True, or no class "
                "folders), so nothing can be evaluated: leave data.holdout and data.val_path out, "
                "or move them into class folders"
            )
        return list_flat(root, size, window), None
    if root.is_dir() and not class_folders(root):
        raise UserError(f"{root}: no images and no class folders{seen_instead(root)}")
    train = list_folder(root, size, window)
    if "train" in train.classes and set(train.classes) <= SPLITS:
        raise UserError(
            f"{root} holds {' and '.join(train.classes)}, no class folders: "
            f"set data.train_path={root / 'train'}, and data.val_path likewise"
        )
    test = list_folder(evaluation, size, window) if evaluation else None
    if test is None and not holdout:
        raise UserError(
            f"{root}: its {len(train.classes)} folders are taken for classes. To evaluate, set "
            "data.val_path to class folders, or data.holdout=0.1 to take a tenth of the training "
            "images; if they are no classes, set data.no_labels=True"
        )
    if test:
        _require_same_classes(train, test, f"{evaluation} and {root}")
    return train, test


def _require_same_classes(
    train: ImageData | ImageFiles, test: ImageData | ImageFiles, folders: str
) -> None:
    different = sorted(set(train.classes) ^ set(test.classes))
    if different:
        raise UserError(f"{folders} have different class folders: {', '.join(different[:5])}")


def _is_flat(root: Path) -> bool:
    """Images lie in the folder itself: there are no labels."""
    return root.is_dir() and bool(image_paths(root, below=False))


def _cifar(name: str, root: Path, window: Window) -> tuple[ImageData, ImageData]:
    if (root / "train").is_dir():
        return _folders(root, name, window)
    dataset = CIFAR[name]
    try:
        splits = [dataset(str(root), train=train, download=False) for train in (True, False)]
    except RuntimeError:  # torchvision: not found, or its checksum differs
        try:
            splits = [dataset(str(root), train=train, download=True) for train in (True, False)]
        # no network, no space, a broken archive: the advice is the same
        except Exception as error:
            raise UserError(
                f"no {name} in {root.resolve()} and the download failed "
                f"({type(error).__name__}: {error}).\n"
                f"Looked for torchvision's folder {root / dataset.base_folder} "
                f"and for {root / 'train'}/<class>/*.\n"
                f"Put either there, or point data.train_path=DIR at it. {NEEDS_NO_DOWNLOAD}"
            ) from error
    train, test = (
        ImageData(
            torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(),
            torch.tensor(split.targets),
            list(split.classes),
        )
        for split in splits
    )
    return train, test


def _folders(root: Path, name: str, window: Window) -> tuple[ImageData, ImageData]:
    """``root/train/<class>/*`` and ``root/test/<class>/*``, any image format that Pillow reads.

    Nothing is skipped, so that all runs see the same images: the first that cannot be read whole,
    or is of another size than the dataset's, is refused by its path.
    """
    size = IMAGE_SIZE[name]
    train, test = (_read_folder(root / split, size, window) for split in ("train", "test"))
    _require_same_classes(train, test, f"{root}: train/ and test/")
    if len(train.classes) != NUM_CLASSES[name]:
        raise UserError(
            f"{root}: {len(train.classes)} class folders, "
            f"but {name} has {NUM_CLASSES[name]} classes"
        )
    return train, test


def _read_folder(folder: Path, size: int, window: Window) -> ImageData:
    files = list_folder(folder, size)
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)

    def read(path: bytes) -> Tensor:
        pixels = np.array(open_image(os.fsdecode(path), window=window))
        height, width, _ = pixels.shape
        if (height, width) != (size, size):
            name = os.fsdecode(path)
            raise UserError(f"{name}: {width}x{height} pixels, expected {size}x{size}")
        return torch.from_numpy(pixels).permute(2, 0, 1)

    for i, image in enumerate(files.each(read, f"{folder.parent.name}, {folder.name}")):
        images[i] = image
    return ImageData(images, files.targets, files.classes)

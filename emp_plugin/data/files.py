"""Images on disk: listed once, decoded when a step asks for them, to squares of one size."""

import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor
from torch.utils.data import get_worker_info

from emp_plugin.errors import UserError


def no_marks() -> Tensor:
    """(process, 1 + index) of what each worker is reading; 0: nothing.

    The memory is shared, so that the main process still sees it when a worker is killed.
    """
    return torch.zeros(256, 2, dtype=torch.long).share_memory_()


@dataclass(frozen=True)
class ImageFiles:
    """Images on disk, used as :class:`ImageData` is.

    Args:
        paths: bytes array (N,). Of a list each worker process would come to hold a copy.
        targets: int64 (N,).
        classes: names of the classes.
        size: side of the square, in pixels, that every image becomes (:func:`read_image`).
    """

    paths: np.ndarray
    targets: Tensor
    classes: list[str]
    size: int
    reading: Tensor = field(default_factory=no_marks, repr=False)

    def __len__(self) -> int:
        return len(self.paths)

    def fetch(self, indices: Tensor) -> Tensor:
        """The images at ``indices``, uint8 (b, 3, size, size).

        Raises:
            UserError: for a file that is no image.
        """
        images = []
        for index in np.asarray(indices).tolist():
            self._mark(1 + index)
            images.append(read_image(os.fsdecode(self.paths[index]), self.size))
        self._mark(0)
        return torch.stack(images)

    def _mark(self, number: int) -> None:
        if worker := get_worker_info():
            self.reading[worker.id % len(self.reading)] = torch.tensor([os.getpid(), number])

    def died_on(self) -> list[str]:
        """Paths that worker processes were reading when they died."""
        alive = {process.pid for process in multiprocessing.active_children()}
        return [
            os.fsdecode(self.paths[number - 1])
            for process, number in self.reading.tolist()
            if number and process not in alive
        ]

    def subset(self, indices: Tensor) -> "ImageFiles":
        """The images at ``indices``, in that order."""
        indices = torch.as_tensor(indices)
        return replace(
            self,
            paths=self.paths[indices.numpy()],
            targets=self.targets[indices],
            reading=no_marks(),
        )

    def read_all(self, description: str) -> Tensor:
        """All images at once, uint8 (N, 3, size, size), with a progress bar."""
        images = torch.empty(len(self), 3, self.size, self.size, dtype=torch.uint8)
        # threads, because Pillow decodes without holding Python's lock
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            decoded = pool.map(lambda path: read_image(os.fsdecode(path), self.size), self.paths)
            shown = track(decoded, total=len(self), description=description, transient=True)
            for i, image in enumerate(shown):
                images[i] = image
        return images


def read_image(path: str | Path, size: int) -> Tensor:
    """An image file as uint8 (3, size, size).

    The shorter side is resized to ``size``; of the longer one the middle is kept.

    Raises:
        UserError: as :func:`open_image`.
    """
    image = open_image(path, size)
    width, height = image.size
    if (width, height) != (size, size):
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def open_image(path: str | Path, size: int | None = None) -> Image.Image:
    """An image file of any kind as RGB.

    16-bit grey keeps its upper 8 bits, transparency is dropped.

    Args:
        path: of the file.
        size: if given, a large JPEG is decoded at a half, a quarter or an eighth, but never below
            this size in pixels.

    Raises:
        UserError: naming a file that is missing, cut off, no image, or of floating-point pixels.
    """
    try:
        with Image.open(path) as file:
            if size:
                file.draft("RGB", (size, size))
            return _rgb(file)
    except (Image.DecompressionBombError, OSError, RuntimeError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: not a readable image ({error}); mend or remove it") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, which have no scale")
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would cut off at 255
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def list_folder(folder: Path, size: int, classes: list[str] | None = None) -> ImageFiles:
    """``folder/<class>/**`` with labels, in the order of the classes' names.

    Args:
        folder: one folder per class.
        size: see :class:`ImageFiles`.
        classes: only these folders; the others are left alone.

    Raises:
        UserError: for missing or empty class folders.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    names = sorted(classes) if classes else class_folders(folder)
    missing = [name for name in names if not (folder / name).is_dir()]
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of {len(names)} class folders, "
            f"the first is {missing[0]}"
        )
    paths, targets = [], []
    for label, name in enumerate(names):
        found = image_paths(folder / name)
        if not found:
            raise UserError(f"{folder / name}: no images in this class folder; fill or remove it")
        paths += found
        targets += [label] * len(found)
    return _image_files(paths, targets, names, size)


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in ``folder``, sorted; hidden ones are no classes."""
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.is_dir() and not entry.name.startswith(".")
    )


def list_flat(folder: Path, size: int, classes: list[str]) -> ImageFiles:
    """All images in ``folder`` and below, without labels: their targets are -1."""
    paths = image_paths(folder)
    return _image_files(paths, [-1] * len(paths), classes, size)


def image_paths(folder: Path, below: bool = True) -> list[bytes]:
    """Files in ``folder``, and ``below`` it, that Pillow knows by their extension, sorted.

    Linked folders are followed, each folder once. Hidden files, such as macOS's ``._a.jpg``, and
    hidden folders are left out.
    """
    known, paths, seen = Image.registered_extensions(), [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:  # a link to a folder above itself
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if below and not name.startswith(".")]
        paths += [
            os.fsencode(os.path.join(parent, name))
            for name in names
            if os.path.splitext(name)[1].lower() in known and not name.startswith(".")
        ]
    return sorted(paths)


def list_tiny_imagenet(root: Path, size: int) -> tuple[ImageFiles, ImageFiles]:
    """Tiny ImageNet as it is distributed.

    Training images are ``train/<wnid>/images/*``. Those of ``val/images`` have their labels in
    ``val/val_annotations.txt``.

    Raises:
        UserError: if one of these is missing or does not fit the others.
    """
    train = list_folder(root / "train", size)
    annotations = root / "val" / "val_annotations.txt"
    if not annotations.is_file():
        raise UserError(f"{annotations} is missing; the archive tiny-imagenet-200.zip holds it")
    label = {name: i for i, name in enumerate(train.classes)}
    rows = [line.split("\t")[:2] for line in annotations.read_text().splitlines() if line.strip()]
    strange = [row for row in rows if len(row) < 2 or row[1] not in label]
    if strange or not rows:
        raise UserError(
            f"{annotations}: expected lines of <file> TAB <class of train/>, "
            f"got {strange[0] if strange else 'none'}"
        )
    paths = [os.fsencode(root / "val" / "images" / name) for name, _ in rows]
    return train, _image_files(paths, [label[name] for _, name in rows], train.classes, size)


def _image_files(
    paths: list[bytes], targets: list[int], classes: list[str], size: int
) -> ImageFiles:
    labels = torch.tensor(targets, dtype=torch.long)
    return ImageFiles(np.array(paths, dtype=np.bytes_), labels, classes, size)

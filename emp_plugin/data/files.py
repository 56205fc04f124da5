"""Images on disk: listed once, decoded when a step asks for them, to squares of one size."""

import hashlib
import multiprocessing
import os
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps
from torch import Tensor
from torch.utils.data import get_worker_info

from emp_plugin.errors import UserError

Window = tuple[float, float] | None
UNLABELLED = ["unlabelled"]  # "classes" of images without labels, whose targets are -1
OUTPUT = ".emp_plugin_output"  # a file in folders that hold what runs leave
NEARLY_EMPTY = 8  # of 255: an image whose values span less has lost its contrast somewhere
WARNED_OF: set[bytes] = set()  # folders that hold such images
DARK = 64  # of 255: no 16-bit colour image that uses its range stays below


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
        window: see :func:`open_image`.
    """

    paths: np.ndarray
    targets: Tensor
    classes: list[str]
    size: int
    window: Window = None
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
            images.append(self._read(self.paths[index]))
        self._mark(0)
        return torch.stack(images)

    def _read(self, path: bytes) -> Tensor:
        image = read_image(os.fsdecode(path), self.size, self.window)
        if is_nearly_empty(image):
            _warn_of_range(path, int(image.min()), int(image.max()))
        return image

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
        for i, image in enumerate(self.each(self._read, description)):
            images[i] = image
        return images

    def each(self, read: Callable[[bytes], Any], description: str) -> Iterator[Any]:
        """What ``read`` makes of every path, in order, with a progress bar."""
        from rich.progress import track

        # threads, because Pillow decodes without holding Python's lock
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = pool.map(read, self.paths)
            yield from track(made, total=len(self), description=description, transient=True)

    def faults(self) -> Iterator[str]:
        """One line for every file that cannot be read or has nearly no contrast."""

        def fault(path: bytes) -> str:
            try:
                image = read_image(os.fsdecode(path), self.size, self.window)
            except UserError as error:
                return str(error)
            name = os.fsdecode(path)
            return f"{name}: nearly without contrast" if is_nearly_empty(image) else ""

        return filter(None, self.each(fault, "reading"))

    def digest(self) -> str:
        """A hash of what was listed: labels, names and sizes of the files in their order.

        Names are those below the folder that holds all, which may have moved.
        """
        names = [os.fsdecode(path) for path in self.paths]
        root = os.path.commonpath(names) if len(names) > 1 else ""
        listed = hashlib.sha256(self.targets.numpy().tobytes())
        for name in names:
            line = f"{os.path.relpath(name, root)}\0{os.path.getsize(name)}\0"
            listed.update(os.fsencode(line))  # names need not be UTF-8
        return listed.hexdigest()[:16]


def is_nearly_empty(image: Tensor) -> bool:
    """Whether the values of a uint8 image span less than 8 of 255."""
    return int(image.max()) - int(image.min()) < NEARLY_EMPTY


def _warn_of_range(path: bytes, low: int, high: int) -> None:
    """Once for each folder and process, naming its first such image."""
    folder = os.path.dirname(path)
    if folder in WARNED_OF:
        return
    WARNED_OF.add(folder)
    warnings.warn(
        f"{os.fsdecode(path)}: its values are {low} to {high} of 255, nearly without contrast. "
        f"`emp check-data {os.fsdecode(folder)}` names all such images",
        stacklevel=2,
    )


def read_image(path: str | Path, size: int, window: Window = None) -> Tensor:
    """An image file as uint8 (3, size, size).

    The shorter side is resized to ``size``; of the longer one the middle is kept.

    Raises:
        UserError: as :func:`open_image`.
    """
    image = open_image(path, size, window)
    width, height = image.size
    if (width, height) != (size, size):
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def open_image(path: str | Path, size: int | None = None, window: Window = None) -> Image.Image:
    """An image file of any kind as RGB, upright by its EXIF orientation.

    Transparency is dropped. Of an animation the first picture is taken. 16-bit colours keep their
    upper 8 bits.

    Args:
        path: of the file.
        size: if given, a large JPEG is decoded at a half, a quarter or an eighth, but never below
            this size in pixels.
        window: values that become black and white, of images in grey with more than 8 bits or in
            floating point. What lies between is a line, what lies outside is cut off.

    Raises:
        UserError: naming a file that is missing, cut off or no image, that needs a window, holds
            several pages, or has 16-bit colours of which 8 bits would leave too little.
    """
    try:
        with Image.open(path) as file:
            if size:
                file.draft("RGB", (size, size))
            return _rgb(file, window)
    except UserError as error:  # a good file that needs a decision
        raise UserError(f"{path}: {error}") from error
    except Image.DecompressionBombError as error:
        raise UserError(
            f"{path}: {error}. Save it smaller; training shrinks it to data.image_size anyway"
        ) from error
    except (OSError, RuntimeError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: not a readable image ({error}); mend or remove it") from error


def _rgb(file: ImageFile.ImageFile, window: Window) -> Image.Image:
    pages = getattr(file, "n_frames", 1) if file.format == "TIFF" else 1
    if pages > 1:
        raise UserError(f"it holds {pages} pages: save each as a file of its own")
    has_16_bits = any(";16" in str(tile[-1]) for tile in file.tile)
    image = ImageOps.exif_transpose(file)
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_windowed(np.asarray(image, dtype=np.float64), window))
        return image.convert("RGB")
    image = image.convert("RGB")
    if has_16_bits and np.asarray(image).max() < DARK:
        raise UserError("its 16-bit colours use the lowest values alone: convert it to 8 bits")
    return image


def _windowed(values: np.ndarray, window: Window) -> np.ndarray:
    """Grey values as uint8; the window's ends are 0 and 255. What is no number becomes black."""
    if window is None:
        low, high = np.nanmin(values), np.nanmax(values)
        raise UserError(
            f"its grey values, {low:g} to {high:g}, are no 8-bit ones: set data.window=[low,high], "
            f"the values that become black and white in all images, such as [{low:g},{high:g}]"
        )
    low, high = window
    values = np.nan_to_num((values - low) / (high - low), nan=0.0)
    return (255 * values.clip(0, 1)).round().astype(np.uint8)


def list_folder(
    folder: Path, size: int, window: Window = None, classes: list[str] | None = None
) -> ImageFiles:
    """``folder/<class>/**`` with labels, in the order of the classes' names.

    Args:
        folder: one folder per class.
        size, window: see :class:`ImageFiles`.
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
            raise UserError(
                f"{folder / name}: no images in this class folder{seen_instead(folder / name)}; "
                "fill or remove it"
            )
        paths += found
        targets += [label] * len(found)
    return _image_files(paths, targets, names, size, window)


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in ``folder``, sorted; hidden ones and outputs are no classes."""
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.is_dir() and not entry.name.startswith(".") and not _is_output(Path(entry.path))
    )


def _is_output(folder: Path) -> bool:
    """Whether it holds what runs leave, and no images beside."""
    with os.scandir(folder) as entries:
        if any(_is_image(entry.name) for entry in entries if entry.is_file()):
            return _left_by_runs(os.listdir(folder))  # asked first: most folders are of images
    left = any(_left_by_runs(names) for _, _, names in os.walk(folder))
    return left and not image_paths(folder)


def _left_by_runs(names: Collection[str]) -> bool:
    """Whether a folder with files of these names is a run's, a study's, or marked as ours."""
    is_run = "config.yaml" in names and "versions.json" in names
    return OUTPUT in names or is_run or "comparison.yaml" in names


def make_output_folder(folder: Path) -> None:
    """Make a folder for what runs leave, with a mark so that it is never listed as data.

    One that is there already may hold a user's images, and stays unmarked.
    """
    if not folder.exists():
        folder.mkdir(parents=True)
        (folder / OUTPUT).touch()


def seen_instead(folder: Path) -> str:
    """For a message: the endings of the files in a folder without images, and what is read."""
    if folder.is_dir() and _left_by_runs(os.listdir(folder)):
        return ": it is a folder of outputs, which are never data"
    endings = Counter(path.suffix or "no ending" for path in folder.rglob("*") if path.is_file())
    if not endings:
        return ""
    found = ", ".join(f"{number} {ending}" for ending, number in endings.most_common(3))
    return f" ({found}; read are .png, .jpg, .tif, .webp and whatever else Pillow knows)"


def list_flat(folder: Path, size: int, window: Window = None) -> ImageFiles:
    """All images in ``folder`` and below, without labels: their targets are -1.

    Raises:
        UserError: if there are none.
    """
    paths = image_paths(folder)
    if not paths:
        raise UserError(f"{folder}: no images{seen_instead(folder)}")
    return _image_files(paths, [-1] * len(paths), UNLABELLED, size, window)


def image_paths(folder: Path, below: bool = True) -> list[bytes]:
    """Files in ``folder``, and ``below`` it, that Pillow knows by their extension, sorted.

    Linked folders are followed, each folder once. Hidden files, such as macOS's ``._a.jpg``,
    hidden folders and those of outputs are left out.
    """
    paths, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        # a link to a folder above itself, or outputs beside the images
        if (real := os.path.realpath(parent)) in seen or _left_by_runs(names):
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if below and not name.startswith(".")]
        paths += [os.fsencode(os.path.join(parent, name)) for name in names if _is_image(name)]
    return sorted(paths)


def _is_image(name: str) -> bool:
    """Whether Pillow knows a file by its ending; hidden ones are none."""
    known = Image.registered_extensions()
    return os.path.splitext(name)[1].lower() in known and not name.startswith(".")


def list_tiny_imagenet(
    root: Path, size: int, window: Window = None
) -> tuple[ImageFiles, ImageFiles]:
    """Tiny ImageNet as it is distributed.

    Training images are ``train/<wnid>/images/*``. Those of ``val/images`` have their labels in
    ``val/val_annotations.txt``; or they have been sorted into ``val/<wnid>``.

    Raises:
        UserError: if one of these is missing or does not fit the others.
    """
    train = list_folder(root / "train", size, window)
    annotations = root / "val" / "val_annotations.txt"
    sorted_into = [name for name in train.classes if (root / "val" / name).is_dir()]
    if sorted_into:
        return train, list_folder(root / "val", size, window, train.classes)
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
    return train, _image_files(
        paths, [label[name] for _, name in rows], train.classes, size, window
    )


def _image_files(
    paths: list[bytes],
    targets: list[int],
    classes: list[str],
    size: int,
    window: Window = None,
) -> ImageFiles:
    labels = torch.tensor(targets, dtype=torch.long)
    return ImageFiles(np.array(paths, dtype=np.bytes_), labels, classes, size, window)

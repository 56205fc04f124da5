"""Features of a dataset under a frozen network, by what the network is shown of each image.

``whole`` is the image as it is. ``bag`` is the mean over many patches (arXiv 2304.03977). ``dense``
is a bag of all patches for the price of one pass: the image is enlarged until its patches have the
size that the network was trained on, and the last feature map is averaged over all windows as large
as the map of one patch.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms.functional import pil_to_tensor

from emp_plugin.data import ImageData, ImageFiles, generator, in_order, normalise
from emp_plugin.data.batches import EvaluationDataset, as_it_is, ignore_signals
from emp_plugin.errors import UserError
from emp_plugin.losses import at_least_float32
from emp_plugin.transforms import BatchMultiPatch, PatchAugmentation

Named = dict[str, Tensor]  # features by name, each (b, f)
Encode = Callable[[Tensor], Tensor | Named]
Data = ImageData | ImageFiles | Dataset[Any] | DataLoader[Any]
OURS = (ImageData, ImageFiles)

VIEWS = ("whole", "dense", "bag")
HALF = (0.5, 0.5, 0.5)
BAG = 2  # random stream of the evaluation's patches; 0, 1 and 3 are training's
BATCH = 100  # images whose patches are drawn together, whatever fits the memory
# Pixels in one forward pass. A CPU's caches hold the activations of few images.
FORWARD_PIXELS = {"cpu": 200 * 32 * 32}
FORWARD_PIXELS_ELSEWHERE = 2000 * 32 * 32
PIXEL_FEATURES_SIDE = 32  # larger images are averaged down to this before their pixels are features


@dataclass(frozen=True)
class View:
    """What a frozen network is shown of an image.

    Args:
        name: ``whole``, ``dense`` or ``bag``.
        augmentation: that the network was trained on, for ``dense`` and ``bag``. A bag's patches
            are its crops; a window of ``dense`` is as large as the map of its ``output_size``.
        num_patches: of a bag.
        augmented: a bag's patches are augmented as in training, not only cropped and resized.
        scale: of ``dense``, how many times the image is enlarged, before its sides are rounded to
            the network's stride. None: as :func:`dense_scale` says.

    Raises:
        ValueError: for an unknown name, or ``dense`` or ``bag`` without an augmentation: a scale
            that is wrong for the network would go unseen.
    """

    name: str = "whole"
    augmentation: PatchAugmentation | None = None
    num_patches: int = 16
    augmented: bool = False
    scale: float | None = None

    def __post_init__(self) -> None:
        if self.name not in VIEWS:
            raise ValueError(f"view must be one of {', '.join(VIEWS)}, got '{self.name}'")
        if self.name != "whole" and self.augmentation is None:
            raise ValueError(
                f"the view {self.name} needs the patches that the network was trained on, their "
                f"side in an image and what it is resized to: View('{self.name}', "
                "emp_plugin.transforms.PatchAugmentation(patch_size=16, output_size=32))"
            )

    @property
    def patches(self) -> PatchAugmentation:
        """The augmentation, which a dense view and a bag have."""
        assert self.augmentation is not None
        return self.augmentation


class Features(NamedTuple):
    """Features by name (N, f), on the CPU, and labels (N,), in the order of the data.

    Features are float32, or float64 if the images were.
    """

    features: Named
    targets: Tensor


def extract_features(
    encode: Encode, data: Data, view: str | View = "whole", **settings: Any
) -> Features:
    """Features and labels of a dataset under a network in evaluation mode.

    Args:
        encode: a module, a bound method or any function that maps images (b, 3, h, w) to features
            (b, f), which are then called "backbone", or to several by name.
        data: of (image, label). An image is uint8 or float (3, h, w), all of one size, or PIL's.
        view: what the network is shown: "whole", or a :class:`View` of any kind.
        settings: as of :func:`extract_views`.

    Raises:
        ValueError, UserError: as :func:`extract_views`.
    """
    view = View(view) if isinstance(view, str) else view
    [(features, _)] = extract_views(encode, data, [view], **settings)
    return features


def extract_views(
    encode: Encode,
    data: Data,
    views: Sequence[View],
    *,
    pool: nn.Module | None = None,
    mean: tuple[float, ...] = HALF,
    std: tuple[float, ...] = HALF,
    seed: int = 0,
    bf16: bool = False,
    device: torch.device | str | None = None,
    num_workers: int = 0,
    description: str = "features",
) -> list[tuple[Features, float]]:
    """As :func:`extract_features`, of several views in one reading of the data.

    With each view's features comes how many times its images were enlarged.

    Args:
        encode, data: as of :func:`extract_features`.
        views: what the network is shown. Where a dense view keeps the image's size, it shares its
            pass with the whole one.
        pool: of dense, the layer that averages the last feature map. None: :func:`find_pool`.
        mean, std: uint8 images become (x / 255 - mean) / std; float ones are taken as they are.
        seed: of a bag's patches. They depend on it and on the image's place in the data (in your
            own DataLoader: its batch's place, and its own in that) alone.
        bf16: run the network under bfloat16 autocast.
        device: to run on, where the network is already. None: that of its first parameter or
            buffer, else the CPU.
        num_workers: processes that read images.
        description: label of the progress bar.

    Raises:
        ValueError: for an unknown device, a bag of float images, or dense without a pooling layer.
        UserError: for features that are not finite: probes would give them a chance's accuracy.
    """
    from rich.progress import track

    place = _device(encode, device)
    parts: list[list[Named]] = []
    targets: list[Tensor] = []
    with _evaluating(encode), torch.inference_mode(), _precision(place, bf16):
        features_of = _FeaturesOf(encode, views, pool, (mean, std), seed, place)
        loader = _loader(data, num_workers)
        for images, labels, *_ in track(loader, description=description, transient=True):
            start = sum(map(len, targets))
            of_views = features_of(images.to(place, non_blocking=True), start)
            parts.append([{name: x.cpu() for name, x in named.items()} for named in of_views])
            targets.append(labels)
    labels = torch.cat(targets)
    return [
        (Features(_joined(of_view, description), labels), features_of.scales.get(view, 1.0))
        for view, of_view in zip(views, zip(*parts))
    ]


def _joined(parts: Sequence[Named], description: str) -> Named:
    features = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if not all(x.isfinite().all() for x in features.values()):
        raise UserError(
            f"{description}: there are features that are NaN or infinite, so the weights are "
            "broken: the training diverged. Evaluate an earlier checkpoint, or train with a "
            "smaller optimizer.lr"
        )
    return features


class _FeaturesOf:
    """Features of a batch of images (b, 3, h, w), the first of which is at ``start``, by view."""

    def __init__(
        self,
        encode: Encode,
        views: Sequence[View],
        pool: nn.Module | None,
        normalisation: tuple[Any, Any],
        seed: int,
        device: torch.device,
    ):
        self.encode, self.views, self.seed = encode, views, seed
        self.mean, self.std = normalisation
        self.pool = pool = pool or find_pool(encode)
        sides = {view.patches.output_size for view in views if view.name == "dense"}
        if sides and pool is None:
            raise ValueError(
                "a dense view needs the layer that averages the last feature map: this network has "
                "no nn.AdaptiveAvgPool2d(1), so give pool=, or take a bag"
            )
        self.maps = {side: map_of(encode, pool, side, device) for side in sides if pool}
        self.scales: dict[View, float] = {}

    def __call__(self, images: Tensor, start: int) -> list[Named]:
        is_uint8 = images.dtype == torch.uint8
        x = normalise(images, self.mean, self.std) if is_uint8 else at_least_float32(images)
        dense = {view: self.dense(x, view) for view in self.views if view.name == "dense"}
        # at the image's own size the pass of a dense view holds that of the whole image
        whole = next((whole for side, whole, _ in dense.values() if side == x.shape[-2:]), None)
        made = []
        for view in self.views:
            if view.name == "dense":
                made.append(dense[view][2])
            elif view.name == "bag":
                made.append(self.bag(images, view, generator(self.seed, BAG, start)))
            else:
                made.append(_in_parts(self.encode, x) if whole is None else whole)
        return made

    def bag(self, images: Tensor, view: View, draws: torch.Generator) -> Named:
        """Mean features over each image's patches, of uint8 images."""
        if images.dtype != torch.uint8:
            raise ValueError(f"a bag's patches are cut from uint8 images, got {images.dtype}")
        crops = view.patches if view.augmented else view.patches.plain()
        settings = {"num_patches": view.num_patches, "mean": self.mean, "std": self.std}
        patches = BatchMultiPatch.from_augmentation(replace(crops, **settings))
        b, n = len(images), view.num_patches
        height, width = images.shape[-2:]
        parameters = patches.sample(b, height, width, draws)
        at_once = max(1, _forward_pixels(images) // crops.output_size**2 // b)
        total: Named = {}
        for first in range(0, n, at_once):
            some = parameters.select(patches=slice(first, first + at_once))
            for name, x in _named(self.encode(patches.make(images, some).flatten(0, 1))).items():
                part = x.unflatten(0, (-1, b)).sum(0)
                total[name] = total[name] + part if name in total else part
        return {name: x / n for name, x in total.items()}

    def dense(self, x: Tensor, view: View) -> tuple[tuple[int, int], Named, Named]:
        """(height and width that the images are resized to, features of them whole, and dense)."""
        assert self.pool is not None  # or there were no dense views
        window, stride = self.maps[view.patches.output_size]
        side = dense_side(x.shape[-2:], view, stride, window)
        self.scales[view] = side[0] / x.shape[-2]
        if side != x.shape[-2:]:
            x = F.interpolate(x, side, mode=view.patches.interpolation, antialias=True)
        with _windows_in_place_of_pooling(self.pool, window):
            out = _in_parts(lambda some: _whole_and_windows(self.encode(some), len(some)), x)
        whole, windows = ({k: v[:, i] for k, v in out.items()} for i in (0, 1))
        return side, whole, windows


def _forward_pixels(x: Tensor) -> int:
    return FORWARD_PIXELS.get(x.device.type, FORWARD_PIXELS_ELSEWHERE)


def _named(out: Tensor | Named) -> Named:
    named = {"backbone": out} if isinstance(out, Tensor) else out
    return {name: at_least_float32(x) for name, x in named.items()}


def _in_parts(encode: Encode, x: Tensor) -> Named:
    """Features of images x (b, 3, h, w), as many at a time as a forward pass should have."""
    at_once = max(1, _forward_pixels(x) // (x.shape[-2] * x.shape[-1]))
    parts = [_named(encode(some)) for some in x.split(at_once)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


# the dense view


def dense_scale(augmentations: Sequence[PatchAugmentation], side: int) -> float:
    """How many times a dense view enlarges images: output size over mean crop side, of all views.

    A random-resized crop's side is the square root of its share of the area, whose mean over the
    uniformly drawn shares is taken, as in FixRes (arXiv 1906.06423).

    Args:
        augmentations: that the network was trained on.
        side: of the images in pixels.

    Raises:
        ValueError: for several sizes of crops or of outputs: no single scale is right for all.

    >>> dense_scale([PatchAugmentation(patch_size=16, output_size=32)], side=32)
    2.0
    """
    if len({(view.patch_size, view.output_size) for view in augmentations}) > 1:
        raise ValueError(
            "the augmentations have several sizes of crops or outputs, so that no scale of a dense "
            "view is right for all: set evaluation.dense_scale"
        )
    number = sum(view.num_patches for view in augmentations)
    mean = sum(view.num_patches * _mean_side(view, side) for view in augmentations) / number
    return augmentations[0].output_size / mean


def _mean_side(augmentation: PatchAugmentation, side: int) -> float:
    """Mean side in pixels of crops of a square image; of crops that are not square, sqrt(h w)."""
    if augmentation.patch_size is not None:
        return augmentation.patch_size
    low, high = augmentation.scale
    if low == high:
        return side * math.sqrt(low)
    return float(side * 2 / 3 * (high**1.5 - low**1.5) / (high - low))


def dense_side(
    size: Sequence[int], view: View, stride: int, window: Sequence[int] = (1, 1)
) -> tuple[int, int]:
    """Height and width of images of ``size`` in a dense view: kept, or multiples of the stride."""
    height, width = size
    scale = view.scale or dense_scale([view.patches], min(size))
    if scale == 1:
        return height, width
    cells = (round(scale * side / stride) for side in size)
    height, width = (max(least, of_side) * stride for least, of_side in zip(window, cells))
    return height, width


def find_pool(encode: Encode) -> nn.Module | None:
    """The last layer that averages a feature map to 1x1, if the network has one as a module."""
    module = _module_of(encode)
    pools = [
        layer
        for layer in (module.modules() if module else ())
        if isinstance(layer, nn.AdaptiveAvgPool2d) and layer.output_size in (1, (1, 1))
    ]
    return pools[-1] if pools else None


def map_of(
    encode: Encode, pool: nn.Module, side: int, device: torch.device | str = "cpu"
) -> tuple[tuple[int, int], int]:
    """Height and width of the last feature map of images of ``side`` pixels, and the map's stride.

    Raises:
        ValueError: if the pooling layer takes no map (b, c, h, w) in the network's forward pass.
    """
    sizes: list[torch.Size] = []
    hook = pool.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape))
    try:
        for pixels in (side, 64, 128):
            encode(torch.zeros(1, 3, pixels, pixels, device=device, dtype=_dtype(encode)))
    finally:
        hook.remove()
    if len(sizes) != 3 or len(sizes[0]) != 4:
        raise ValueError(
            f"the layer {pool} is not where this network averages its last feature map"
        )
    (*_, height, width), small, large = sizes
    return (height, width), round(64 / (large[-1] - small[-1]))


@contextmanager
def _windows_in_place_of_pooling(pool: nn.Module, window: tuple[int, int]) -> Iterator[None]:
    """Within it, the layer gives the means over the map's windows, as rows after the usual ones.

    So whatever follows the layer is applied to every window, as to an image of its own.
    """

    def add_windows(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        means = F.avg_pool2d(inputs[0], window, stride=1).flatten(2).transpose(1, 2).flatten(0, 1)
        return torch.cat([output, means.reshape(len(means), *output.shape[1:])])

    hook = pool.register_forward_hook(add_windows)
    try:
        yield
    finally:
        hook.remove()


def _whole_and_windows(out: Tensor | Named, b: int) -> Named:
    """Rows of b images and then of their windows -> (b, 2, f): the image's, its windows' mean."""
    return {
        name: torch.stack([x[:b], x[b:].unflatten(0, (b, -1)).mean(1)], dim=1)
        for name, x in _named(out).items()
    }


# networks, devices and data of any kind


def _module_of(encode: Encode) -> nn.Module | None:
    module = encode if isinstance(encode, nn.Module) else getattr(encode, "__self__", None)
    return module if isinstance(module, nn.Module) else None


@contextmanager
def _evaluating(encode: Encode) -> Iterator[None]:
    """Within it, the network is in evaluation mode."""
    module = _module_of(encode)
    if module is None or not module.training:
        yield
        return
    module.eval()
    try:
        yield
    finally:
        module.train()


def _device(encode: Encode, device: torch.device | str | None) -> torch.device:
    if device is not None:
        try:
            return torch.device(device)
        except RuntimeError as error:
            raise ValueError(
                f"unknown device '{device}': use cpu, cuda, cuda:1, mps, ..."
            ) from error
    module = _module_of(encode)
    tensors = (*module.parameters(), *module.buffers()) if module else ()
    return tensors[0].device if tensors else torch.device("cpu")


def _dtype(encode: Encode) -> torch.dtype:
    module = _module_of(encode)
    return next((p.dtype for p in module.parameters()), torch.float32) if module else torch.float32


def _precision(device: torch.device, bf16: bool) -> Any:
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


def _loader(data: Data, num_workers: int) -> DataLoader[Any]:
    if isinstance(data, DataLoader):
        return data
    return DataLoader(
        EvaluationDataset(data) if isinstance(data, OURS) else data,
        BATCH,
        collate_fn=as_it_is if isinstance(data, OURS) else _collate,
        num_workers=num_workers,
        worker_init_fn=ignore_signals,
        pin_memory=torch.cuda.is_available(),
    )


def _collate(samples: list[tuple[Any, ...]]) -> Any:
    """torch's own, with PIL images as uint8 tensors (3, h, w)."""
    return default_collate([(_tensor(image), *others) for image, *others in samples])


def _tensor(image: Any) -> Any:
    return pil_to_tensor(image.convert("RGB")) if isinstance(image, Image.Image) else image


def pixel_features(
    data: ImageData | ImageFiles,
    mean: tuple[float, ...] = HALF,
    std: tuple[float, ...] = HALF,
    num_workers: int = 0,
) -> Features:
    """The normalised pixels (N, 3 s s), which any features have to beat; large images at 32x32."""
    chunks = []
    for images in in_order(data, BATCH, num_workers):
        x = normalise(images, mean, std)
        large = x.shape[-1] > PIXEL_FEATURES_SIDE
        chunks.append((F.adaptive_avg_pool2d(x, PIXEL_FEATURES_SIDE) if large else x).flatten(1))
    return Features({"pixels": torch.cat(chunks)}, data.targets)

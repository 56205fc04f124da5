"""Features of a dataset: of whole images, or bags of features (the mean over many patches; arXiv 2304.03977)."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from emp_plugin.data import ImageData, ImageFiles, generator, in_order, normalise
from emp_plugin.errors import UserError
from emp_plugin.solo_learn import backbone_of
from emp_plugin.transforms import BatchMultiPatch, PatchAugmentation

BAG = 2  # random stream of the evaluation's patches; 0 and 1 are training's
IMAGES_PER_DRAW = 100  # patches are drawn for this many images at a time, whatever fits the memory, so that they never depend on it
FORWARD_PIXELS = {
    "cpu": 200 * 32 * 32,
    "cuda": 2000 * 32 * 32,
}  # of the images or patches in one forward pass; a CPU's caches hold the activations of few
PIXEL_FEATURES_SIDE = 32  # larger images are averaged down to this before their pixels are features


class Features(NamedTuple):
    """Features by name, each float32 (N, f) on the CPU, and labels int64 (N,), in the order of the dataset."""

    features: dict[str, Tensor]
    targets: Tensor


def feature_function(method: nn.Module) -> Callable[[Tensor], dict[str, Tensor]]:
    """What to probe of a method: its own ``features`` where it has one (EMP: backbone and embedding), else the backbone's output."""
    if hasattr(method, "features"):
        return method.features
    return lambda x: {
        "backbone": backbone_of(method)(x.contiguous(memory_format=torch.channels_last))
    }


def extract_features(
    method: nn.Module,
    data: ImageData | ImageFiles,
    augmentation: PatchAugmentation,
    view: str = "whole",
    num_patches: int = 128,
    augmented: bool = True,
    seed: int = 0,
    bf16: bool = False,
    description: str = "features",
    num_workers: int = 0,
) -> Features:
    """Features and labels of a dataset under a method in evaluation mode, on the device the method is on.

    Args:
        method: a solo-learn method (or any module :func:`feature_function` understands).
        data: images.
        augmentation: gives the normalisation and, for bags, the patches.
        view: ``whole`` (the image as it is) or ``bag`` (mean over ``num_patches`` patches).
        num_patches: patches of a bag.
        augmented: augment a bag's patches as in training, or only crop and resize them.
        seed: of the bag's patches, which depend on it and on the image's place in the dataset alone.
        bf16: run the network under bfloat16 autocast.
        description: label of the progress bar.
        num_workers: processes that decode images on disk.

    Raises:
        ValueError: for an unknown view.
        UserError: for features that are not finite: probes would give them a chance's accuracy.
    """
    if view not in ("whole", "bag"):
        raise ValueError(f"view must be 'whole' or 'bag', got '{view}'")
    device = next(method.parameters()).device
    function = feature_function(method)
    patches = BatchMultiPatch.from_augmentation(
        (augmentation if augmented else augmentation.plain()).with_patches(num_patches)
    )
    side = data.fetch(torch.tensor([0])).shape[-1]
    step = max(1, FORWARD_PIXELS[device.type] // side**2) if view == "whole" else IMAGES_PER_DRAW
    chunks: list[dict[str, Tensor]] = []
    was_training = method.training
    method.eval()
    try:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            batches = track(
                in_order(data, step, num_workers),
                total=math.ceil(len(data) / step),
                description=description,
                transient=True,
            )
            for number, images in enumerate(batches):
                images = images.to(device, non_blocking=True)
                if view == "whole":
                    out = {
                        name: x.float()
                        for name, x in function(
                            normalise(images, augmentation.mean, augmentation.std)
                        ).items()
                    }
                else:
                    out = _bag(function, images, patches, generator(seed, BAG, number * step))
                chunks.append({name: x.cpu() for name, x in out.items()})
    finally:
        method.train(was_training)
    features = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
    if not all(x.isfinite().all() for x in features.values()):
        raise UserError(
            f"{description}: there are features that are NaN or infinite, so the weights are broken: the training diverged. "
            "Evaluate an earlier checkpoint, or train with a smaller optimizer.lr"
        )
    return Features(features, data.targets)


def _bag(
    function: Callable, images: Tensor, patches: BatchMultiPatch, draws: torch.Generator
) -> dict[str, Tensor]:
    """Mean features over each image's patches: images uint8 (b, 3, H, W) -> (b, f) by name."""
    b, n = len(images), patches.augmentation.num_patches
    parameters = patches.sample(b, *images.shape[-2:], draws)
    total: dict[str, Tensor] = {}
    at_once = max(1, FORWARD_PIXELS[images.device.type] // patches.augmentation.output_size**2 // b)
    for first in range(0, n, at_once):
        made = patches.make(images, parameters.select(patches=slice(first, first + at_once)))
        for name, x in function(made.flatten(0, 1)).items():
            part = x.float().unflatten(0, (-1, b)).sum(0)
            total[name] = total[name] + part if name in total else part
    return {name: x / n for name, x in total.items()}


def pixel_features(
    data: ImageData | ImageFiles, augmentation: PatchAugmentation, num_workers: int = 0
) -> Features:
    """The normalised pixels themselves (N, 3 s s): what any features have to beat. Large images are averaged down to 32x32 first."""
    chunks = []
    for images in in_order(data, IMAGES_PER_DRAW, num_workers):
        x = normalise(images, augmentation.mean, augmentation.std)
        chunks.append(
            (
                F.adaptive_avg_pool2d(x, PIXEL_FEATURES_SIDE)
                if x.shape[-1] > PIXEL_FEATURES_SIDE
                else x
            ).flatten(1)
        )
    return Features({"pixels": torch.cat(chunks)}, data.targets)

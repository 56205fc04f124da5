"""What an evaluation consists of: protocols as constants, and the rows that they give."""

import itertools
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from emp_plugin.data import ImageData, ImageFiles
from emp_plugin.evaluation.probes import (
    Accuracy,
    labelled_part,
    linear_probe,
    nearest,
    top_k,
    vote,
    votes_of,
)
from emp_plugin.evaluation.views import (
    Encode,
    Features,
    View,
    dense_scale,
    extract_views,
    find_pool,
    pixel_features,
)
from emp_plugin.transforms import PatchAugmentation

KNN = {"knn": (20, 0.07), "knn10": (10, None)}  # neighbours, and the temperature of their votes
TRAINED = ("linear", "mlp", "published")  # probes by SGD
PROBES = (*TRAINED, *KNN)
PIXELS, UNTRAINED = "raw pixels", "untrained"  # the models that stand beside a method


@dataclass(frozen=True)
class Protocol:
    """Views and probes of an evaluation. No machine changes them.

    Args:
        views: names of :class:`View`.
        probes: ``linear`` (standardised features), ``published`` (the EMP-SSL authors', on raw
            ones), ``mlp``, ``knn`` (solo-learn's: cosine, k 20, T 0.07), ``knn10`` (k 10,
            unweighted, cosine).
        bag_patches, bag_augmented: of the view ``bag``.
        images: at most so many of the training and of the evaluation images, of every class alike.
    """

    views: tuple[str, ...]
    probes: tuple[str, ...]
    bag_patches: int = 16
    bag_augmented: bool = False
    images: tuple[int, int] | None = None


PROTOCOLS = {
    "standard": Protocol(("whole", "dense"), ("linear", "knn", "knn10")),
    # of arXiv 2304.03977 and its authors' program, for cells beside the paper's
    "published": Protocol(("bag",), ("published",), bag_patches=128, bag_augmented=True),
    # for choices and for points on the way; never in a published table
    "quick": Protocol(("whole", "dense"), ("linear", "knn", "knn10"), images=(10_000, 2_000)),
}


@dataclass(frozen=True)
class LinearProbe:
    """Settings of the SGD of :func:`linear_probe`."""

    epochs: int = 100
    lr: float = 0.03
    weight_decay: float = 5e-5
    batch_size: int = 100


@dataclass(frozen=True)
class MLPProbe(LinearProbe):
    """A linear probe with one hidden layer of ReLUs, for the evaluation of arXiv 2303.01986.

    The paper's code (FFCV-SSL) has linear probes alone, so the settings are ours: those of the
    linear probe, and the width of a ResNet-18's features.
    """

    hidden: int = 512


@dataclass(frozen=True)
class Evaluation:
    """The settings of an evaluation: of a configuration's ``evaluation``.

    Raw pixels and the untrained network stand beside a method, if ``references``.
    """

    enabled: bool = True
    # standard, published or quick, whose views and probes are below; custom: with others
    protocol: str = "standard"
    # of whole, dense, bag; of linear, published, mlp, knn, knn10
    views: list[str] = field(default_factory=lambda: list(PROTOCOLS["standard"].views))
    probes: list[str] = field(default_factory=lambda: list(PROTOCOLS["standard"].probes))
    bag_patches: int = PROTOCOLS["standard"].bag_patches
    bag_augmented: bool = PROTOCOLS["standard"].bag_augmented
    # how many times a dense view enlarges images; None: what the augmentations say
    dense_scale: float | None = None
    # the probes learn from these parts of the training labels
    label_fractions: list[float] = field(default_factory=lambda: [1.0])
    linear: LinearProbe = field(default_factory=LinearProbe)
    mlp: MLPProbe = field(default_factory=MLPProbe)
    # raw pixels and the untrained network beside it; a comparison has them once
    references: bool = True


class Network(NamedTuple):
    """A frozen network to probe."""

    name: str  # in the rows
    encode: Encode  # images -> features by name
    pool: nn.Module | None = None  # see extract_views
    online: nn.Module | None = None  # a linear classifier trained along with it, on "backbone"


def evaluate(
    networks: Sequence[Network],
    train: ImageData | ImageFiles,
    test: ImageData | ImageFiles,
    augmentations: Sequence[PatchAugmentation],
    settings: Evaluation,
    *,
    seed: int = 0,
    bf16: bool = False,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
    done: Collection[str] = (),
) -> Iterator[dict[str, Any]]:
    """Probe the features of frozen networks, and raw pixels if ``settings.references``.

    Args:
        networks: on ``device``.
        train, test: the probes learn on the first and are scored on the second.
        augmentations: of the training; the first has the normalisation and a bag's patches.
        settings: views, probes, and what they are made with.
        seed: of a bag's patches.
        bf16: run the networks under bfloat16 autocast.
        device: for networks and probes.
        num_workers: processes that decode images on disk.
        done: names of models whose rows are there already.

    Yields:
        A row (dict) per model, view, features, probe and part of the labels: ``model, features,
        view, view_patches, augmented, scale, probe, labels, protocol, precision, top1, top5``
        (percent) and ``seconds``.
    """
    images = PROTOCOLS[settings.protocol].images if settings.protocol in PROTOCOLS else None
    if images:
        train, test = (_part(data, most) for data, most in zip((train, test), images))
    common = {"protocol": settings.protocol, "precision": "bf16" if bf16 else "32"}
    first = augmentations[0]
    classes = len(train.classes)
    if settings.references and PIXELS not in done:
        pixels = [
            pixel_features(data, first.mean, first.std, num_workers) for data in (train, test)
        ]
        of_pixels = common | {"model": PIXELS, "precision": "32"} | _columns(View("whole"), 1.0)
        yield from _probe(of_pixels, pixels, classes, settings, 0.0, device)
    side = train.fetch(torch.tensor([0])).shape[-1]
    for network in networks:
        if network.name in done:
            continue
        began = time.perf_counter()
        views = views_of(network, settings, augmentations, side)
        sets = [
            extract_views(
                network.encode,
                data,
                views,
                pool=network.pool,
                mean=first.mean,
                std=first.std,
                seed=seed,
                bf16=bf16,
                device=device,
                num_workers=num_workers,
                description=f"{network.name}, {split}",
            )
            for split, data in (("train", train), ("test", test))
        ]
        seconds = (time.perf_counter() - began) / len(views)
        for view, (of_train, scale), (of_test, _) in zip(views, *sets):
            about = common | {"model": network.name} | _columns(view, scale)
            yield from _probe(about, (of_train, of_test), classes, settings, seconds, device)
            if network.online is not None and "linear" in settings.probes:
                accuracy = _online_accuracy(network.online, of_test, device)
                yield about | _result("backbone", "online linear", 1.0, accuracy, seconds)


def views_of(
    network: Network,
    settings: Evaluation,
    augmentations: Sequence[PatchAugmentation],
    side: int,
) -> list[View]:
    """The views of a network, which has a bag of 16 plain patches for dense if it has no map.

    Args:
        side: of the images in pixels.

    Raises:
        ValueError: as :func:`dense_scale`.
    """
    has_map = (network.pool or find_pool(network.encode)) is not None
    views = []
    for name in settings.views:
        if name == "dense" and has_map:
            scale = settings.dense_scale or dense_scale(augmentations, side)
            views.append(View("dense", augmentations[0], scale=scale))
        elif name == "dense":
            views.append(View("bag", augmentations[0], num_patches=16))
        elif name == "bag":
            bag = View("bag", augmentations[0], settings.bag_patches, settings.bag_augmented)
            views.append(bag)
        else:
            views.append(View("whole"))
    return views


def _part(data: ImageData | ImageFiles, most: int) -> ImageData | ImageFiles:
    """At most so many images, of every class the same share."""
    if len(data) <= most:
        return data
    return data.subset(torch.arange(len(data))[labelled_part(data.targets, most / len(data))])


def _probe(
    about: dict[str, Any],
    sets: Sequence[Features],
    num_classes: int,
    settings: Evaluation,
    seconds: float,
    device: torch.device | str,
) -> Iterator[dict[str, Any]]:
    """The rows of one view of a model, from the features of the training and of the test set."""
    train, test = sets
    for name, fraction in itertools.product(train.features, settings.label_fractions):
        part = labelled_part(train.targets, fraction)
        data = train.features[name][part], train.targets[part], test.features[name], test.targets
        # on the embedding's 4096 columns these probes would take most of a quick evaluation's time
        left_out = TRAINED if settings.protocol == "quick" and name == "embedding" else ()
        probes = [probe for probe in settings.probes if probe not in left_out]
        for probe, accuracy, spent in _accuracies(data, probes, num_classes, settings, device):
            yield about | _result(name, probe, fraction, accuracy, seconds + spent)


def _accuracies(
    data: tuple[Tensor, Tensor, Tensor, Tensor],
    probes: Sequence[str],
    num_classes: int,
    settings: Evaluation,
    device: torch.device | str,
) -> Iterator[tuple[str, Accuracy, float]]:
    """(probe, accuracy, seconds) of features and labels to train on and to be scored on."""
    neighbours = None
    for probe in probes:
        began = time.perf_counter()
        if probe in KNN:
            k, temperature = KNN[probe]
            x, y, u, v = (tensor.to(device) for tensor in data)
            if neighbours is None:  # the most that any of them asks for, the nearest first
                neighbours = nearest(x, u, max(k for k, _ in KNN.values()))
            similarity, indices = (of_all[:, :k] for of_all in neighbours)
            accuracy = vote(votes_of(similarity, temperature), indices, y, v)
        else:
            sgd = asdict(settings.mlp if probe == "mlp" else settings.linear)
            raw = probe == "published"
            accuracy = linear_probe(*data, num_classes, raw=raw, device=device, **sgd)
        yield probe, accuracy, time.perf_counter() - began


def _online_accuracy(online: nn.Module, test: Features, device: torch.device | str) -> Accuracy:
    with torch.inference_mode():
        scores = online(test.features["backbone"].to(device))
    return top_k(scores, test.targets.to(device))


def _columns(view: View, scale: float) -> dict[str, Any]:
    is_bag = view.name == "bag"
    return {
        "view": view.name,
        "view_patches": view.num_patches if is_bag else None,
        "augmented": is_bag and view.augmented,
        "scale": round(scale, 4),
    }


def _result(
    features: str, probe: str, labels: float, accuracy: Accuracy, seconds: float
) -> dict[str, Any]:
    return {
        "features": features,
        "probe": probe,
        "labels": labels,
        "top1": round(accuracy.top1, 2),
        "top5": round(accuracy.top5, 2),
        "seconds": round(seconds, 1),
    }

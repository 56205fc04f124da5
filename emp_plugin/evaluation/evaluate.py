"""The evaluation of a run: every view, feature and probe of the method, of the same method untrained, and of raw pixels."""

import itertools
import time
from collections.abc import Collection, Iterator
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from emp_plugin.data import ImageData, ImageFiles
from emp_plugin.evaluation.features import Features, extract_features, pixel_features
from emp_plugin.evaluation.probes import Accuracy, knn_probe, labelled_part, linear_probe, top_k
from emp_plugin.transforms import PatchAugmentation


def evaluate(
    trained: nn.Module,
    untrained: nn.Module,
    name: str,
    train: ImageData | ImageFiles,
    test: ImageData | ImageFiles,
    augmentation: PatchAugmentation,
    settings: DictConfig,
    seed: int,
    bf16: bool,
    num_workers: int = 0,
    online: nn.Module | None = None,
    done: Collection[tuple[str, str]] = (),
) -> Iterator[dict[str, Any]]:
    """Probe the features of a trained method beside those of the untrained one and raw pixels, the quickest first.

    Args:
        trained, untrained: methods, on the device to use.
        name: of the trained method, for its rows.
        train, test: the probes learn on the first and are scored on the second.
        augmentation: normalisation and patches.
        settings: the configuration's ``evaluation``; without its ``references`` only the trained method is probed.
        seed: of the patches.
        bf16: run the networks under bfloat16 autocast.
        num_workers: processes that decode images on disk.
        online: the linear classifier that solo-learn trained along with the method, if it knows these labels: scored on the backbone's
            features beside the ``linear`` probe; of whole images that is the validation's accuracy.
        done: (model, view) of rows that are there already.

    Yields:
        One row (dict) per model, feature, view, probe and fraction of the labels: ``model, features, view, probe, labels, top1, top5`` (percent)
        and ``seconds``.
    """
    device = next(trained.parameters()).device
    models = [(name, trained)]
    if settings.references:
        models.append(("untrained", untrained))
        if ("raw pixels", "whole") not in done:
            pixels = (
                pixel_features(train, augmentation, num_workers),
                pixel_features(test, augmentation, num_workers),
            )
            yield from _probe(
                "raw pixels", "whole", *pixels, len(train.classes), settings, 0.0, device
            )
    kind = "augmented" if settings.bag_augmented else "plain"
    for view in settings.views:
        label = f"bag of {settings.bag_patches} {kind}" if view == "bag" else view
        for model, method in models:
            if (model, label) in done:
                continue
            began = time.perf_counter()
            features = [
                extract_features(
                    method,
                    data,
                    augmentation,
                    view,
                    settings.bag_patches,
                    settings.bag_augmented,
                    seed,
                    bf16,
                    f"{model}, {view}, {split}",
                    num_workers,
                )
                for split, data in (("train", train), ("test", test))
            ]
            seconds = time.perf_counter() - began
            yield from _probe(
                model, label, *features, len(train.classes), settings, seconds, device
            )
            if method is trained and online is not None and "linear" in settings.probes:
                yield _row(
                    model,
                    "backbone",
                    label,
                    "online linear",
                    1.0,
                    _online_accuracy(online, features[1], device),
                    seconds,
                )


def _online_accuracy(online: nn.Module, test: Features, device: torch.device) -> Accuracy:
    with torch.inference_mode():
        return top_k(online(test.features["backbone"].to(device)), test.targets.to(device))


def _probe(
    model: str,
    view: str,
    train: Features,
    test: Features,
    num_classes: int,
    settings: DictConfig,
    seconds: float,
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    for name, fraction in itertools.product(train.features, settings.label_fractions):
        labelled = labelled_part(train.targets, fraction)
        for probe in settings.probes:
            began = time.perf_counter()
            arguments = (
                train.features[name][labelled],
                train.targets[labelled],
                test.features[name],
                test.targets,
            )
            if probe == "knn":
                accuracy = knn_probe(*arguments, device=device)
            else:
                accuracy = linear_probe(
                    *arguments, num_classes, device=device, **settings[probe]
                )  # of settings.linear or settings.mlp
            yield _row(
                model, name, view, probe, fraction, accuracy, seconds + time.perf_counter() - began
            )


def _row(
    model: str,
    features: str,
    view: str,
    probe: str,
    labels: float,
    accuracy: Accuracy,
    seconds: float,
) -> dict[str, Any]:
    return {
        "model": model,
        "features": features,
        "view": view,
        "probe": probe,
        "labels": labels,
        "top1": round(accuracy.top1, 2),
        "top5": round(accuracy.top5, 2),
        "seconds": round(seconds, 1),
    }

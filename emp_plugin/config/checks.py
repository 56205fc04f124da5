"""Rules that a composed configuration must meet, each with the error that says what to do."""

import math
from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from typing import Any

from emp_plugin.config.models import Run
from emp_plugin.data.datasets import IMAGE_SIZE, NUM_CLASSES, RESIZABLE
from emp_plugin.errors import UserError
from emp_plugin.evaluation.protocol import PROBES, PROTOCOLS, Evaluation, LinearProbe
from emp_plugin.evaluation.views import VIEWS, dense_scale
from emp_plugin.transforms import PatchAugmentation, augmentation_from_config

CUSTOM = "custom"  # the protocol of an evaluation with views or probes of its own
PRECISIONS = ("32", "32-true", "16-mixed", "bf16-mixed")  # images reach the network as float32
COMPILE = ("off", "default", "reduce-overhead")  # the latter two are torch.compile's modes
TRANSFORMERS = ("vit", "swin")  # built for one size of images


def augmentations(cfg: Run) -> list[PatchAugmentation]:
    """The augmentations of a run, one per entry of ``augmentations``.

    Raises:
        UserError: for an entry that cannot work.
    """
    try:
        return [augmentation_from_config(entry) for entry in cfg.augmentations]
    except (ValueError, TypeError) as error:
        raise UserError(f"augmentations: {error}") from error


def backbone_kwargs(cfg: Run) -> dict[str, Any]:
    """``backbone.kwargs``; a transformer's have the size of the views that it is built for."""
    size = cfg.augmentations[0].get("crop_size") if cfg.augmentations else None
    of_size = {"img_size": size} if cfg.backbone.name.startswith(TRANSFORMERS) and size else {}
    return of_size | cfg.backbone.kwargs


def input_size(cfg: Run) -> int | None:
    """Side in pixels of the only images that a transformer takes; None for other networks."""
    is_transformer = cfg.backbone.name.startswith(TRANSFORMERS)
    return backbone_kwargs(cfg).get("img_size") if is_transformer else None


def _at_least_1(value: float) -> bool:
    return value >= 1


def _positive(value: float) -> bool:
    return 0 < value < math.inf


def _finite(value: float) -> bool:
    return 0 <= value < math.inf


# settings, what has to hold of each, and how that is said: "<name> must <...>"
Rules = tuple[tuple[str, Callable[[Any], Any], str], ...]
RULES_OF_EVALUATION: Rules = (
    (
        "views",
        lambda views: views and set(views) <= set(VIEWS),
        f"be of {', '.join(VIEWS)} (evaluation.enabled=False skips the evaluation)",
    ),
    (
        "probes",
        lambda probes: probes and set(probes) <= set(PROBES),
        f"be of {', '.join(PROBES)}",
    ),
    ("bag_patches", _at_least_1, "be at least 1"),
    ("dense_scale", lambda scale: scale is None or _positive(scale), "be positive"),
    ("label_fractions", lambda parts: parts and all(0 < p <= 1 for p in parts), "be in (0, 1]"),
    ("linear.epochs", _at_least_1, "be at least 1"),
    ("linear.batch_size", _at_least_1, "be at least 1"),
    ("linear.lr", _positive, "be positive and finite"),
    ("mlp.epochs", _at_least_1, "be at least 1"),
    ("mlp.batch_size", _at_least_1, "be at least 1"),
    ("mlp.lr", _positive, "be positive and finite"),
    ("mlp.hidden", _at_least_1, "be at least 1"),
)
RULES: Rules = (
    ("data.num_workers", lambda count: count >= 0, "not be negative"),
    ("data.views", lambda views: views in ("device", "image"), "be device or image"),
    ("data.fraction", lambda part: part == -1 or 0 < part <= 1, "be -1 (all) or in (0, 1]"),
    ("data.holdout", lambda part: 0 <= part < 1, "be between 0 and 1"),
    (
        "data.window",
        lambda window: window is None or len(window) == 2 and window[0] < window[1],
        "be two numbers, the lower first",
    ),
    ("seed", lambda seed: seed >= 0, "not be negative"),
    ("max_epochs", _at_least_1, "be at least 1"),
    ("precision", lambda name: name in PRECISIONS, f"be one of {', '.join(PRECISIONS)}"),
    ("accumulate_grad_batches", _at_least_1, "be at least 1"),
    ("knn_eval.k", _at_least_1, "be at least 1"),
    ("performance.compile", lambda mode: mode in COMPILE, f"be one of {', '.join(COMPILE)}"),
    ("optimizer.batch_size", lambda images: images >= 2, "be at least 2 (BatchNorm needs it)"),
    ("optimizer.lr", _positive, "be positive and finite"),
    ("optimizer.weight_decay", _finite, "be finite and not negative"),
    ("optimizer.classifier_lr", _finite, "be finite and not negative"),
    ("scheduler.warmup_epochs", _finite, "be finite and not negative"),
    ("scheduler.warmup_start_lr", _finite, "be finite and not negative"),
    ("scheduler.min_lr", _finite, "be finite and not negative"),
    ("scheduler.interval", lambda unit: unit == "step", "be step: a run may have one epoch"),
    ("momentum.base_tau", lambda tau: 0 <= tau <= 1, "be in [0, 1]"),
    ("momentum.final_tau", lambda tau: 0 <= tau <= 1, "be in [0, 1]"),
    ("checkpoint.frequency", _at_least_1, "be at least 1"),
    ("checkpoint.every_n_steps", _at_least_1, "be at least 1"),
    ("checkpoint.keep_every_n_steps", lambda n: n is None or n >= 1, "be at least 1"),
    ("checkpoint.min_seconds", lambda seconds: seconds >= 0, "not be negative"),
)


def _require(condition: Any, message: str) -> None:
    if not condition:
        raise UserError(message)


def _obey(settings: Run | Evaluation, rules: Rules, prefix: str = "") -> None:
    for name, holds, rule in rules:
        value = attrgetter(name)(settings)
        _require(holds(value), f"{prefix}{name} must {rule}, got {value}")


def check_run(cfg: Run) -> None:
    """Check the settings of a run against each other and against what can be trained.

    Raises:
        UserError: for the first one that cannot work.
    """
    dataset, side = cfg.data.dataset, cfg.data.image_size
    _require(
        dataset in NUM_CLASSES,
        f"unknown data.dataset '{dataset}'; choose one of {', '.join(NUM_CLASSES)}",
    )
    _require(
        side is None or (dataset in RESIZABLE and side >= 1),
        f"data.image_size is a number of pixels, for {', '.join(RESIZABLE)}; "
        f"images of {dataset} have {IMAGE_SIZE[dataset]} (data.image_size=null)",
    )
    _require(
        dataset == "custom" or not cfg.data.no_labels,
        f"data.no_labels would do nothing: it is for data.dataset=custom, not {dataset}",
    )
    _require(
        dataset != "digits" or cfg.data.window is None,
        "data.window would do nothing: digits are not read from files",
    )
    _obey(cfg, RULES)
    _require(
        cfg.trainer.get("max_steps", -1) == -1,
        "max_steps is not supported: "
        "set max_epochs, and limit_train_batches for a part of an epoch",
    )
    _require(
        cfg.performance.compile == "off" or not cfg.method_kwargs.get("patch_chunk"),
        "performance.compile does not go with method_kwargs.patch_chunk: set one of them only",
    )
    _check_optimizer_kwargs(cfg.optimizer.kwargs)
    _check_views(cfg)


def _check_optimizer_kwargs(kwargs: dict[str, Any]) -> None:
    for name, value in kwargs.items():
        _require(
            isinstance(value, list if name == "betas" else (int, float)),
            f"optimizer.kwargs.{name} must be a number (betas: two), got '{value}'",
        )
    momentum, eta = kwargs.get("momentum", 0.9), kwargs.get("eta", 0.02)
    _require(0 <= momentum < 1, f"optimizer.kwargs.momentum must be in [0, 1), got {momentum}")
    _require(_positive(eta), f"optimizer.kwargs.eta must be positive and finite, got {eta}")
    _require(
        momentum != 0 or not kwargs.get("nesterov"),
        "optimizer.kwargs.nesterov needs a momentum, got 0",
    )


def _check_views(cfg: Run) -> None:
    """The augmentations: possible, of these images, and what the backbone takes."""
    _require(len(cfg.augmentations) > 0, "augmentations is empty")
    _require(
        cfg.method != "emp" or len(cfg.augmentations) == 1,
        "emp takes one augmentation (its num_crops is the number of patches)",
    )
    side = cfg.data.image_size or IMAGE_SIZE[cfg.data.dataset]
    made, built_for = augmentations(cfg), input_size(cfg)
    for augmentation in made:
        patch, view = augmentation.patch_size, augmentation.output_size
        _require(
            patch is None or patch <= side,
            f"patch_size {patch} is larger than the images of {cfg.data.dataset} ({side})",
        )
        _require(
            built_for in (None, view),
            f"{cfg.backbone.name} is built for {built_for}x{built_for} pixels, "
            f"but views have {view}x{view}",
        )
    if cfg.evaluation.enabled and "dense" in cfg.evaluation.views:
        try:
            cfg.evaluation.dense_scale or dense_scale(made, side)
        except ValueError as error:
            raise UserError(str(error)) from error
    evaluated = cfg.evaluation.enabled and "whole" in cfg.evaluation.views
    validated = cfg.limit_val_batches != 0
    if evaluated or validated:
        check_whole_images(cfg, side)


def check_whole_images(cfg: Run, side: int) -> None:
    """Check that the backbone of a run takes whole images of ``side`` pixels.

    Raises:
        UserError: for a transformer whose patches were resized to another size.
    """
    built_for = input_size(cfg)
    _require(
        built_for in (None, side),
        f"{cfg.backbone.name} is built for {built_for}x{built_for} pixels "
        f"and cannot take whole images of {side}x{side}: "
        "set evaluation.views=[bag], and for pretraining limit_val_batches=0",
    )


def check_evaluation(settings: Evaluation) -> Evaluation:
    """Check the settings of an evaluation; those of no protocol are of the protocol "custom".

    Raises:
        UserError: for the first one that cannot work.
    """
    _require(
        settings.protocol in (*PROTOCOLS, CUSTOM),
        f"evaluation.protocol must be one of {', '.join(PROTOCOLS)}, got '{settings.protocol}'",
    )
    usual = of_protocol(settings.protocol)
    changed = [name for name, value in usual.items() if getattr(settings, name) != value]
    changed += ["linear"] if settings.linear != LinearProbe() else []
    _require(
        not changed or settings.protocol in ("standard", CUSTOM),
        f"evaluation.protocol={settings.protocol} is a constant: leave it out to set evaluation."
        f"{', evaluation.'.join(changed)}",
    )
    _obey(settings, RULES_OF_EVALUATION, "evaluation.")
    bag = [name for name in changed if name.startswith("bag_")]
    _require(
        not bag or "bag" in settings.views,
        f"evaluation.{', evaluation.'.join(bag)} would do nothing: the view bag is not among "
        "evaluation.views",
    )
    _require(
        settings.dense_scale is None or "dense" in settings.views,
        "evaluation.dense_scale would do nothing: the view dense is not among evaluation.views",
    )
    return replace(settings, protocol=CUSTOM) if changed else settings


def of_protocol(name: Any) -> dict[str, Any]:
    """The settings of an evaluation that a protocol decides; of an unknown one, the standard's."""
    protocol = PROTOCOLS.get(str(name), PROTOCOLS["standard"])
    lists = {"views": list(protocol.views), "probes": list(protocol.probes)}
    return lists | {"bag_patches": protocol.bag_patches, "bag_augmented": protocol.bag_augmented}

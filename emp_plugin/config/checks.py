"""Rules that a composed configuration must meet, each with the error that says what to do."""

import math
from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from typing import Any

from emp_plugin.config.models import Run
from emp_plugin.data.datasets import IMAGE_SIZE, NUM_CLASSES, RESIZABLE
from emp_plugin.errors import UserError
from emp_plugin.evaluation import PROTOCOLS, Evaluation, LinearProbe
from emp_plugin.evaluation.protocol import PROBES
from emp_plugin.evaluation.views import VIEWS, dense_scale
from emp_plugin.transforms import PatchAugmentation, augmentation_from_config

CUSTOM = "custom"  # the protocol of an evaluation with views or probes of its own
OF_PROTOCOL = ("views", "probes", "bag_patches", "bag_augmented")
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


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _must(cfg: Run, name: str, holds: Callable[[Any], bool], rule: str) -> None:
    """Raises UserError, "<name> must <rule>, got <value>", unless ``holds`` of the setting."""
    value = attrgetter(name)(cfg)
    _require(holds(value), f"{name} must {rule}, got {value}")


def _at_least_1(value: float) -> bool:
    return value >= 1


def _positive(value: float) -> bool:
    return 0 < value < math.inf


def _not_negative(value: float) -> bool:
    return value >= 0


def check_run(cfg: Run) -> None:
    """Check the settings of a run against each other and against what can be trained.

    Raises:
        UserError: for the first one that cannot work.
    """
    _check_data(cfg)
    _check_training(cfg)
    _check_optimisation(cfg)
    _check_checkpoints(cfg)
    _check_views(cfg)


def _check_data(cfg: Run) -> None:
    dataset, side = cfg.data.dataset, cfg.data.image_size
    _require(
        dataset in NUM_CLASSES,
        f"unknown data.dataset '{dataset}'; choose one of {', '.join(NUM_CLASSES)}",
    )
    _must(cfg, "data.num_workers", _not_negative, "not be negative")
    _must(cfg, "data.views", lambda views: views in ("device", "image"), "be device or image")
    _must(
        cfg,
        "data.fraction",
        lambda fraction: fraction == -1 or 0 < fraction <= 1,
        "be -1 (all) or in (0, 1]",
    )
    _must(cfg, "data.holdout", lambda part: not part or 0 < part < 1, "be between 0 and 1")
    _must(
        cfg,
        "data.window",
        lambda window: window is None or len(window) == 2 and window[0] < window[1],
        "be two numbers, the lower first",
    )
    _require(
        side is None or (dataset in RESIZABLE and side >= 1),
        f"data.image_size is a number of pixels, for {', '.join(RESIZABLE)}; "
        f"images of {dataset} have {IMAGE_SIZE[dataset]} (data.image_size=null)",
    )


def _check_training(cfg: Run) -> None:
    _must(cfg, "seed", _not_negative, "not be negative")
    _must(cfg, "max_epochs", _at_least_1, "be at least 1")
    _require(
        cfg.trainer.get("max_steps", -1) == -1,
        "max_steps is not supported: "
        "set max_epochs, and limit_train_batches for a part of an epoch",
    )
    known = f"be one of {', '.join(PRECISIONS)}"
    _must(cfg, "precision", lambda precision: precision in PRECISIONS, known)
    _must(cfg, "accumulate_grad_batches", _at_least_1, "be at least 1")
    _must(cfg, "knn_eval.k", _at_least_1, "be at least 1")
    _must(
        cfg, "performance.compile", lambda mode: mode in COMPILE, f"be one of {', '.join(COMPILE)}"
    )
    _require(
        cfg.performance.compile == "off" or not cfg.method_kwargs.get("patch_chunk"),
        "performance.compile does not go with method_kwargs.patch_chunk: set one of them only",
    )


def _check_optimisation(cfg: Run) -> None:
    _must(
        cfg,
        "optimizer.batch_size",
        lambda images: images >= 2,
        "be at least 2 (BatchNorm needs it)",
    )
    _must(cfg, "optimizer.lr", _positive, "be positive and finite")
    for name in (
        "optimizer.weight_decay",
        "optimizer.classifier_lr",
        "scheduler.warmup_epochs",
        "scheduler.warmup_start_lr",
        "scheduler.min_lr",
    ):
        _must(cfg, name, lambda value: 0 <= value < math.inf, "be finite and not negative")
    for name in ("momentum.base_tau", "momentum.final_tau"):
        _must(cfg, name, lambda tau: 0 <= tau <= 1, "be in [0, 1]")
    _require(
        cfg.scheduler.interval == "step",
        "scheduler.interval must be 'step': "
        "a schedule by epochs means nothing in a run of one epoch",
    )
    kwargs = cfg.optimizer.kwargs
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


def _check_checkpoints(cfg: Run) -> None:
    _must(cfg, "checkpoint.frequency", _at_least_1, "be at least 1")
    _must(cfg, "checkpoint.every_n_steps", _at_least_1, "be at least 1")
    _must(cfg, "checkpoint.min_seconds", _not_negative, "not be negative")
    if cfg.checkpoint.keep_every_n_steps is not None:
        _must(cfg, "checkpoint.keep_every_n_steps", _at_least_1, "be at least 1")


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
        check_dense(cfg, side)
    evaluated = cfg.evaluation.enabled and "whole" in cfg.evaluation.views
    validated = cfg.limit_val_batches != 0
    if evaluated or validated:
        check_whole_images(cfg, side)


def check_dense(cfg: Run, side: int) -> None:
    """Check that a dense view of images of ``side`` pixels has a scale, its own or a stated one.

    Raises:
        UserError: for augmentations of several sizes without ``evaluation.dense_scale``.
    """
    try:
        cfg.evaluation.dense_scale or dense_scale(augmentations(cfg), side)
    except ValueError as error:
        raise UserError(str(error)) from error


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
    protocol = of_protocol(settings.protocol)
    changed = [name for name in OF_PROTOCOL if getattr(settings, name) != protocol[name]]
    changed += ["linear"] if settings.linear != LinearProbe() else []
    _require(
        not changed or settings.protocol in ("standard", CUSTOM),
        f"evaluation.protocol={settings.protocol} is a constant: leave it out to set evaluation."
        f"{', evaluation.'.join(changed)}",
    )
    bag = [name for name in changed if name.startswith("bag_")]
    _require(
        settings.bag_patches >= 1,
        f"evaluation.bag_patches must be at least 1, got {settings.bag_patches}",
    )
    _require(
        not bag or "bag" in settings.views,
        f"evaluation.{', evaluation.'.join(bag)} would do nothing: the view bag is not among "
        "evaluation.views",
    )
    _require(
        len(settings.views) > 0 and set(settings.views) <= set(VIEWS),
        f"evaluation.views must be of {', '.join(VIEWS)}, got {settings.views}; "
        "evaluation.enabled=False skips the evaluation",
    )
    _require(
        len(settings.probes) > 0 and set(settings.probes) <= set(PROBES),
        f"evaluation.probes must be of {', '.join(PROBES)}, got {settings.probes}",
    )
    _require(
        settings.dense_scale is None or _positive(settings.dense_scale),
        f"evaluation.dense_scale must be positive, got {settings.dense_scale}",
    )
    fractions = settings.label_fractions
    _require(
        len(fractions) > 0 and all(0 < fraction <= 1 for fraction in fractions),
        f"evaluation.label_fractions are in (0, 1], got {fractions}",
    )
    for name, sgd in (("linear", settings.linear), ("mlp", settings.mlp)):
        _require(
            sgd.epochs >= 1 and sgd.lr > 0 and sgd.batch_size >= 1,
            f"evaluation.{name}: epochs and batch_size must be at least 1, lr positive",
        )
    hidden = settings.mlp.hidden
    _require(hidden >= 1, f"evaluation.mlp.hidden must be at least 1, got {hidden}")
    return replace(settings, protocol=CUSTOM) if changed else settings


def of_protocol(name: Any) -> dict[str, Any]:
    """The settings of an evaluation that a protocol decides; of an unknown one, the standard's."""
    protocol = PROTOCOLS.get(str(name), PROTOCOLS["standard"])
    values = {setting: getattr(protocol, setting) for setting in OF_PROTOCOL}
    return {
        setting: list(value) if isinstance(value, tuple) else value
        for setting, value in values.items()
    }

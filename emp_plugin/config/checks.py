"""Rules that a composed configuration must meet, each with the error that says what to do."""

import math
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from emp_plugin.config.models import LinearProbe
from emp_plugin.data.datasets import IMAGE_SIZE, NUM_CLASSES, RESIZABLE
from emp_plugin.errors import UserError
from emp_plugin.evaluation.protocol import PROBES, PROTOCOLS
from emp_plugin.evaluation.views import VIEWS, dense_scale
from emp_plugin.transforms import PatchAugmentation, augmentation_from_config

CUSTOM = "custom"  # the protocol of an evaluation with views or probes of its own
PRECISIONS = ("32", "32-true", "16-mixed", "bf16-mixed")  # images reach the network as float32
COMPILE = ("off", "default", "reduce-overhead")  # the latter two are torch.compile's modes
TRANSFORMERS = ("vit", "swin")  # built for one size of images


def augmentations(cfg: DictConfig) -> list[PatchAugmentation]:
    """The augmentations of a run, one per entry of ``augmentations``.

    Raises:
        UserError: for an entry that cannot work.
    """
    entries = [OmegaConf.to_container(entry) for entry in cfg.augmentations]
    try:
        return [augmentation_from_config(entry) for entry in entries]
    except (ValueError, TypeError) as error:
        raise UserError(f"augmentations: {error}") from error


def backbone_kwargs(cfg: DictConfig) -> dict[str, Any]:
    """``backbone.kwargs``; a transformer's have the size of the views that it is built for."""
    kwargs = OmegaConf.select(cfg, "backbone.kwargs") or {}
    kwargs = dict(OmegaConf.to_container(kwargs) if isinstance(kwargs, DictConfig) else kwargs)
    size = OmegaConf.select(cfg, "augmentations[0].crop_size")
    if cfg.backbone.name.startswith(TRANSFORMERS) and size:
        kwargs.setdefault("img_size", size)
    return kwargs


def input_size(cfg: DictConfig) -> int | None:
    """Side in pixels of the only images that a transformer takes; None for other networks."""
    is_transformer = cfg.backbone.name.startswith(TRANSFORMERS)
    return backbone_kwargs(cfg).get("img_size") if is_transformer else None


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _must(cfg: DictConfig, name: str, holds: Callable[[Any], bool], rule: str) -> None:
    """Raises UserError, "<name> must <rule>, got <value>", unless ``holds`` of the setting."""
    value = OmegaConf.select(cfg, name)
    _require(holds(value), f"{name} must {rule}, got {value}")


def _at_least_1(value: float) -> bool:
    return value >= 1


def _positive(value: float) -> bool:
    return 0 < value < math.inf


def _not_negative(value: float) -> bool:
    return value >= 0


def check_run(cfg: DictConfig) -> None:
    """Check the settings of a run against each other and against what can be trained.

    Raises:
        UserError: for the first one that cannot work.
    """
    _check_data(cfg)
    _check_training(cfg)
    _check_optimisation(cfg)
    _check_checkpoints(cfg)
    _check_views(cfg)


def _check_data(cfg: DictConfig) -> None:
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


def _check_training(cfg: DictConfig) -> None:
    _must(cfg, "seed", _not_negative, "not be negative")
    _must(cfg, "max_epochs", _at_least_1, "be at least 1")
    _require(
        cfg.get("max_steps", -1) == -1,
        "max_steps is not supported: "
        "set max_epochs, and limit_train_batches for a part of an epoch",
    )
    _must(
        cfg,
        "precision",
        lambda precision: str(precision) in PRECISIONS,
        f"be one of {', '.join(PRECISIONS)}",
    )
    _must(
        cfg,
        "accumulate_grad_batches",
        lambda steps: isinstance(steps, int) and steps >= 1,
        "be a whole number, at least 1",
    )
    _must(cfg, "knn_eval.k", _at_least_1, "be at least 1")
    if cfg.performance.compile == "False":  # what YAML makes of off
        cfg.performance.compile = "off"
    _must(
        cfg, "performance.compile", lambda mode: mode in COMPILE, f"be one of {', '.join(COMPILE)}"
    )
    _require(
        cfg.performance.compile == "off" or not cfg.method_kwargs.get("patch_chunk"),
        "performance.compile does not go with method_kwargs.patch_chunk: set one of them only",
    )


def _check_optimisation(cfg: DictConfig) -> None:
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
            isinstance(value, ListConfig if name == "betas" else (int, float)),
            f"optimizer.kwargs.{name} must be a number (betas: two), got '{value}'",
        )
    if "momentum" in kwargs:
        _must(cfg, "optimizer.kwargs.momentum", lambda value: 0 <= value < 1, "be in [0, 1)")
    if "eta" in kwargs:
        _must(cfg, "optimizer.kwargs.eta", _positive, "be positive and finite")
    _require(
        kwargs.get("momentum") != 0 or not kwargs.get("nesterov"),
        "optimizer.kwargs.nesterov needs a momentum, got 0",
    )


def _check_checkpoints(cfg: DictConfig) -> None:
    _must(cfg, "checkpoint.frequency", _at_least_1, "be at least 1")
    _must(cfg, "checkpoint.every_n_steps", _at_least_1, "be at least 1")
    _must(cfg, "checkpoint.min_seconds", _not_negative, "not be negative")
    if cfg.checkpoint.keep_every_n_steps is not None:
        _must(cfg, "checkpoint.keep_every_n_steps", _at_least_1, "be at least 1")


def _check_views(cfg: DictConfig) -> None:
    """The augmentations: possible, of these images, and what the backbone takes."""
    _require(len(cfg.augmentations) > 0, "augmentations is empty")
    _require(
        cfg.method != "emp" or len(cfg.augmentations) == 1,
        "emp takes one augmentation (its num_crops is the number of patches)",
    )
    side = cfg.data.image_size or IMAGE_SIZE[cfg.data.dataset]
    built_for = input_size(cfg)
    for augmentation in augmentations(cfg):
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
    validated = cfg.get("limit_val_batches") != 0
    if evaluated or validated:
        check_whole_images(cfg, side)


def check_dense(cfg: DictConfig, side: int) -> None:
    """Check that a dense view of images of ``side`` pixels has a scale, its own or a stated one.

    Raises:
        UserError: for augmentations of several sizes without ``evaluation.dense_scale``.
    """
    try:
        cfg.evaluation.dense_scale or dense_scale(augmentations(cfg), side)
    except ValueError as error:
        raise UserError(str(error)) from error


def check_whole_images(cfg: DictConfig, side: int) -> None:
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


def check_evaluation(cfg: DictConfig) -> None:
    """Also settles the views and probes: the protocol's, or those that stand in their place.

    An evaluation with any of the latter, or with another SGD, is of the protocol "custom".
    """
    known = (*PROTOCOLS, CUSTOM)
    _require(
        cfg.protocol in known,
        f"evaluation.protocol must be one of {', '.join(PROTOCOLS)}, got '{cfg.protocol}'",
    )
    protocol, changed = PROTOCOLS.get(cfg.protocol, PROTOCOLS["standard"]), []
    for name in ("views", "probes", "bag_patches", "bag_augmented"):
        value = getattr(protocol, name)
        value = list(value) if isinstance(value, tuple) else value
        if cfg[name] is None:
            cfg[name] = value
        elif cfg[name] != value:
            changed.append(name)
    if OmegaConf.to_container(cfg.linear) != vars(LinearProbe()):
        changed.append("linear")
    _require(
        not changed or cfg.protocol in ("standard", CUSTOM),
        f"evaluation.protocol={cfg.protocol} is a constant: leave it out to set evaluation."
        f"{', evaluation.'.join(changed)}",
    )
    if changed:
        cfg.protocol = CUSTOM
    _require(
        cfg.bag_patches >= 1, f"evaluation.bag_patches must be at least 1, got {cfg.bag_patches}"
    )
    bag = [name for name in changed if name.startswith("bag_")]
    _require(
        not bag or "bag" in cfg.views,
        f"evaluation.{', evaluation.'.join(bag)} would do nothing: the view bag is not among "
        "evaluation.views",
    )
    _require(
        len(cfg.views) > 0 and set(cfg.views) <= set(VIEWS),
        f"evaluation.views must be of {', '.join(VIEWS)}, got {list(cfg.views)}; "
        "evaluation.enabled=False skips the evaluation",
    )
    _require(
        len(cfg.probes) > 0 and set(cfg.probes) <= set(PROBES),
        f"evaluation.probes must be of {', '.join(PROBES)}, got {list(cfg.probes)}",
    )
    _require(
        cfg.dense_scale is None or 0 < cfg.dense_scale < float("inf"),
        f"evaluation.dense_scale must be positive, got {cfg.dense_scale}",
    )
    _require(
        len(cfg.label_fractions) > 0 and all(0 < fraction <= 1 for fraction in cfg.label_fractions),
        f"evaluation.label_fractions are in (0, 1], got {list(cfg.label_fractions)}",
    )
    for name in ("linear", "mlp"):
        _require(
            cfg[name].epochs >= 1 and cfg[name].lr > 0 and cfg[name].batch_size >= 1,
            f"evaluation.{name}: epochs and batch_size must be at least 1, lr positive",
        )
    _require(cfg.mlp.hidden >= 1, f"evaluation.mlp.hidden must be at least 1, got {cfg.mlp.hidden}")

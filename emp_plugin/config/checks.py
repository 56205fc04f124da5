"""Rules that a composed configuration must meet, each with the error that says what to do."""

from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from emp_plugin.data.datasets import IMAGE_SIZE, NUM_CLASSES, RESIZABLE
from emp_plugin.errors import UserError
from emp_plugin.transforms import PatchAugmentation, augmentation_from_config

PRECISIONS = ("32", "32-true", "16-mixed", "bf16-mixed")  # images reach the network as float32
TRANSFORMERS = ("vit", "swin")  # built for one size of images


def augmentations(cfg: DictConfig) -> list[PatchAugmentation]:
    """The augmentation recipes of a run, one per entry of ``augmentations``. Raises UserError for entries that cannot work."""
    try:
        return [
            augmentation_from_config(OmegaConf.to_container(entry)) for entry in cfg.augmentations
        ]
    except (ValueError, TypeError) as error:
        raise UserError(f"augmentations: {error}") from error


def backbone_kwargs(cfg: DictConfig) -> dict[str, Any]:
    """``backbone.kwargs``; of a transformer with the size of the views that it is built for."""
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


def check_run(cfg: DictConfig) -> None:
    _require(
        cfg.data.dataset in NUM_CLASSES,
        f"unknown data.dataset '{cfg.data.dataset}'; choose one of {', '.join(NUM_CLASSES)}",
    )
    _require(cfg.seed >= 0, f"seed must not be negative, got {cfg.seed}")
    _require(
        cfg.get("max_steps", -1) == -1,
        "max_steps is not supported: set max_epochs, and limit_train_batches for a part of an epoch",
    )
    _require(
        str(cfg.get("precision", 32)) in PRECISIONS,
        f"precision must be one of {', '.join(PRECISIONS)}, got {cfg.get('precision')}",
    )
    _require(
        cfg.data.num_workers >= 0,
        f"data.num_workers must not be negative, got {cfg.data.num_workers}",
    )
    _require(
        cfg.data.views in ("device", "image"),
        f"data.views must be device or image, got '{cfg.data.views}'",
    )
    _require(
        cfg.data.fraction == -1 or 0 < cfg.data.fraction <= 1,
        f"data.fraction must be -1 (all) or in (0, 1], got {cfg.data.fraction}",
    )
    for name in (
        "optimizer.weight_decay",
        "optimizer.classifier_lr",
        "scheduler.warmup_epochs",
        "scheduler.warmup_start_lr",
        "scheduler.min_lr",
    ):
        _require(
            0 <= OmegaConf.select(cfg, name) < float("inf"),
            f"{name} must be finite and not negative, got {OmegaConf.select(cfg, name)}",
        )
    for name in ("base_tau", "final_tau"):
        _require(
            0 <= cfg.momentum[name] <= 1,
            f"momentum.{name} must be in [0, 1], got {cfg.momentum[name]}",
        )
    for name, value in cfg.optimizer.kwargs.items():
        _require(
            isinstance(value, ListConfig if name == "betas" else (int, float)),
            f"optimizer.kwargs.{name} must be a number (betas: two), got '{value}'",
        )
    momentum, eta = cfg.optimizer.kwargs.get("momentum", 0.9), cfg.optimizer.kwargs.get("eta", 1.0)
    _require(0 <= momentum < 1, f"optimizer.kwargs.momentum must be in [0, 1), got {momentum}")
    _require(0 < eta < float("inf"), f"optimizer.kwargs.eta must be positive and finite, got {eta}")
    _require(
        momentum > 0 or not cfg.optimizer.kwargs.get("nesterov"),
        "optimizer.kwargs.nesterov needs a momentum, got 0",
    )
    _require(cfg.max_epochs >= 1, f"max_epochs must be at least 1, got {cfg.max_epochs}")
    _require(
        cfg.optimizer.batch_size >= 2,
        f"optimizer.batch_size must be at least 2 (BatchNorm needs it), got {cfg.optimizer.batch_size}",
    )
    _require(
        0 < cfg.optimizer.lr < float("inf"),
        f"optimizer.lr must be positive and finite, got {cfg.optimizer.lr}",
    )
    _require(
        isinstance(cfg.accumulate_grad_batches, int) and cfg.accumulate_grad_batches >= 1,
        f"accumulate_grad_batches must be a whole number, at least 1, got {cfg.accumulate_grad_batches}",
    )
    _require(cfg.knn_eval.k >= 1, f"knn_eval.k must be at least 1, got {cfg.knn_eval.k}")
    _require(
        cfg.scheduler.interval == "step",
        "scheduler.interval must be 'step': a schedule by epochs means nothing in a run of one epoch",
    )
    _require(
        cfg.checkpoint.frequency >= 1 and cfg.checkpoint.every_n_steps >= 1,
        "checkpoint.frequency and checkpoint.every_n_steps must be at least 1",
    )
    _require(
        cfg.checkpoint.min_seconds >= 0,
        f"checkpoint.min_seconds must not be negative, got {cfg.checkpoint.min_seconds}",
    )
    _require(
        cfg.checkpoint.keep_every_n_steps is None or cfg.checkpoint.keep_every_n_steps >= 1,
        "checkpoint.keep_every_n_steps must be at least 1",
    )
    _require(
        not cfg.data.holdout or 0 < cfg.data.holdout < 1,
        f"data.holdout must be between 0 and 1, got {cfg.data.holdout}",
    )
    _require(len(cfg.augmentations) > 0, "augmentations is empty")
    _require(
        cfg.method != "emp" or len(cfg.augmentations) == 1,
        "emp takes one augmentation recipe (its num_crops is the number of patches)",
    )
    _require(
        cfg.data.image_size is None or (cfg.data.dataset in RESIZABLE and cfg.data.image_size >= 1),
        f"data.image_size is a number of pixels, for {', '.join(RESIZABLE)}; images of {cfg.data.dataset} have {IMAGE_SIZE[cfg.data.dataset]} "
        "(data.image_size=null)",
    )
    size = cfg.data.image_size or IMAGE_SIZE[cfg.data.dataset]
    for augmentation in augmentations(cfg):
        _require(
            augmentation.patch_size is None or augmentation.patch_size <= size,
            f"patch_size {augmentation.patch_size} is larger than the images of {cfg.data.dataset} ({size})",
        )
        _require(
            input_size(cfg) in (None, augmentation.output_size),
            f"{cfg.backbone.name} is built for {input_size(cfg)}x{input_size(cfg)} pixels, but views have {augmentation.output_size}x{augmentation.output_size}",
        )
    if (
        cfg.evaluation.enabled
        and "whole" in cfg.evaluation.views
        or cfg.get("limit_val_batches") != 0
    ):
        check_whole_images(cfg, size)


def check_whole_images(cfg: DictConfig, side: int) -> None:
    """Raises UserError if the backbone of a run cannot take whole images of ``side`` pixels: a transformer takes what its patches were resized to."""
    built_for = input_size(cfg)
    _require(
        built_for in (None, side),
        f"{cfg.backbone.name} is built for {built_for}x{built_for} pixels and cannot take whole images of {side}x{side}: "
        "set evaluation.views=[bag], and for pretraining limit_val_batches=0",
    )


def check_evaluation(cfg: DictConfig, gpu: bool) -> None:
    """Also settles what is left to the machine: the bag of features."""
    _require(
        set(cfg.views) <= {"whole", "bag"},
        f"evaluation.views knows whole and bag, got {list(cfg.views)}",
    )
    _require(
        set(cfg.probes) <= {"linear", "mlp", "knn"},
        f"evaluation.probes knows linear, mlp and knn, got {list(cfg.probes)}",
    )
    _require(
        len(cfg.views) > 0 and len(cfg.probes) > 0,
        "evaluation.views and evaluation.probes must not be empty; evaluation.enabled=False skips it",
    )
    _require(
        len(cfg.label_fractions) > 0 and all(0 < fraction <= 1 for fraction in cfg.label_fractions),
        f"evaluation.label_fractions are in (0, 1], got {list(cfg.label_fractions)}",
    )
    cfg.bag_patches = (128 if gpu else 16) if cfg.bag_patches is None else cfg.bag_patches
    cfg.bag_augmented = gpu if cfg.bag_augmented is None else cfg.bag_augmented
    _require(
        cfg.bag_patches >= 1, f"evaluation.bag_patches must be at least 1, got {cfg.bag_patches}"
    )
    for name in ("linear", "mlp"):
        _require(
            cfg[name].epochs >= 1 and cfg[name].lr > 0 and cfg[name].batch_size >= 1,
            f"evaluation.{name}: epochs and batch_size must be at least 1, lr positive",
        )
    _require(cfg.mlp.hidden >= 1, f"evaluation.mlp.hidden must be at least 1, got {cfg.mlp.hidden}")

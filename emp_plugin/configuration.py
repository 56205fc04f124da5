"""A run's configuration: read with Hydra, checked against a schema before anything starts.

The schema is that of solo-learn's repository head (name, method, backbone, method_kwargs, momentum, data, augmentations, optimizer,
scheduler, checkpoint, auto_resume, and any argument of Lightning's Trainer), plus ``evaluation`` and ``tensorboard``, which are ours.
"""

import argparse
import difflib
import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from emp_plugin.data.datasets import IMAGE_SIZE, NUM_CLASSES, RESIZABLE, count_classes
from emp_plugin.errors import UserError
from emp_plugin.solo_learn import METHODS, input_size, pl
from emp_plugin.transforms import PatchRecipe, recipe_from_augmentation


@dataclass
class Backbone:
    name: str = "resnet18"
    kwargs: dict[str, Any] = field(default_factory=dict)
    stem_padding: Optional[int] = (
        None  # of the 3x3 stem for small images: solo-learn's is 2, the EMP-SSL authors' 1
    )


@dataclass
class Momentum:
    base_tau: float = 0.99
    final_tau: float = 1.0
    classifier: bool = False


@dataclass
class Data:
    dataset: str = MISSING
    train_path: Optional[str] = "./datasets"
    val_path: Optional[str] = (
        None  # custom: class folders to evaluate on; the head's key, but the other datasets find theirs in train_path
    )
    image_size: Optional[int] = (
        None  # digits, imagenet100 and custom: side in pixels that images are resized to; None: 32, 224, 224
    )
    format: str = "image_folder"
    num_workers: int = 0
    views: str = "device"  # made where the model is; image: of PIL images in the workers, by solo-learn's own transforms
    fraction: float = -1
    num_patches: int = 20  # the EMP recipes' augmentation refers to these: patches per image,
    patch_size: Optional[int] = 16  # their side in the image's pixels,
    output_size: int = 32  # the side they, and the baselines' views, are resized to,
    interpolation: str = "bilinear"  # and how;
    scale: Optional[list[float]] = (
        None  # with patch_size=null: share of the image's area, (low, high), that a patch takes,
    )
    ratio: Optional[list[float]] = None  # and its width / height, (low, high); null: square
    holdout: float = 0.0  # evaluate on this part of the training set instead of the test set
    normalisation: dict[str, Any] = field(
        default_factory=dict
    )  # mean and std by dataset, for the augmentations that refer to them


@dataclass
class Optimizer:
    name: str = MISSING
    batch_size: int = MISSING
    lr: float = MISSING
    classifier_lr: float = 0.1
    weight_decay: float = 0.0
    exclude_bias_n_norm_wd: bool = False
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class Scheduler:
    name: str = "warmup_cosine"
    min_lr: float = 0.0
    warmup_start_lr: float = 3e-5
    warmup_epochs: float = 10
    lr_decay_steps: Optional[list[int]] = None
    interval: str = "step"


@dataclass
class Checkpoint:
    enabled: bool = True
    dir: str = "trained_models"
    frequency: int = 1  # epochs between two kept checkpoints
    keep_prev: bool = False
    every_n_steps: int = 100  # last.ckpt is written this often
    min_seconds: float = (
        60  # but not sooner than this after the one before, except at an epoch's end
    )
    keep_every_n_steps: Optional[int] = None  # step=N.ckpt is kept this often


@dataclass
class AutoResume:
    enabled: bool = False
    max_hours: float = 36  # runs older than this are not continued


@dataclass
class KnnEval:
    enabled: bool = False
    k: int = 20
    distance_func: str = "euclidean"


@dataclass
class Wandb:
    enabled: bool = False
    project: Optional[str] = "solo-learn"
    entity: Optional[str] = None
    offline: bool = False


@dataclass
class TensorBoard:
    enabled: bool = False


@dataclass
class Performance:
    disable_channel_last: bool = False


@dataclass
class LinearProbe:
    epochs: int = 100
    lr: float = 0.03
    weight_decay: float = 5e-5
    batch_size: int = 100


@dataclass
class MLPProbe(LinearProbe):
    """The linear probe's SGD with a hidden layer of ReLUs, for the evaluation of arXiv 2303.01986. Its published code (FFCV-SSL) has linear probes
    alone, so that the settings are ours: those of the linear probe, and the width of a ResNet-18's features."""

    hidden: int = 512


@dataclass
class Evaluation:
    """The evaluation that ends a run: every view and probe, always beside raw pixels and the untrained backbone."""

    enabled: bool = True
    views: list[str] = field(default_factory=lambda: ["whole", "bag"])
    probes: list[str] = field(default_factory=lambda: ["linear", "knn"])  # or mlp
    label_fractions: list[float] = field(
        default_factory=lambda: [1.0]
    )  # the probes learn from these parts of the training labels
    bag_patches: Optional[int] = None  # as published 128 on a GPU; without one 16
    bag_augmented: Optional[bool] = (
        None  # as published augmented like training's on a GPU; without one (16 are few) only cropped
    )
    linear: LinearProbe = field(default_factory=LinearProbe)
    mlp: MLPProbe = field(default_factory=MLPProbe)
    references: bool = (
        True  # raw pixels and the untrained network beside it; a comparison has them once
    )


@dataclass
class Run:
    name: str = MISSING
    method: str = MISSING
    seed: int = 5
    backbone: Backbone = field(default_factory=Backbone)
    method_kwargs: dict[str, Any] = field(default_factory=dict)
    momentum: Momentum = field(default_factory=Momentum)
    data: Data = field(default_factory=Data)
    augmentations: list[Any] = MISSING
    optimizer: Optimizer = field(default_factory=Optimizer)
    scheduler: Scheduler = field(default_factory=Scheduler)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    auto_resume: AutoResume = field(default_factory=AutoResume)
    resume_from_checkpoint: Optional[str] = None
    knn_eval: KnnEval = field(default_factory=KnnEval)
    wandb: Wandb = field(default_factory=Wandb)
    tensorboard: TensorBoard = field(default_factory=TensorBoard)
    performance: Performance = field(default_factory=Performance)
    evaluation: Evaluation = field(default_factory=Evaluation)
    max_epochs: int = MISSING


@dataclass
class ProbeData:
    """Like ``data`` of a run; what is left at None is the checkpoint's."""

    dataset: Optional[str] = None
    train_path: Optional[str] = None
    val_path: Optional[str] = None
    image_size: Optional[int] = None
    holdout: Optional[float] = None
    fraction: Optional[float] = None


@dataclass
class Probe:
    """Configuration of ``main_linear`` and ``main_knn``."""

    pretrained_feature_extractor: str = MISSING
    data: ProbeData = field(default_factory=ProbeData)
    evaluation: Evaluation = field(default_factory=Evaluation)
    accelerator: str = "auto"
    precision: Optional[str] = None


# ${fit:10,1000,${max_epochs}} in a YAML: what a recipe of 1000 epochs does for 10, as the same share of a run of max_epochs
OmegaConf.register_new_resolver(
    "fit", lambda epochs, published, run: epochs * run / published, replace=True
)

# Trainer arguments that a run sets itself
OURS = {
    "self",
    "logger",
    "callbacks",
    "plugins",
    "default_root_dir",
    "enable_checkpointing",
    "use_distributed_sampler",
    "max_epochs",
}
PRECISIONS = ("32", "32-true", "16-mixed", "bf16-mixed")  # images reach the network as float32
TRAINER_KEYS = set(inspect.signature(pl.Trainer.__init__).parameters) - OURS


def command_line(description: str, argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Parse ``--config-path DIR --config-name NAME`` (as solo-learn's commands take them); the rest are dotted overrides."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog="Any setting can be overridden: optimizer.lr=0.1 max_epochs=10",
    )
    parser.add_argument("--config-path", required=True, help="folder of the YAML files")
    parser.add_argument("--config-name", required=True, help="YAML file in it, e.g. cifar/emp")
    parser.add_argument(
        "--debug", action="store_true", help="show the traceback of an error"
    )  # taken by emp_plugin.command
    args, overrides = parser.parse_known_args(argv)
    unknown = [item for item in overrides if item.startswith("-")]
    if unknown:
        parser.error(f"unknown option {unknown[0]}; settings are written key=value")
    return args, overrides


def read_config(
    config_path: str, config_name: str, overrides: list[str], schema: type = Run
) -> DictConfig:
    """Compose the YAML file with the overrides and check the result against ``schema``, :class:`Run` or :class:`Probe`.

    Raises:
        UserError: naming the first unknown key, wrong type, missing value or impossible combination.
    """
    folder = Path(config_path).expanduser().resolve()
    if not folder.is_dir():
        raise UserError(f"--config-path {config_path} is not a folder")
    for item in overrides:
        if "=" not in item and not item.startswith("~"):
            raise UserError(f"'{item}' is not an override; settings are written key=value")
    groups = {path.name for path in folder.iterdir() if path.is_dir()}
    # Hydra takes the value of a group for a file's name; a list or mapping in its place is merged afterwards
    inline = [
        item
        for item in overrides
        if item.partition("=")[0] in groups and item.partition("=")[2][:1] in ("[", "{")
    ]
    plain = [_hydra_override(item, groups) for item in overrides if item not in inline]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(folder), version_base="1.2"):
            composed = compose(config_name=config_name.removesuffix(".yaml"), overrides=plain)
        OmegaConf.set_struct(composed, False)
        for item in inline:
            key, _, value = item.partition("=")
            composed[key] = OmegaConf.create(value)
    except (HydraException, OmegaConfBaseException, TypeError, YAMLError) as error:
        raise UserError(f"{config_name}: {str(error).splitlines()[0]}") from error
    return check_config(composed, schema)


def _hydra_override(item: str, groups: set[str]) -> str:
    """``++key=value`` lets an override name a key of the schema that the YAML leaves to its default (unknown keys are caught by the
    schema); the choice of another file of a group, such as ``augmentations=emp``, is Hydra's as it stands. Hydra wants quotes around a value
    with an equals sign, such as ``epoch=1.ckpt``, or a backslash before it."""
    key, _, value = item.partition("=")
    if "=" in value.replace("\\=", "") and value[0] not in "'\"[{":
        item = f"{key}='{value}'"
    chooses_file = key.lstrip("/") in groups and value.replace("_", "").replace("-", "").isalnum()
    return item if item[0] in "+~" or chooses_file else f"++{item}"


def check_config(composed: DictConfig, schema: type = Run) -> DictConfig:
    """Check a composed configuration and fill in the schema's defaults. Raises UserError as :func:`read_config`."""
    OmegaConf.set_struct(composed, False)
    given = OmegaConf.to_container(composed, resolve=False)
    trainer = {key: given.pop(key) for key in list(given) if schema is Run and key in TRAINER_KEYS}
    try:
        cfg = OmegaConf.merge(OmegaConf.structured(schema), given)
        missing = sorted(OmegaConf.missing_keys(cfg))
        if missing:
            raise UserError(f"{missing[0]} is not set; add {missing[0]}=...")
        cfg = OmegaConf.create(
            OmegaConf.to_container(cfg, resolve=True)
        )  # plain: saved and compared as it is
    except ConfigKeyError as error:
        raise UserError(_unknown_key(error.full_key or str(error.key), schema)) from error
    except OmegaConfBaseException as error:
        raise UserError(
            f"{error.full_key or 'configuration'}: {str(error).splitlines()[0]}"
        ) from error
    if schema is Run:
        cfg = OmegaConf.merge({"accumulate_grad_batches": 1}, cfg, trainer)
        if cfg.get("precision") is None:
            cfg.precision = _fast_precision(uses_gpu(cfg))
    _check_evaluation(cfg.evaluation, uses_gpu(cfg))
    if schema is Run:
        _check_run(cfg)
        _count_views(cfg)
    return cfg


def uses_gpu(cfg: DictConfig) -> bool:
    """Whether a run or an evaluation is for CUDA's devices; the others there are have not been tried."""
    return cfg.get("accelerator") != "cpu" and torch.cuda.is_available()


def _fast_precision(gpu: bool) -> str:
    """The precision that this machine is fast in. bf16 without hardware for it (GPUs before Ampere, CPUs without AVX512-BF16) is slower than float32, and so
    it is on an Intel CPU by AVX512-BF16 alone, where a virtual machine hides its AMX (benchmarks/README.md has all of these)."""
    if gpu:
        return (
            "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
        )
    if not getattr(torch.cpu, "_is_avx512_bf16_supported", bool)():  # torch before 2.6 cannot tell
        return "32"
    cpu = getattr(torch.cpu, "get_capabilities", dict)()  # nor can older ones tell this
    return "32" if "Intel" in cpu.get("cpu_name", "") and not cpu.get("amx_tile") else "bf16-mixed"


def recipes(cfg: DictConfig) -> list[PatchRecipe]:
    """The augmentation recipes of a run, one per entry of ``augmentations``. Raises UserError for entries that cannot work."""
    try:
        return [
            recipe_from_augmentation(OmegaConf.to_container(entry)) for entry in cfg.augmentations
        ]
    except (ValueError, TypeError) as error:
        raise UserError(f"augmentations: {error}") from error


def trainer_arguments(cfg: DictConfig) -> dict[str, Any]:
    """The arguments of Lightning's Trainer that the configuration sets."""
    arguments = {
        key: value for key, value in OmegaConf.to_container(cfg).items() if key in TRAINER_KEYS
    }
    if not torch.cuda.is_available() and arguments.get("accelerator", "auto") == "auto":
        arguments["accelerator"] = "cpu"  # Lightning would take Apple's GPU, which lacks float64
    if isinstance(arguments.get("devices"), list) and not uses_gpu(cfg):
        arguments["devices"] = len(
            arguments["devices"]
        )  # solo-learn's recipes list GPUs; Lightning's CPUs have no numbers
    return arguments


def _unknown_key(key: str, schema: type) -> str:
    known = _known_keys(OmegaConf.structured(schema)) | (TRAINER_KEYS if schema is Run else set())
    close = difflib.get_close_matches(key, known, n=1) or difflib.get_close_matches(
        key.split(".")[0], known, n=1
    )
    return f"unknown setting '{key}'" + (f"; did you mean '{close[0]}'?" if close else "")


def _known_keys(node: DictConfig, prefix: str = "") -> set[str]:
    keys = set()
    for key in node:
        keys.add(prefix + key)
        child = None if OmegaConf.is_missing(node, key) else node[key]
        if isinstance(child, DictConfig):
            keys |= _known_keys(child, f"{prefix}{key}.")
    return keys


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _check_run(cfg: DictConfig) -> None:
    methods = sorted(set(METHODS) - {"base", "linear"})
    _require(
        cfg.method in methods, f"unknown method '{cfg.method}'; choose one of {', '.join(methods)}"
    )
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
    for recipe in recipes(cfg):
        _require(
            recipe.patch_size is None or recipe.patch_size <= size,
            f"patch_size {recipe.patch_size} is larger than the images of {cfg.data.dataset} ({size})",
        )
        _require(
            input_size(cfg) in (None, recipe.output_size),
            f"{cfg.backbone.name} is built for {input_size(cfg)}x{input_size(cfg)} pixels, but views have {recipe.output_size}x{recipe.output_size}",
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


def _check_evaluation(cfg: DictConfig, gpu: bool) -> None:
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


def _count_views(cfg: DictConfig) -> None:
    """Add what solo-learn's constructors are told about data: classes and views; views of the first one's size are large crops."""
    cfg.data.num_classes = count_classes(cfg.data.dataset, cfg.data.train_path)
    made = recipes(cfg)
    cfg.data.num_large_crops = sum(
        recipe.num_patches for recipe in made if recipe.output_size == made[0].output_size
    )
    cfg.data.num_small_crops = sum(recipe.num_patches for recipe in made) - cfg.data.num_large_crops

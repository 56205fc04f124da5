"""From a configuration in the schema of solo-learn's repository head to a method of the installed generation."""

import inspect
import logging
import re
from argparse import ArgumentParser
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError
from torch import nn

from emp_plugin.config import backbone_kwargs
from emp_plugin.errors import UserError
from emp_plugin.solo_learn import API, METHODS, VERSION, BaseMethod, BaseMomentumMethod

Settings = TypeVar("Settings")

SMALL_IMAGES = ("cifar10", "cifar100", "digits")  # solo-learn's 3x3 stem without max-pooling
SGD_KWARGS = ("momentum", "nesterov", "dampening")
LARS_KWARGS = {
    "eta": "eta_lars",
    "clip_lr": "grad_clip_lars",
    "exclude_bias_n_norm": "exclude_bias_n_norm",
}  # head: wheel
OPTIMIZER_KWARGS = {
    "sgd": SGD_KWARGS,
    "lars": (*SGD_KWARGS, *LARS_KWARGS),
    "adam": ("betas", "eps", "amsgrad"),
    "adamw": ("betas", "eps", "amsgrad"),
}
SCHEDULERS = ("warmup_cosine", "cosine", "step", "none")
HEAD_DEFAULTS = {
    "warmup_teacher_temperature_epochs": 0
}  # the wheel's 50 make DINO fail in shorter runs
# solo-learn's recipe for ReSSL repeats these among the method's own settings
MOMENTUM_ALIASES = {
    "base_tau_momentum": "base_tau",
    "final_tau_momentum": "final_tau",
    "momentum_classifier": "classifier",
}


def split_settings(
    settings_cls: type[Settings], args: tuple, kwargs: dict[str, Any]
) -> tuple[Settings, tuple, dict[str, Any]]:
    """A method's own settings (a dataclass) out of its constructor's arguments, and the arguments left for its base class.

    On the wheel they are keywords, or a mapping ``method_kwargs`` as :func:`build_method` hands over; on the head ``cfg.method_kwargs``.

    Raises:
        UserError: ``method_kwargs`` has a key that is no field; it is named.
    """
    if API == "1.0.6":
        cfg = args[0] if args else kwargs["cfg"]
        return (
            settings_cls(**_known(settings_cls, OmegaConf.select(cfg, "method_kwargs"))),
            args,
            kwargs,
        )
    kwargs = dict(kwargs)
    own = {name: kwargs.pop(name) for name in _field_names(settings_cls) if name in kwargs}
    return (
        settings_cls(**_known(settings_cls, kwargs.pop("method_kwargs", None)), **own),
        args,
        kwargs,
    )


def _field_names(settings_cls: type) -> list[str]:
    return [field.name for field in fields(settings_cls) if field.init]


def _known(settings_cls: type, given: Mapping | None) -> dict[str, Any]:
    given = _plain(given)
    _check_names(given, _field_names(settings_cls), "method_kwargs")
    return given


def build_method(cfg: DictConfig):
    """The LightningModule of a run's configuration, on either generation. ``cfg`` is not changed.

    Reads name, method, backbone, method_kwargs, momentum, data, optimizer, scheduler, knn_eval, performance, max_epochs,
    accumulate_grad_batches, devices and num_nodes. Learning rates are multiplied by the batch of all devices / 256, as solo-learn's command
    line does, unless the method class says ``lr_scaled_by_batch_size = False`` (then accumulation doesn't raise them either).

    Raises:
        UserError: an unknown method, backbone, optimiser, scheduler or setting, or one that the installed generation lacks; it is named.
    """
    cls = _choose(METHODS, cfg.method, "method", hidden=("base", "linear"))
    _check(cfg)
    lr_factor = _lr_factor(cfg) if getattr(cls, "lr_scaled_by_batch_size", True) else 1.0
    method = (
        _build_1_0_6(cls, cfg, lr_factor) if API == "1.0.6" else _build_1_0_2(cls, cfg, lr_factor)
    )
    backbones = [
        method.get_submodule(name)
        for name in ("encoder", "momentum_encoder", "backbone", "momentum_backbone")
        if hasattr(method, name)
    ]
    for backbone in backbones:
        _set_stem_padding(backbone, OmegaConf.select(cfg, "backbone.stem_padding"))
        if not OmegaConf.select(cfg, "performance.disable_channel_last", default=False):
            backbone.to(
                memory_format=torch.channels_last
            )  # the head's default, and it makes baselines as fast as EMP
    return method


def _build_1_0_6(cls: type, cfg: DictConfig, lr_factor: float):
    cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    if cfg.data.dataset in SMALL_IMAGES:
        cfg.data.dataset = "cifar10"  # the only names that get the head's stem for small images
    OmegaConf.update(cfg, "backbone.kwargs", backbone_kwargs(cfg), force_add=True)
    cfg.optimizer.kwargs = _optimizer_kwargs(cfg.optimizer)
    cfg.optimizer.lr *= lr_factor
    cfg.optimizer.classifier_lr = _classifier_lr(cfg.optimizer) * lr_factor
    cfg.scheduler.name = str(cfg.scheduler.name).lower()
    if not getattr(cls, "lr_scaled_by_batch_size", True):
        cfg.accumulate_grad_batches = 1  # the head multiplies all learning rates by it, which a method with a rate of its own must not suffer
    given = _plain(OmegaConf.select(cfg, "method_kwargs"))
    if issubclass(cls, BaseMomentumMethod):
        cfg.momentum = _momentum(cfg)
        given = _without_aliases(given, cfg.momentum)
    cfg.method_kwargs = given
    names = _read_settings(cls)
    if names:  # otherwise like EMP: split_settings checks them
        _check_names(given, names, "method_kwargs", f" for {cfg.method}")
    logging.disable(
        logging.WARNING
    )  # the head warns that a schedule by step cannot be resumed; ours can
    try:
        cfg = cls.add_and_assert_specific_cfg(cfg)
        _check_queue(cfg, cfg.method_kwargs)
        return cls(cfg)
    except ConfigAttributeError as error:
        raise UserError(f"{error.full_key} is not set; {cfg.method} needs it") from error
    finally:
        logging.disable(logging.NOTSET)


def _read_settings(cls: type) -> list[str]:
    """What a method class of the head and its parents read from ``cfg.method_kwargs``, according to their source."""
    parents = cls.__mro__[: cls.__mro__.index(BaseMethod)]
    return sorted(
        {
            name
            for parent in parents
            for name in re.findall(r"method_kwargs\.(\w+)", inspect.getsource(parent))
        }
    )


def _build_1_0_2(cls: type, cfg: DictConfig, lr_factor: float):
    arguments = {
        **_backbone_arguments(cfg),
        **_optimizer_arguments(cfg.optimizer, lr_factor),
        **_scheduler_arguments(cfg.scheduler),
        "num_classes": cfg.data.num_classes,
        "num_large_crops": cfg.data.num_large_crops,
        "num_small_crops": cfg.data.num_small_crops,
        "max_epochs": cfg.max_epochs,
        # the wheel multiplies all learning rates by it, which a method with a rate of its own must not suffer
        "accumulate_grad_batches": _accumulation(cfg)
        if getattr(cls, "lr_scaled_by_batch_size", True)
        else 1,
        "knn_eval": OmegaConf.select(cfg, "knn_eval.enabled", default=False),
        "knn_k": OmegaConf.select(cfg, "knn_eval.k", default=20),
    }
    if issubclass(cls, BaseMomentumMethod):
        arguments |= {wheel: _momentum(cfg)[head] for wheel, head in MOMENTUM_ALIASES.items()}
    arguments |= _method_arguments(cls, cfg)
    method = cls(**arguments)
    if method.knn_eval:
        method.knn.distance_fx = _distance(cfg)  # the wheel's constructor always takes euclidean
    return method


# pieces of the wheel's constructor arguments


def _backbone_arguments(cfg: DictConfig) -> dict[str, Any]:
    return {
        "encoder": cfg.backbone.name,
        "backbone_args": {**backbone_kwargs(cfg), "cifar": cfg.data.dataset in SMALL_IMAGES},
    }


def _optimizer_arguments(optimizer: DictConfig, lr_factor: float) -> dict[str, Any]:
    if OmegaConf.select(optimizer, "exclude_bias_n_norm_wd", default=False):
        raise UserError(
            "optimizer.exclude_bias_n_norm_wd: solo-learn 1.0.2 lacks it; with lars use optimizer.kwargs.exclude_bias_n_norm"
        )
    kwargs = _optimizer_kwargs(optimizer)
    lars = {LARS_KWARGS[name]: kwargs.pop(name) for name in LARS_KWARGS if name in kwargs}
    return {
        "optimizer": "sgd" if optimizer.name == "lars" else optimizer.name,
        "lars": optimizer.name == "lars",
        "exclude_bias_n_norm": False,
        **lars,
        "extra_optimizer_args": kwargs,
        "batch_size": optimizer.batch_size,
        "lr": optimizer.lr * lr_factor,
        "classifier_lr": _classifier_lr(optimizer) * lr_factor,
        "weight_decay": optimizer.weight_decay,
    }


def _scheduler_arguments(scheduler: DictConfig) -> dict[str, Any]:
    decay = OmegaConf.select(scheduler, "lr_decay_steps")
    return {
        "scheduler": str(scheduler.name).lower(),
        "min_lr": OmegaConf.select(scheduler, "min_lr", default=0.0),
        "warmup_start_lr": OmegaConf.select(scheduler, "warmup_start_lr", default=3e-5),
        "warmup_epochs": OmegaConf.select(scheduler, "warmup_epochs", default=10),
        "lr_decay_steps": list(decay) if decay else None,
    }


def _method_arguments(cls: type, cfg: DictConfig) -> dict[str, Any]:
    """The method's own keywords: from ``method_kwargs``, otherwise the default of the wheel's command line."""
    given = _plain(OmegaConf.select(cfg, "method_kwargs"))
    if issubclass(cls, BaseMomentumMethod):
        given = _without_aliases(given, _momentum(cfg))
    names = _own_parameters(cls)
    if (
        not names
    ):  # like EMP: the class reads a dataclass with split_settings, which checks the names
        return {"method_kwargs": given} if given else {}
    _check_names(given, names, "method_kwargs", f" for {cfg.method}")
    parser = cls.add_model_specific_args(ArgumentParser())
    defaults = {name: HEAD_DEFAULTS.get(name, parser.get_default(name)) for name in names}
    arguments = {name: value for name, value in defaults.items() if value is not None} | given
    missing = [
        name
        for name, parameter in names.items()
        if name not in arguments and parameter.default is parameter.empty
    ]
    if missing:
        raise UserError(f"method_kwargs.{missing[0]} is not set; {cfg.method} needs it")
    _check_queue(cfg, arguments)
    return arguments


def _own_parameters(cls: type) -> dict[str, inspect.Parameter]:
    """Named constructor parameters of a method class and its parents, without those of solo-learn's base classes."""
    shared = {
        name
        for base in (BaseMethod, BaseMomentumMethod)
        for name in inspect.signature(base.__init__).parameters
    }
    own = {}
    for parent in cls.__mro__[: cls.__mro__.index(BaseMethod)]:
        for name, parameter in inspect.signature(parent.__init__).parameters.items():
            if name not in shared and parameter.kind not in (
                parameter.VAR_POSITIONAL,
                parameter.VAR_KEYWORD,
            ):
                own.setdefault(name, parameter)
    return own


def _distance(cfg: DictConfig) -> str:
    distance = OmegaConf.select(cfg, "knn_eval.distance_func", default="euclidean")
    return _choose(
        {"cosine": "cosine", "euclidean": "euclidean"}, distance, "knn_eval.distance_func"
    )


# shared by both generations


def _check(cfg: DictConfig) -> None:
    """Raises UserError for names that neither generation, or not the installed one, knows."""
    known = BaseMethod._SUPPORTED_ENCODERS if API == "1.0.2" else BaseMethod._BACKBONES
    if cfg.backbone.name not in known:
        raise UserError(
            f"backbone.name: solo-learn {VERSION} has no '{cfg.backbone.name}'; choose one of {', '.join(known)}"
        )
    scheduler = cfg.scheduler
    name = _choose(SCHEDULERS, str(scheduler.name).lower(), "scheduler.name")
    if OmegaConf.select(scheduler, "interval", default="step") != "step":
        raise UserError(
            "scheduler.interval: only 'step' is supported; the rate moves with every optimiser step"
        )
    if name == "step" and not OmegaConf.select(scheduler, "lr_decay_steps"):
        raise UserError("scheduler.lr_decay_steps is missing; scheduler.name=step needs it")
    _distance(cfg)


def _optimizer_kwargs(optimizer: DictConfig) -> dict[str, Any]:
    """``optimizer.kwargs`` with the head's defaults."""
    _choose(OPTIMIZER_KWARGS, optimizer.name, "optimizer.name")
    kwargs = _plain(OmegaConf.select(optimizer, "kwargs"))
    _check_names(
        kwargs,
        OPTIMIZER_KWARGS[optimizer.name],
        "optimizer.kwargs",
        f" with optimizer.name={optimizer.name}",
    )
    if "betas" in kwargs:
        kwargs["betas"] = tuple(kwargs["betas"])
    return {"momentum": 0.9, **kwargs} if optimizer.name in ("sgd", "lars") else kwargs


def _classifier_lr(optimizer: DictConfig) -> float:
    return OmegaConf.select(optimizer, "classifier_lr", default=0.3)


def _momentum(cfg: DictConfig) -> dict[str, Any]:
    return {
        "base_tau": 0.99,
        "final_tau": 1.0,
        "classifier": False,
        **_plain(OmegaConf.select(cfg, "momentum")),
    }


def _without_aliases(given: dict[str, Any], momentum: dict[str, Any]) -> dict[str, Any]:
    for alias, name in MOMENTUM_ALIASES.items():
        value = given.pop(alias, None)
        if value is not None and value != momentum[name]:
            raise UserError(
                f"method_kwargs.{alias}={value} contradicts momentum.{name}={momentum[name]}; set momentum.{name}"
            )
    return given


def _check_queue(cfg: DictConfig, arguments: dict[str, Any]) -> None:
    """These methods write whole batches of all devices into their queue, and stop in the first step when it isn't a multiple."""
    batch = cfg.optimizer.batch_size * processes(cfg)
    size = arguments.get("queue_size", 0)
    if cfg.method != "swav" and size % batch:
        raise UserError(
            f"method_kwargs.queue_size={size} must be a multiple of the batch of all devices, {batch}; {size // batch * batch or batch} is"
        )


def _lr_factor(cfg: DictConfig) -> float:
    return cfg.optimizer.batch_size * processes(cfg) / 256


def processes(cfg: DictConfig) -> int:
    """How many a run is spread over: its devices on all nodes, each with a batch of its own."""
    return _device_count(OmegaConf.select(cfg, "devices"), OmegaConf.select(cfg, "accelerator")) * (
        OmegaConf.select(cfg, "num_nodes") or 1
    )


def _device_count(devices: Any, accelerator: str | None) -> int:
    """Number of devices that Lightning will take for ``devices``: a list of indices, a number, or "auto"."""
    if isinstance(devices, (list, tuple, ListConfig)):
        return len(devices)
    if isinstance(devices, str) and "," in devices:
        return len([item for item in devices.split(",") if item.strip()])
    if devices not in (None, "auto", -1, "-1"):
        return int(devices)
    return (
        torch.cuda.device_count()
        if accelerator in (None, "auto", "gpu", "cuda") and torch.cuda.is_available()
        else 1
    )


def _accumulation(cfg: DictConfig) -> int:
    return OmegaConf.select(cfg, "accumulate_grad_batches") or 1


def _set_stem_padding(backbone: nn.Module, padding: int | None) -> None:
    """Padding of the 3x3 stem (solo-learn's is 2, which makes 34x34 maps of 32x32 images); the weights stay as they are."""
    if padding is None:
        return
    stem = getattr(backbone, "conv1", None)
    if not isinstance(stem, nn.Conv2d) or stem.kernel_size != (3, 3):
        raise UserError(
            f"backbone.stem_padding is for the 3x3 stem that ResNets have on {', '.join(SMALL_IMAGES)}; this backbone has none"
        )
    if padding < 0:
        raise UserError(f"backbone.stem_padding must not be negative, got {padding}")
    stem.padding = (padding, padding)


def _plain(node: Mapping | None) -> dict[str, Any]:
    return dict(
        OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else node or {}
    )


def _choose(known: Any, name: str, setting: str, hidden: tuple[str, ...] = ()) -> Any:
    names = sorted(set(known) - set(hidden))
    if name not in names:
        raise UserError(f"unknown {setting} '{name}'; choose one of {', '.join(names)}")
    return known[name] if isinstance(known, Mapping) else name


def _check_names(given: Mapping, known: Any, setting: str, where: str = "") -> None:
    for name in given:
        if name not in known:
            raise UserError(
                f"unknown setting {setting}.{name}{where}; known: {', '.join(known) or 'none'}"
            )

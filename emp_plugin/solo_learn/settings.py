"""What the settings of a method may be: their names, defaults and checks, for every version."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from omegaconf import OmegaConf

from emp_plugin.config import Run
from emp_plugin.config.models import Optimizer
from emp_plugin.errors import UserError
from emp_plugin.solo_learn import API, VERSION, BaseMethod

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")

SGD_KWARGS = ("momentum", "nesterov", "dampening")
# the names of 1.0.6, and those of 1.0.2's constructors
LARS_KWARGS = {
    "eta": "eta_lars",
    "clip_lr": "grad_clip_lars",
    "exclude_bias_n_norm": "exclude_bias_n_norm",
}
OPTIMIZER_KWARGS = {
    "sgd": SGD_KWARGS,
    "lars": (*SGD_KWARGS, *LARS_KWARGS),
    "adam": ("betas", "eps", "amsgrad"),
    "adamw": ("betas", "eps", "amsgrad"),
}
SCHEDULERS = ("warmup_cosine", "cosine", "step", "none")
DISTANCES = ("cosine", "euclidean")
# what 1.0.2's constructors call the settings of ``momentum``; solo-learn's recipe for ReSSL repeats
# them among the method's own
MOMENTUM_NAMES = {
    "base_tau_momentum": "base_tau",
    "final_tau_momentum": "final_tau",
    "momentum_classifier": "classifier",
}


def split_settings(
    settings_cls: type[Settings], args: tuple, kwargs: dict[str, Any]
) -> tuple[Settings, tuple, dict[str, Any]]:
    """A method's own settings out of its constructor's arguments, and what its base class takes.

    ``settings_cls`` is a dataclass. On 1.0.6 its fields are ``cfg.method_kwargs``, on 1.0.2
    keywords or a mapping ``method_kwargs``, as :func:`build_method` hands it over.

    Raises:
        UserError: ``method_kwargs`` has a key that is no field, or ``settings_cls`` refuses a
            value (its message begins with the field's name); it is named.
    """
    names = [field.name for field in fields(settings_cls) if field.init]
    own = {}
    if API == "1.0.6":
        cfg = args[0] if args else kwargs["cfg"]
        given = plain(OmegaConf.select(cfg, "method_kwargs"))
    else:
        kwargs = dict(kwargs)
        given = plain(kwargs.pop("method_kwargs", None))
        own = {name: kwargs.pop(name) for name in names if name in kwargs}
    check_names(given, names, "method_kwargs")
    try:
        return settings_cls(**given, **own), args, kwargs
    except ValueError as error:
        raise UserError(f"method_kwargs.{error}") from error


def check(cfg: Run) -> None:
    """Raises UserError for names and values that no version knows, or not the installed one."""
    known = BaseMethod._SUPPORTED_ENCODERS if API == "1.0.2" else BaseMethod._BACKBONES
    if cfg.backbone.name not in known:
        raise UserError(
            f"backbone.name: solo-learn {VERSION} has no '{cfg.backbone.name}'; "
            f"choose one of {', '.join(known)}"
        )
    name = choose(SCHEDULERS, cfg.scheduler.name.lower(), "scheduler.name")
    if name == "step" and not cfg.scheduler.lr_decay_steps:
        raise UserError("scheduler.lr_decay_steps is missing; scheduler.name=step needs it")
    choose(DISTANCES, cfg.knn_eval.distance_func, "knn_eval.distance_func")


def optimizer_kwargs(optimizer: Optimizer) -> dict[str, Any]:
    """``optimizer.kwargs`` with the defaults of 1.0.6."""
    name = choose(OPTIMIZER_KWARGS, optimizer.name, "optimizer.name")
    kwargs = dict(optimizer.kwargs)
    where = f" with optimizer.name={name}"
    check_names(kwargs, OPTIMIZER_KWARGS[name], "optimizer.kwargs", where)
    if "betas" in kwargs:
        kwargs["betas"] = tuple(kwargs["betas"])
    return {"momentum": 0.9, **kwargs} if name in ("sgd", "lars") else kwargs


def without_momentum(cfg: Run) -> dict[str, Any]:
    """A method's own settings, less those of ``momentum``.

    Raises:
        UserError: one of them contradicts ``momentum``.
    """
    given, momentum = cfg.method_kwargs, asdict(cfg.momentum)
    for name, setting in MOMENTUM_NAMES.items():
        value = given.get(name)
        if value is not None and value != momentum[setting]:
            raise UserError(
                f"method_kwargs.{name}={value} contradicts momentum.{setting}={momentum[setting]}; "
                f"set momentum.{setting}"
            )
    return {name: value for name, value in given.items() if name not in MOMENTUM_NAMES}


def check_queue(cfg: Run, arguments: Mapping[str, Any]) -> None:
    """Raises UserError for a queue that is no multiple of the batch of all devices.

    Methods other than SwAV write whole batches into it, and stop in their first step.
    """
    batch = cfg.optimizer.batch_size * processes(cfg)
    size = arguments.get("queue_size", 0)
    if cfg.method != "swav" and size % batch:
        raise UserError(
            f"method_kwargs.queue_size={size} must be a multiple of the batch of all devices, "
            f"{batch}; {size // batch * batch or batch} is"
        )


def processes(cfg: Run) -> int:
    """How many a run is spread over: its devices on all nodes, each with a batch of its own."""
    return _device_count(cfg.devices, cfg.accelerator) * (cfg.num_nodes or 1)


def _device_count(devices: Any, accelerator: str | None) -> int:
    """How many Lightning takes for ``devices``: a list of indices, a number, or "auto"."""
    if isinstance(devices, (list, tuple)):
        return len(devices)
    if isinstance(devices, str) and "," in devices:
        return len([item for item in devices.split(",") if item.strip()])
    if devices not in (None, "auto", -1, "-1"):
        return int(devices)
    if accelerator in (None, "auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.cuda.device_count()
    return 1


def plain(node: Any) -> dict[str, Any]:
    if OmegaConf.is_config(node):
        node = OmegaConf.to_container(node, resolve=True)
    return dict(node or {})


def choose(known: Any, name: str, setting: str) -> str:
    """``name``, if it is known. Raises UserError otherwise."""
    if name not in known:
        raise UserError(f"unknown {setting} '{name}'; choose one of {', '.join(sorted(known))}")
    return name


def check_names(given: Mapping, known: Any, setting: str, where: str = "") -> None:
    """Raises UserError for a key that is not known."""
    for name in given:
        if name not in known:
            raise UserError(
                f"unknown setting {setting}.{name}{where}; known: {', '.join(known) or 'none'}"
            )

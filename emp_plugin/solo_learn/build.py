"""From a configuration in the schema of solo-learn 1.0.6 to a method of the installed version."""

import inspect
import logging
import re
from argparse import ArgumentParser
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError
from torch import nn

from emp_plugin.config import backbone_kwargs
from emp_plugin.errors import UserError
from emp_plugin.solo_learn import API, METHODS, BaseMethod, BaseMomentumMethod
from emp_plugin.solo_learn.corrections import KNN, corrected
from emp_plugin.solo_learn.settings import (
    LARS_KWARGS,
    MOMENTUM_NAMES,
    check,
    check_names,
    check_queue,
    choose,
    knn_distance,
    momentum_settings,
    optimizer_kwargs,
    plain,
    processes,
    without_momentum,
)

SMALL_IMAGES = ("cifar10", "cifar100", "digits")  # solo-learn's 3x3 stem without max-pooling
BACKBONES = ("encoder", "momentum_encoder", "backbone", "momentum_backbone")
# of 1.0.6, where 1.0.2 has others: its 50 make DINO fail in shorter runs
DEFAULTS_OF_1_0_6 = {"warmup_teacher_temperature_epochs": 0}


def build_method(cfg: DictConfig):
    """The LightningModule of a run's configuration, on either version, with our corrections of it.

    ``cfg`` is not changed.

    Reads name, method, backbone, method_kwargs, momentum, data, optimizer, scheduler, knn_eval,
    performance, max_epochs, accumulate_grad_batches, devices and num_nodes.

    Learning rates are multiplied by the batch of all devices / 256 and by accumulate_grad_batches,
    as solo-learn's command line does. They are left alone if the method class says
    ``lr_scaled_by_batch_size = False``.

    Raises:
        UserError: a method, backbone, optimiser, scheduler or setting is unknown, or the installed
            version lacks it; it is named.
    """
    choose(set(METHODS) - {"base", "linear"}, cfg.method, "method")
    cls = METHODS[cfg.method]
    check(cfg)
    cfg = _prepared(cls, cfg)
    method = _build_1_0_2(cls, cfg) if API == "1.0.2" else _build_1_0_6(cls, cfg)
    if method.knn_eval:
        method.knn = KNN(method.knn_k, knn_distance(cfg))
    for name in BACKBONES:
        backbone = getattr(method, name, None)
        if backbone is None:
            continue
        _set_stem_padding(backbone, OmegaConf.select(cfg, "backbone.stem_padding"))
        if not OmegaConf.select(cfg, "performance.disable_channel_last", default=False):
            # the default of 1.0.6, and it makes baselines as fast as EMP
            backbone.to(memory_format=torch.channels_last)
    return method


def _prepared(cls: type, cfg: DictConfig) -> DictConfig:
    """A copy with the learning rates that apply, and with the settings of ``momentum`` complete."""
    cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    cfg.scheduler.name = str(cfg.scheduler.name).lower()
    classifier_lr = OmegaConf.select(cfg, "optimizer.classifier_lr", default=0.3)
    factor = 1.0
    if getattr(cls, "lr_scaled_by_batch_size", True):
        factor = cfg.optimizer.batch_size * processes(cfg) / 256
    else:
        cfg.accumulate_grad_batches = 1  # solo-learn multiplies all learning rates by it
    cfg.optimizer.lr *= factor
    cfg.optimizer.classifier_lr = classifier_lr * factor
    given = plain(OmegaConf.select(cfg, "method_kwargs"))
    if issubclass(cls, BaseMomentumMethod):
        cfg.momentum = momentum_settings(cfg)
        given = without_momentum(given, cfg.momentum)
    cfg.method_kwargs = given
    return cfg


def _build_1_0_6(cls: type, cfg: DictConfig):
    if cfg.data.dataset in SMALL_IMAGES:
        cfg.data.dataset = "cifar10"  # one of the names that get the stem for small images
    OmegaConf.update(cfg, "backbone.kwargs", backbone_kwargs(cfg), force_add=True)
    cfg.optimizer.kwargs = optimizer_kwargs(cfg.optimizer)
    names = _read_settings(cls)
    if names:  # otherwise split_settings checks them, as for EMP
        check_names(cfg.method_kwargs, names, "method_kwargs", f" for {cfg.method}")
    # it warns that a schedule by step cannot be resumed; ours can
    logging.disable(logging.WARNING)
    try:
        cfg = cls.add_and_assert_specific_cfg(cfg)
        check_queue(cfg, cfg.method_kwargs)
        return corrected(cls)(cfg)
    except ConfigAttributeError as error:
        raise UserError(f"{error.full_key} is not set; {cfg.method} needs it") from error
    finally:
        logging.disable(logging.NOTSET)


def _read_settings(cls: type) -> list[str]:
    """What a class of 1.0.6 and its parents read from ``cfg.method_kwargs``, by their source."""
    parents = cls.__mro__[: cls.__mro__.index(BaseMethod)]
    source = "".join(inspect.getsource(parent) for parent in parents)
    return sorted(set(re.findall(r"method_kwargs\.(\w+)", source)))


def _build_1_0_2(cls: type, cfg: DictConfig):
    arguments = {
        "encoder": cfg.backbone.name,
        "backbone_args": {**backbone_kwargs(cfg), "cifar": cfg.data.dataset in SMALL_IMAGES},
        **_optimizer_arguments(cfg.optimizer),
        **_scheduler_arguments(cfg.scheduler),
        "num_classes": cfg.data.num_classes,
        "num_large_crops": cfg.data.num_large_crops,
        "num_small_crops": cfg.data.num_small_crops,
        "max_epochs": cfg.max_epochs,
        "accumulate_grad_batches": OmegaConf.select(cfg, "accumulate_grad_batches") or 1,
        "knn_eval": OmegaConf.select(cfg, "knn_eval.enabled", default=False),
        "knn_k": OmegaConf.select(cfg, "knn_eval.k", default=20),
    }
    if issubclass(cls, BaseMomentumMethod):
        arguments |= {name: cfg.momentum[setting] for name, setting in MOMENTUM_NAMES.items()}
    arguments |= _method_arguments(cls, cfg)
    return corrected(cls)(**arguments)


def _optimizer_arguments(optimizer: DictConfig) -> dict[str, Any]:
    if OmegaConf.select(optimizer, "exclude_bias_n_norm_wd", default=False):
        raise UserError(
            "optimizer.exclude_bias_n_norm_wd: solo-learn 1.0.2 lacks it; "
            "with lars use optimizer.kwargs.exclude_bias_n_norm"
        )
    kwargs = optimizer_kwargs(optimizer)
    lars = {LARS_KWARGS[name]: kwargs.pop(name) for name in LARS_KWARGS if name in kwargs}
    return {
        "optimizer": "sgd" if optimizer.name == "lars" else optimizer.name,
        "lars": optimizer.name == "lars",
        "exclude_bias_n_norm": False,
        **lars,
        "extra_optimizer_args": kwargs,
        "batch_size": optimizer.batch_size,
        "lr": optimizer.lr,
        "classifier_lr": optimizer.classifier_lr,
        "weight_decay": optimizer.weight_decay,
    }


def _scheduler_arguments(scheduler: DictConfig) -> dict[str, Any]:
    decay = OmegaConf.select(scheduler, "lr_decay_steps")
    return {
        "scheduler": scheduler.name,
        "min_lr": OmegaConf.select(scheduler, "min_lr", default=0.0),
        "warmup_start_lr": OmegaConf.select(scheduler, "warmup_start_lr", default=3e-5),
        "warmup_epochs": OmegaConf.select(scheduler, "warmup_epochs", default=10),
        "lr_decay_steps": list(decay) if decay else None,
    }


def _method_arguments(cls: type, cfg: DictConfig) -> dict[str, Any]:
    """A method's own keywords: ``method_kwargs``, or else what 1.0.2's command line would pass."""
    given = plain(cfg.method_kwargs)
    parameters = _own_parameters(cls)
    if not parameters:  # split_settings checks the names, as for EMP
        return {"method_kwargs": given} if given else {}
    check_names(given, parameters, "method_kwargs", f" for {cfg.method}")
    parser = cls.add_model_specific_args(ArgumentParser())
    arguments = {}
    for name, parameter in parameters.items():
        default = DEFAULTS_OF_1_0_6.get(name, parser.get_default(name))
        if name in given:
            arguments[name] = given[name]
        elif default is not None:
            arguments[name] = default
        elif parameter.default is parameter.empty:
            raise UserError(f"method_kwargs.{name} is not set; {cfg.method} needs it")
    check_queue(cfg, arguments)
    return arguments


def _own_parameters(cls: type) -> dict[str, inspect.Parameter]:
    """Named constructor parameters of a class and its parents, less those of solo-learn's bases."""
    shared = {
        name
        for base in (BaseMethod, BaseMomentumMethod)
        for name in inspect.signature(base.__init__).parameters
    }
    own = {}
    for parent in cls.__mro__[: cls.__mro__.index(BaseMethod)]:
        for name, parameter in inspect.signature(parent.__init__).parameters.items():
            variable = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if name not in shared and not variable:
                own.setdefault(name, parameter)
    return own


def _set_stem_padding(backbone: nn.Module, padding: int | None) -> None:
    """Padding of the 3x3 stem; the weights stay as they are.

    solo-learn's is 2, which makes 34x34 maps of 32x32 images.
    """
    if padding is None:
        return
    stem = getattr(backbone, "conv1", None)
    if not isinstance(stem, nn.Conv2d) or stem.kernel_size != (3, 3):
        raise UserError(
            "backbone.stem_padding is for the 3x3 stem that ResNets have on "
            f"{', '.join(SMALL_IMAGES)}; this backbone has none"
        )
    if padding < 0:
        raise UserError(f"backbone.stem_padding must not be negative, got {padding}")
    stem.padding = (padding, padding)

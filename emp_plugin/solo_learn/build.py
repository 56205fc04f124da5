"""From a configuration in the schema of solo-learn 1.0.6 to a method of the installed version."""

import inspect
import logging
import re
from argparse import ArgumentParser
from dataclasses import replace
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError
from torch import nn

from emp_plugin.config import Run, backbone_kwargs, to_dict
from emp_plugin.config.models import Optimizer, Scheduler
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
    optimizer_kwargs,
    processes,
    without_momentum,
)

SMALL_IMAGES = ("cifar10", "cifar100", "digits")  # solo-learn's 3x3 stem without max-pooling
BACKBONES = ("encoder", "momentum_encoder", "backbone", "momentum_backbone")
# of 1.0.6, where 1.0.2 has others: its 50 make DINO fail in shorter runs
DEFAULTS_OF_1_0_6 = {"warmup_teacher_temperature_epochs": 0}


def build_method(cfg: Run):
    """The LightningModule of a run's configuration, on either version, with our corrections of it.

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
        method.knn = KNN(method.knn_k, cfg.knn_eval.distance_func)
    for name in BACKBONES:
        backbone = getattr(method, name, None)
        if backbone is None:
            continue
        _set_stem_padding(backbone, cfg.backbone.stem_padding)
        if not cfg.performance.disable_channel_last:
            # the default of 1.0.6, and it makes baselines as fast as EMP
            backbone.to(memory_format=torch.channels_last)
    return method


def _prepared(cls: Any, cfg: Run) -> Run:
    """The same with the learning rates that apply, and ``momentum`` in one place alone."""
    factor, accumulated = 1.0, 1  # solo-learn multiplies all learning rates by the latter
    if getattr(cls, "lr_scaled_by_batch_size", True):
        factor = cfg.optimizer.batch_size * processes(cfg) / 256
        accumulated = cfg.accumulate_grad_batches
    has_momentum = issubclass(cls, BaseMomentumMethod)
    rates = cfg.optimizer
    return replace(
        cfg,
        scheduler=replace(cfg.scheduler, name=cfg.scheduler.name.lower()),
        optimizer=replace(rates, lr=rates.lr * factor, classifier_lr=rates.classifier_lr * factor),
        accumulate_grad_batches=accumulated,
        method_kwargs=without_momentum(cfg) if has_momentum else cfg.method_kwargs,
    )


def _build_1_0_6(cls: Any, settings: Run):
    cfg = OmegaConf.create(to_dict(settings))
    if cfg.data.dataset in SMALL_IMAGES:
        cfg.data.dataset = "cifar10"  # one of the names that get the stem for small images
    cfg.backbone.kwargs = backbone_kwargs(settings)
    cfg.optimizer.kwargs = optimizer_kwargs(settings.optimizer)
    names = _read_settings(cls)
    if names:  # otherwise split_settings checks them, as for EMP
        check_names(cfg.method_kwargs, names, "method_kwargs", f" for {cfg.method}")
    # it warns that a schedule by step cannot be resumed; ours can
    logging.disable(logging.WARNING)
    try:
        cfg = cls.add_and_assert_specific_cfg(cfg)
        check_queue(settings, cfg.method_kwargs)
        return corrected(cls)(cfg)
    except ConfigAttributeError as error:
        raise UserError(f"{error.full_key} is not set; {cfg.method} needs it") from error
    finally:
        logging.disable(logging.NOTSET)


def _read_settings(cls: Any) -> list[str]:
    """What a class of 1.0.6 and its parents read from ``cfg.method_kwargs``, by their source."""
    parents = cls.__mro__[: cls.__mro__.index(BaseMethod)]
    source = "".join(inspect.getsource(parent) for parent in parents)
    return sorted(set(re.findall(r"method_kwargs\.(\w+)", source)))


def _build_1_0_2(cls: Any, cfg: Run):
    arguments = {
        "encoder": cfg.backbone.name,
        "backbone_args": {**backbone_kwargs(cfg), "cifar": cfg.data.dataset in SMALL_IMAGES},
        **_optimizer_arguments(cfg.optimizer),
        **_scheduler_arguments(cfg.scheduler),
        "num_classes": cfg.data.num_classes,
        "num_large_crops": cfg.data.num_large_crops,
        "num_small_crops": cfg.data.num_small_crops,
        "max_epochs": cfg.max_epochs,
        "accumulate_grad_batches": cfg.accumulate_grad_batches,
        "knn_eval": cfg.knn_eval.enabled,
        "knn_k": cfg.knn_eval.k,
    }
    if issubclass(cls, BaseMomentumMethod):
        momentum = vars(cfg.momentum)
        arguments |= {name: momentum[setting] for name, setting in MOMENTUM_NAMES.items()}
    arguments |= _method_arguments(cls, cfg)
    return corrected(cls)(**arguments)


def _optimizer_arguments(optimizer: Optimizer) -> dict[str, Any]:
    if optimizer.exclude_bias_n_norm_wd:
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


def _scheduler_arguments(scheduler: Scheduler) -> dict[str, Any]:
    return {
        "scheduler": scheduler.name,
        "min_lr": scheduler.min_lr,
        "warmup_start_lr": scheduler.warmup_start_lr,
        "warmup_epochs": scheduler.warmup_epochs,
        "lr_decay_steps": scheduler.lr_decay_steps,
    }


def _method_arguments(cls: Any, cfg: Run) -> dict[str, Any]:
    """A method's own keywords: ``method_kwargs``, or else what 1.0.2's command line would pass."""
    given = cfg.method_kwargs
    parameters = _own_parameters(cls)
    if not parameters:  # split_settings checks the names, as for EMP
        return {"method_kwargs": dict(given)} if given else {}
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


def _own_parameters(cls: Any) -> dict[str, inspect.Parameter]:
    """Named constructor parameters of a class and its parents, less those of solo-learn's bases."""
    shared = {
        name
        for base in (BaseMethod, BaseMomentumMethod)
        for name in inspect.signature(base.__init__).parameters
    }
    own: dict[str, inspect.Parameter] = {}
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

"""From a YAML file and overrides to a checked configuration, with Hydra."""

import difflib
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

import torch
from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from emp_plugin.config.checks import augmentations, check_evaluation, check_run, of_protocol
from emp_plugin.config.models import Probe, Run
from emp_plugin.config.recipes import COUNTED, config_groups, locate, own_hydra
from emp_plugin.data.datasets import count_classes
from emp_plugin.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")

# In a recipe, ${fit:10,1000,${max_epochs}} is 10/1000 of max_epochs: what the published schedule of
# 1000 epochs does for 10 of them.
OmegaConf.register_new_resolver(
    "fit", lambda epochs, published, run: epochs * run / published, replace=True
)

# settings, without their groups, that are names of files and folders
PATHS = {"train_path", "val_path", "dir", "pretrained_feature_extractor", "resume_from_checkpoint"}

# The arguments of Lightning's Trainer, without those that a run sets itself. A test compares them
# with Lightning's.
TRAINER_KEYS = frozenset(
    """
    accelerator strategy devices num_nodes precision fast_dev_run min_epochs max_steps min_steps
    max_time limit_train_batches limit_val_batches limit_test_batches limit_predict_batches
    overfit_batches val_check_interval check_val_every_n_epoch num_sanity_val_steps
    log_every_n_steps enable_progress_bar enable_model_summary accumulate_grad_batches
    gradient_clip_val gradient_clip_algorithm deterministic benchmark inference_mode profiler
    detect_anomaly barebones sync_batchnorm reload_dataloaders_every_n_epochs
    enable_autolog_hparams model_registry
    """.split()  # noqa: SIM905
)

# What is told to augmentations where they refer to it, as EMP's do; it means nothing elsewhere.
REFERRED_TO = {
    f"data.{name}"
    for name in ("num_patches", "patch_size", "output_size", "interpolation", "scale", "ratio")
}


@overload
def read_config(config_path: str | Path, config_name: str | None, overrides: list[str]) -> Run: ...


@overload
def read_config(
    config_path: str | Path, config_name: str | None, overrides: list[str], schema: type[Settings]
) -> Settings: ...


def read_config(
    config_path: str | Path, config_name: str | None, overrides: list[str], schema: type = Run
) -> Any:
    """Compose a YAML file with overrides and check the result.

    Args:
        config_path: folder of the YAML files.
        config_name: a recipe in it, such as ``cifar/emp``; None: only the overrides.
        overrides: ``key=value``, as Hydra writes them. A new ``optimizer.name`` takes none of the
            recipe's ``optimizer.kwargs``, which are another optimiser's.
        schema: :class:`Run` or :class:`Probe`, of which the result is one.

    Raises:
        UserError: for the first unknown key, wrong type, missing value, impossible combination, or
            override that would do nothing.
    """
    folder = Path(config_path).expanduser().resolve()
    if not folder.is_dir():
        raise UserError(f"{config_path} is not a folder of recipes")
    groups = config_groups(folder)
    plain, inline = [], {}
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals and not item.startswith("~"):
            raise UserError(f"'{item}' is not an override; settings are written key=value")
        # Hydra takes a group's value for a file's name: a list or mapping is put in afterwards
        if key in groups and value.startswith(("[", "{")):
            inline[key] = value
        else:
            plain.append(_hydra_override(item, groups))
    keys = {item.lstrip("+").partition("=")[0] for item in overrides}
    name, place = locate(folder, config_name)
    try:
        with own_hydra(folder):
            composed = compose(name, [*place, *plain])
            if keys & {"optimizer", "optimizer.name"}:
                recipe = OmegaConf.select(compose(name, place), "optimizer", default={})
                if recipe.get("kwargs") and recipe.get("name") != composed.optimizer.name:
                    composed = compose(name, [*place, "~optimizer.kwargs", *plain])
        OmegaConf.set_struct(composed, False)
        for key, value in inline.items():
            composed[key] = OmegaConf.create(value)
        given: Any = OmegaConf.to_container(composed, resolve=False)
    # Hydra raises TypeError and ValueError, too, for some values
    except (HydraException, OmegaConfBaseException, TypeError, ValueError, YAMLError) as error:
        raise UserError(f"{config_name or 'settings'}: {str(error).splitlines()[0]}") from error
    for key in sorted(keys & REFERRED_TO) if schema is Run else ():
        if f"${{{key}}}" not in repr(given):
            raise UserError(
                f"{key} would do nothing: the augmentations of {config_name} do not refer to it"
            )
    return check_config(given, schema)


def _hydra_override(item: str, groups: set[str]) -> str:
    """An override as Hydra wants it.

    ``++`` lets it name a key that the YAML file leaves to the schema's default; the schema finds
    unknown keys. The choice of a group's file, such as ``augmentations=emp``, stays as it is. A
    value that Hydra's grammar does not take as it stands, such as ``photos (1)``, is quoted.
    """
    key, equals, value = item.partition("=")
    if equals and not _is_taken_literally(key, value):
        item = "{}='{}'".format(key, value.replace("'", "\\'"))
    chooses_file = key.lstrip("/") in groups and value.replace("_", "").replace("-", "").isalnum()
    return item if item[0] in "+~" or chooses_file else f"++{item}"


def _is_taken_literally(key: str, value: str) -> bool:
    if value[:1] in ("'", '"') or "\\=" in value:  # its author knows the grammar
        return True
    if key.rpartition(".")[2] in PATHS:  # a folder may be called [a], or true
        return value in ("", "null")
    if value[:1] in ("[", "{") or "\\" in value:
        return True
    try:
        override = OverridesParser.create().parse_override(f"{key}={value}")
    except HydraException:
        return False
    parsed = override.value() if not override.is_sweep_override() else None
    return parsed == value if isinstance(parsed, str) else not override.is_sweep_override()


def check_config(given: Mapping[str, Any], schema: type[Settings]) -> Settings:
    """Check settings in plain containers, and fill in the schema's defaults and what is counted.

    Raises:
        UserError: as :func:`read_config`.
    """
    cfg: Any = _typed(given, schema)
    named = {*given, *(f"data.{key}" for key in given.get("data") or ())}
    for key in sorted(named & COUNTED):
        raise UserError(_unknown_key(key, schema))
    cfg = replace(cfg, evaluation=check_evaluation(cfg.evaluation))
    return cast(Settings, _completed(cfg) if isinstance(cfg, Run) else cfg)


def _completed(cfg: Run) -> Run:
    precision = cfg.precision or _fast_precision(uses_gpu(cfg))
    # False is what YAML makes of off
    mode = "off" if cfg.performance.compile == "False" else cfg.performance.compile
    cfg = replace(cfg, precision=precision, performance=replace(cfg.performance, compile=mode))
    check_run(cfg)
    made = augmentations(cfg)
    large = [view.num_patches for view in made if view.output_size == made[0].output_size]
    counted = replace(
        cfg.data,
        num_classes=count_classes(cfg.data.dataset, cfg.data.train_path, cfg.data.no_labels),
        num_large_crops=sum(large),
        num_small_crops=sum(view.num_patches for view in made) - sum(large),
    )
    return replace(cfg, data=counted)


def _typed(given: Mapping[str, Any], schema: type[Settings]) -> Settings:
    """Plain containers, as YAML has them, as the dataclass that they are meant for.

    Raises:
        UserError: for an unknown key, a wrong type or a missing value.
    """
    given = dict(given)
    if schema is Run:
        others = TRAINER_KEYS - {item.name for item in fields(Run)}
        given["trainer"] = {key: given.pop(key) for key in list(given) if key in others}
    try:
        cfg: Any = _writable(OmegaConf.structured(schema))
        if isinstance(evaluation := given.get("evaluation"), Mapping):
            cfg = OmegaConf.merge(cfg, {"evaluation": of_protocol(evaluation.get("protocol"))})
        cfg = OmegaConf.merge(cfg, given)
        missing = sorted(OmegaConf.missing_keys(cfg))
        if missing:
            raise UserError(f"{missing[0]} is not set; add {missing[0]}=...")
        return cast(Settings, OmegaConf.to_object(cfg))
    except ConfigKeyError as error:
        raise UserError(_unknown_key(error.full_key or str(error.key), schema)) from error
    except OmegaConfBaseException as error:
        where = error.full_key or "configuration"
        raise UserError(f"{where}: {str(error).splitlines()[0]}") from error


def _writable(node: DictConfig) -> DictConfig:
    """A schema, which OmegaConf lets nobody merge into where its dataclasses are frozen."""
    OmegaConf.set_readonly(node, None)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            _writable(child)
    return node


def to_dict(settings: Run | Probe) -> dict[str, Any]:
    """Settings in plain containers, as they are saved, compared, and written in YAML."""
    given = asdict(settings)
    trainer: dict[str, Any] = given.pop("trainer", {})
    return {k: v for k, v in given.items() if v is not None or k not in TRAINER_KEYS} | trainer


def from_dict(saved: Mapping[str, Any]) -> Run:
    """A run from what :func:`to_dict` made of one, in this version or an older one.

    What is not saved has its default; what is no setting any more is left out.
    """
    trainer = {key: value for key, value in saved.items() if key in TRAINER_KEYS}
    return _typed(_known(saved, Run) | trainer, Run)


def _known(saved: Mapping[str, Any], schema: Any) -> dict[str, Any]:
    """Those of the saved settings that a dataclass has."""
    there = {item.name: item.type for item in fields(schema) if item.name in saved}
    return {
        name: _known(saved[name], kind) if is_dataclass(kind) else saved[name]
        for name, kind in there.items()
    }


def read_settings(
    given: Mapping[str, Any], overrides: list[str], schema: type[Settings]
) -> Settings:
    """Settings in plain containers and overrides of them, without Hydra.

    A list of one may be written without its brackets.

    Raises:
        UserError: for an unknown key, a wrong type or a missing value.
    """
    lists = {item.name for item in fields(schema) if "list" in str(item.type)}
    try:
        merged: Any = OmegaConf.merge(dict(given), OmegaConf.from_dotlist(overrides))
        for name in lists & set(merged):
            if not isinstance(merged[name], ListConfig):
                merged[name] = [merged[name]]
        return _typed(cast(dict[str, Any], OmegaConf.to_container(merged)), schema)
    except (OmegaConfBaseException, YAMLError) as error:
        raise UserError(str(error).splitlines()[0]) from error


def uses_gpu(cfg: Run | Probe) -> bool:
    """Whether a run or an evaluation is for CUDA's devices; other accelerators are untried."""
    return cfg.accelerator != "cpu" and torch.cuda.is_available()


def _fast_precision(gpu: bool) -> str:
    """The precision that this machine is fast in.

    Without hardware for it (GPUs before Ampere, CPUs without AVX512-BF16) bf16 is slower than
    float32. So it is on an Intel CPU with AVX512-BF16 whose AMX a virtual machine hides. The
    measurements are in benchmarks/README.md.
    """
    if gpu:
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16-mixed" if native else "16-mixed"
    # old versions of torch lack these functions; 2.6 has the first
    if not getattr(torch.cpu, "_is_avx512_bf16_supported", bool)():
        return "32"
    cpu: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "32" if "Intel" in cpu.get("cpu_name", "") and not cpu.get("amx_tile") else "bf16-mixed"


def trainer_arguments(cfg: Run) -> dict[str, Any]:
    """The arguments of Lightning's Trainer that the configuration sets."""
    arguments = {key: value for key, value in to_dict(cfg).items() if key in TRAINER_KEYS}
    if not torch.cuda.is_available() and arguments.get("accelerator", "auto") == "auto":
        arguments["accelerator"] = "cpu"  # Lightning would take Apple's GPU, which lacks float64
    # solo-learn's recipes list GPUs by number; Lightning's CPUs have none
    if isinstance(arguments.get("devices"), list) and not uses_gpu(cfg):
        arguments["devices"] = len(arguments["devices"])
    return arguments


def _unknown_key(key: str, schema: type) -> str:
    known = _names(schema) - COUNTED
    known |= TRAINER_KEYS if schema is Run else set()
    names = (key, key.split(".")[0])
    close = [match for name in names for match in difflib.get_close_matches(name, known, n=1)]
    return f"unknown setting '{key}'" + (f"; did you mean '{close[0]}'?" if close else "")


def _names(schema: Any, prefix: str = "") -> set[str]:
    """The dotted names of all settings of a dataclass."""
    names = set()
    for item in fields(schema):
        names.add(prefix + item.name)
        if is_dataclass(item.type):
            names |= _names(item.type, f"{prefix}{item.name}.")
    return names

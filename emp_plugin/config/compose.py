"""From a YAML file and overrides to a checked configuration, with Hydra."""

import difflib
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from emp_plugin.config.checks import augmentations, check_evaluation, check_run
from emp_plugin.config.models import Run
from emp_plugin.config.recipes import config_groups, locate
from emp_plugin.data.datasets import count_classes
from emp_plugin.errors import UserError

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


def read_config(
    config_path: str | Path, config_name: str | None, overrides: list[str], schema: type = Run
) -> DictConfig:
    """Compose a YAML file with overrides and check the result.

    Args:
        config_path: folder of the YAML files.
        config_name: a recipe in it, such as ``cifar/emp``; None: only the overrides.
        overrides: ``key=value``, as Hydra writes them.
        schema: :class:`Run` or :class:`Probe`.

    Raises:
        UserError: for the first unknown key, wrong type, missing value or impossible combination.
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
    GlobalHydra.instance().clear()
    name, place = locate(folder, config_name)
    try:
        with initialize_config_dir(config_dir=str(folder), version_base="1.2"):
            composed = compose(config_name=name, overrides=[*place, *plain])
        OmegaConf.set_struct(composed, False)
        for key, value in inline.items():
            composed[key] = OmegaConf.create(value)
    # Hydra raises TypeError and ValueError, too, for some values
    except (HydraException, OmegaConfBaseException, TypeError, ValueError, YAMLError) as error:
        raise UserError(f"{name or 'settings'}: {str(error).splitlines()[0]}") from error
    return check_config(composed, schema)


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
    if value[:1] in ("'", '"') or "\\" in value:  # its author knows the grammar
        return True
    if key.rpartition(".")[2] in PATHS:  # a folder may be called [a], or true
        return value in ("", "null")
    if value[:1] in ("[", "{"):
        return True
    try:
        override = OverridesParser.create().parse_override(f"{key}={value}")
    except HydraException:
        return False
    parsed = override.value() if not override.is_sweep_override() else None
    return parsed == value if isinstance(parsed, str) else not override.is_sweep_override()


def check_config(composed: DictConfig, schema: type = Run) -> DictConfig:
    """Check a composed configuration and fill in the schema's defaults.

    Raises:
        UserError: as :func:`read_config`.
    """
    given = OmegaConf.to_container(composed, resolve=False)
    trainer = {key: given.pop(key) for key in list(given) if schema is Run and key in TRAINER_KEYS}
    try:
        cfg = OmegaConf.merge(OmegaConf.structured(schema), given)
        missing = sorted(OmegaConf.missing_keys(cfg))
        if missing:
            raise UserError(f"{missing[0]} is not set; add {missing[0]}=...")
        # plain, because it is saved and compared
        cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    except ConfigKeyError as error:
        raise UserError(_unknown_key(error.full_key or str(error.key), schema)) from error
    except OmegaConfBaseException as error:
        where = error.full_key or "configuration"
        raise UserError(f"{where}: {str(error).splitlines()[0]}") from error
    if schema is Run:
        cfg = OmegaConf.merge({"accumulate_grad_batches": 1}, cfg, trainer)
        if cfg.get("precision") is None:
            cfg.precision = _fast_precision(uses_gpu(cfg))
    check_evaluation(cfg.evaluation)
    if schema is Run:
        check_run(cfg)
        _count_views(cfg)
    return cfg


def uses_gpu(cfg: DictConfig) -> bool:
    """Whether a run or an evaluation is for CUDA's devices; other accelerators are untried."""
    return cfg.get("accelerator") != "cpu" and torch.cuda.is_available()


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
    cpu = getattr(torch.cpu, "get_capabilities", dict)()
    return "32" if "Intel" in cpu.get("cpu_name", "") and not cpu.get("amx_tile") else "bf16-mixed"


def trainer_arguments(cfg: DictConfig) -> dict[str, Any]:
    """The arguments of Lightning's Trainer that the configuration sets."""
    settings = OmegaConf.to_container(cfg)
    arguments = {key: value for key, value in settings.items() if key in TRAINER_KEYS}
    if not torch.cuda.is_available() and arguments.get("accelerator", "auto") == "auto":
        arguments["accelerator"] = "cpu"  # Lightning would take Apple's GPU, which lacks float64
    # solo-learn's recipes list GPUs by number; Lightning's CPUs have none
    if isinstance(arguments.get("devices"), list) and not uses_gpu(cfg):
        arguments["devices"] = len(arguments["devices"])
    return arguments


def _unknown_key(key: str, schema: type) -> str:
    known = _known_keys(OmegaConf.structured(schema)) | (TRAINER_KEYS if schema is Run else set())
    names = (key, key.split(".")[0])
    close = [match for name in names for match in difflib.get_close_matches(name, known, n=1)]
    return f"unknown setting '{key}'" + (f"; did you mean '{close[0]}'?" if close else "")


def _known_keys(node: DictConfig, prefix: str = "") -> set[str]:
    keys = set()
    for key in node:
        keys.add(prefix + key)
        child = None if OmegaConf.is_missing(node, key) else node[key]
        if isinstance(child, DictConfig):
            keys |= _known_keys(child, f"{prefix}{key}.")
    return keys


def _count_views(cfg: DictConfig) -> None:
    """Add what solo-learn's constructors are told about the data: classes and views.

    Views of the first one's size are large crops.
    """
    cfg.data.num_classes = count_classes(cfg.data.dataset, cfg.data.train_path, cfg.data.no_labels)
    made = augmentations(cfg)
    large = [view.num_patches for view in made if view.output_size == made[0].output_size]
    cfg.data.num_large_crops = sum(large)
    cfg.data.num_small_crops = sum(view.num_patches for view in made) - sum(large)

"""The recipes that are shipped: where they are, how they are called, what each is composed of."""

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from emp_plugin.errors import UserError

# A dataset without a recipe of its own for a method has this one's, with its own settings after it.
LARGE_IMAGES = "imagenet100"
# What is counted of the data and the augmentations is nobody's to set.
COUNTED = ("data.num_classes", "data.num_large_crops", "data.num_small_crops")
PARTS = ("augmentations", "datasets", "shared")  # folders of what recipes are composed of


def recipes_root() -> Path:
    """The folder of the shipped recipes: of a wheel, or ``scripts/pretrain`` of a clone."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "scripts" / "pretrain"


def recipe_names(root: Path) -> list[str]:
    """The recipes in a folder, such as ``cifar/emp``."""
    paths = (path.relative_to(root) for path in (*root.glob("*.yaml"), *root.glob("*/*.yaml")))
    names = {path.with_suffix("").as_posix() for path in paths if path.parent.name not in PARTS}
    large = [name.partition("/")[2] for name in names if name.startswith(f"{LARGE_IMAGES}/")]
    datasets = [path.stem for path in (root / "datasets").glob("*.yaml")]
    return sorted(names | {f"{dataset}/{method}" for dataset in datasets for method in large})


def config_groups(folder: Path) -> set[str]:
    """The parts of a recipe that a file can be chosen for, as in ``augmentations=crop_grey``."""
    return {
        path.name for root in (folder, recipes_root()) for path in root.iterdir() if path.is_dir()
    }


def locate(folder: Path, name: str | None) -> tuple[str | None, list[str]]:
    """What Hydra is told to compose a recipe: the name of a file, if it is one, and overrides.

    Files of any folder may refer to the shipped ones: ``defaults: [/cifar/emp, _self_]``.

    Args:
        folder: of the recipes.
        name: with or without ``.yaml``; None is a recipe that says nothing.

    Raises:
        UserError: if there is no such recipe.
    """
    overrides = [] if folder == recipes_root() else [f"hydra.searchpath=['{recipes_root()}']"]
    name = name and name.removesuffix(".yaml")
    if name is None or (folder / f"{name}.yaml").is_file():
        return name, overrides
    names = recipe_names(folder)
    if name in names:
        dataset, _, method = name.partition("/")
        return None, [*overrides, f"+{LARGE_IMAGES}={method}", f"+datasets@_global_={dataset}"]
    close = difflib.get_close_matches(name, names, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else "`emp list` shows what there is"
    raise UserError(f"there is no recipe {name} in {folder}; {hint}")


def annotated(
    settings: Mapping[str, Any], folder: Path, name: str | None, overrides: list[str]
) -> str:
    """Settings as YAML, each with its origin: a file of the recipe, the command line or a default.

    Args:
        settings: of the recipe with the overrides, resolved.
        folder, name, overrides: as of :func:`emp_plugin.config.read_config`.
    """
    origins = _origins(folder, name, overrides)
    return "\n".join(_annotated(settings, origins))


def _origins(folder: Path, name: str | None, overrides: list[str]) -> dict[str, str]:
    """By dotted key, where its value comes from."""
    name, own = locate(folder, name)
    given = {item.lstrip("+").partition("=")[0]: item for item in overrides}
    chosen = {key for key in config_groups(folder) & set(given) if given[key][-1] not in "]}"}
    choices = [given[key] for key in chosen]
    with initialize_config_dir(config_dir=str(folder), version_base="1.2"):
        loader = GlobalHydra.instance().config_loader()
        files = loader.compute_defaults_list(name, [*own, *choices], RunMode.RUN).defaults
    origins: dict[str, str] = {}
    for file in files:
        paths = (root / f"{file.config_path}.yaml" for root in (folder, recipes_root()))
        path = next((path for path in paths if path.is_file()), None)
        if path is not None:  # and none of Hydra's own
            content = OmegaConf.to_container(OmegaConf.load(path))
            origins |= dict.fromkeys(_keys(content, file.package or ""), file.config_path)
    return origins | dict.fromkeys(set(given) - chosen, "command line")


def _keys(node: Any, prefix: str) -> Iterator[str]:
    if not isinstance(node, dict):
        yield prefix
        return
    for key, value in node.items():
        yield from _keys(value, f"{prefix}.{key}" if prefix else key)


def _annotated(
    node: Mapping[str, Any], origins: dict[str, str], prefix: str = "", origin: str = "default"
) -> Iterator[str]:
    indent = "  " * prefix.count(".")
    for key, value in node.items():
        name = f"{prefix}{key}"
        own = origins.get(name, origin)
        if isinstance(value, Mapping) and value:
            yield f"{indent}{key}:"
            yield from _annotated(value, origins, f"{name}.", own)
        elif name not in COUNTED:
            flow = None if isinstance(value, list) else False  # short lists on one line
            text = yaml.safe_dump({key: value}, default_flow_style=flow, sort_keys=False)
            first, *others = text.splitlines()
            yield f"{indent}{first}  # {own}"
            yield from (f"{indent}{line}" for line in others)

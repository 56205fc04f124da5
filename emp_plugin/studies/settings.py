"""The settings of a comparison; what is none of them goes to the recipes."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from emp_plugin.errors import UserError

BUDGETS, SCHEDULES = ("epochs", "minutes", "passes"), ("fitted", "snapshot")


@dataclass
class Comparison:
    """A list of one may be written without its brackets."""

    recipes: str = MISSING  # folder of the recipes, beside this file's: cifar or digits
    overrides: list[str] = field(
        default_factory=list
    )  # of all recipes; those of the command line follow them
    methods: list[str] = field(
        default_factory=lambda: ["emp", "simclr", "byol", "vicreg", "swav", "ressl"]
    )  # names of recipes
    seeds: list[int] = field(default_factory=lambda: [0])
    ablate: str | None = None  # one setting of the recipes, e.g. data.num_patches, and
    values: list[Any] = field(
        default_factory=list
    )  # the numbers it takes in turn, nothing else changed
    budget: list[str] = field(
        default_factory=lambda: ["epochs"]
    )  # what all get the same of: epochs, minutes, or backbone passes (those of EMP's epochs)
    epochs: list[float] = field(default_factory=lambda: [1.0])
    minutes: list[float] = field(default_factory=list)
    schedule: list[str] = field(
        default_factory=lambda: ["fitted"]
    )  # spans the k epochs, or is a long one's, looked at after k epochs
    evaluate_every: float | None = (
        None  # epochs between points in the course of every run, for time_to_accuracy.md and convergence.png
    )
    thresholds: list[float] = field(
        default_factory=list
    )  # of time_to_accuracy.md, top-1 in percent
    results_dir: str = MISSING
    report_only: bool = False  # make tables and plots from the CSV that is there


def read_comparison(
    config_path: str, config_name: str, overrides: list[str]
) -> tuple[DictConfig, list[str]]:
    """The settings of ``<config_path>/<config_name>.yaml`` with the overrides that are its own, and the overrides left for the recipes.

    Raises:
        UserError: for a missing file, a wrong type or a value that is not known.
    """
    path = Path(config_path).expanduser() / f"{config_name.removesuffix('.yaml')}.yaml"
    if not path.is_file():
        raise UserError(f"{path} is not a file")
    names = {item.name for item in fields(Comparison)}
    own = [item for item in overrides if item.partition("=")[0] in names]
    try:
        given = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(own))
        lists = {item.name for item in fields(Comparison) if "list" in str(item.type)}
        for name in lists & set(given):
            if not isinstance(given[name], ListConfig):
                given[name] = [given[name]]
        cfg = OmegaConf.merge(OmegaConf.structured(Comparison), given)
        missing = sorted(OmegaConf.missing_keys(cfg))
    except OmegaConfBaseException as error:
        raise UserError(f"{path.name}: {str(error).splitlines()[0]}") from error
    if missing:
        raise UserError(f"{missing[0]} is not set; add {missing[0]}=...")
    _check(cfg)
    return cfg, [item for item in overrides if item not in own]


def _check(cfg: DictConfig) -> None:
    def require(condition: Any, message: str) -> None:
        if not condition:
            raise UserError(message)

    require(
        set(cfg.budget) <= set(BUDGETS) and cfg.budget,
        f"budget must be one of {', '.join(BUDGETS)}, got {list(cfg.budget)}",
    )
    require(
        set(cfg.schedule) <= set(SCHEDULES) and cfg.schedule,
        f"schedule knows {' and '.join(SCHEDULES)}, got {list(cfg.schedule)}",
    )
    require(cfg.methods and cfg.seeds, "methods and seeds must not be empty")
    for budget in cfg.budget:
        name = "minutes" if budget == "minutes" else "epochs"
        require(
            cfg[name] and min(cfg[name]) > 0, f"budget={budget} needs {name}=[...], all positive"
        )
    require(
        cfg.evaluate_every is None or cfg.evaluate_every > 0,
        f"evaluate_every is a number of epochs, such as 0.1, got {cfg.evaluate_every}",
    )
    require(
        not (cfg.ablate or "").startswith("evaluation"),
        "ablate is for settings of the training; evaluation.probes, .views and .label_fractions take lists",
    )
    require(
        bool(cfg.ablate) == bool(cfg["values"]),
        "an ablation needs both: ablate=SETTING and values=[...]",
    )
    require(
        all(
            isinstance(value, (int, float)) and not isinstance(value, bool)
            for value in cfg["values"]
        ),
        f"values must be numbers, got {list(cfg['values'])}",
    )
    if "snapshot" in cfg.schedule:
        require(
            list(cfg.budget) == ["epochs"], "schedule=snapshot is of epochs: leave budget at epochs"
        )
        require(
            all(epoch == int(epoch) for epoch in cfg.epochs),
            "schedule=snapshot looks at whole epochs",
        )

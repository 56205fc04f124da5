"""The settings of a study; what is none of them goes to the recipes."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from emp_plugin.config import read_settings
from emp_plugin.errors import UserError

SHIPPED = Path(__file__).with_name("shipped.yaml")
BUDGETS, SCHEDULES = ("epochs", "minutes", "flops"), ("fitted", "snapshot")
METHODS = ("emp", "simclr", "byol", "vicreg", "swav", "ressl")


@dataclass(frozen=True)
class StudySettings:
    """A list of one may be written without its brackets."""

    # a folder of recipes, such as cifar or digits
    recipes: str
    results_dir: str  # if nothing is said, outputs/compare-<name of the study>
    # of all recipes; those of the command line follow them
    overrides: list[str] = field(default_factory=list)
    # names of recipes
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    seeds: list[int] = field(default_factory=lambda: [0])
    # an ablation: one setting of the recipes, such as data.num_patches,
    ablate: str | None = None
    # and the numbers it takes in turn, with nothing else changed
    values: list[Any] = field(default_factory=list)
    # what all get the same of: epochs, minutes, or training FLOPs (those of EMP's epochs)
    budget: list[str] = field(default_factory=lambda: ["epochs"])
    epochs: list[float] = field(default_factory=lambda: [1.0])
    minutes: list[float] = field(default_factory=list)
    # spans the k epochs (fitted), or is a long one's, looked at after k epochs (snapshot)
    schedule: list[str] = field(default_factory=lambda: ["fitted"])
    # epochs between points in the course of every run, for time_to_accuracy.md and convergence.png
    evaluate_every: float | None = None
    # of time_to_accuracy.md, top-1 in percent
    thresholds: list[float] = field(default_factory=list)
    # runs that train at once, for a large GPU; their rows then have no minutes
    at_once: int = 1
    # make tables and figures from the CSV that is there
    report_only: bool = False


def study_names() -> list[str]:
    """The studies in ``shipped.yaml``."""
    return list(yaml.safe_load(SHIPPED.read_text()))


def read_comparison(study: str, overrides: list[str]) -> tuple[StudySettings, list[str]]:
    """The settings of a study, and the overrides that are left for the recipes.

    Args:
        study: name of one in ``shipped.yaml``, such as cifar10, or path of a YAML file.
        overrides: ``key=value``, of the study and of the recipes.

    Raises:
        UserError: for a study that is not there, a wrong type or a value that is not known.
    """
    path = Path(study).expanduser()
    names = {item.name for item in fields(StudySettings)}
    own = [item for item in overrides if item.partition("=")[0] in names]
    given = {"results_dir": f"outputs/compare-{path.stem}"} | _load(path)
    try:
        cfg = read_settings(given, own, StudySettings)
    except UserError as error:
        raise UserError(f"{path.name}: {error}") from error
    _check(cfg)
    return cfg, [item for item in overrides if item not in own]


def _load(path: Path) -> dict[str, Any]:
    if path.suffix == ".yaml":
        if not path.is_file():
            raise UserError(f"{path} is not a file")
        return yaml.safe_load(path.read_text()) or {}
    name = str(path)
    if name not in study_names():
        known = ", ".join(study_names())
        raise UserError(f"there is no study '{name}'; choose {known} or the path of a YAML file")
    return yaml.safe_load(SHIPPED.read_text())[name]


def _check(cfg: StudySettings) -> None:
    def require(condition: Any, message: str) -> None:
        if not condition:
            raise UserError(message)

    require(
        cfg.budget and set(cfg.budget) <= set(BUDGETS),
        f"budget must be one of {', '.join(BUDGETS)}, got {cfg.budget}",
    )
    require(
        cfg.schedule and set(cfg.schedule) <= set(SCHEDULES),
        f"schedule knows {' and '.join(SCHEDULES)}, got {cfg.schedule}",
    )
    require(cfg.methods and cfg.seeds, "methods and seeds must not be empty")
    for budget in cfg.budget:
        name = "minutes" if budget == "minutes" else "epochs"
        lengths = getattr(cfg, name)
        require(lengths and min(lengths) > 0, f"budget={budget} needs {name}=[...], all positive")
    require(
        cfg.evaluate_every is None or cfg.evaluate_every > 0,
        f"evaluate_every is a number of epochs, such as 0.1, got {cfg.evaluate_every}",
    )
    require(cfg.at_once > 0, f"at_once is a number of runs, got {cfg.at_once}")
    alone = cfg.at_once == 1 or "minutes" not in cfg.budget
    require(alone, "budget=minutes needs at_once=1: runs side by side slow each other")
    if "snapshot" in cfg.schedule:
        of_epochs = cfg.budget == ["epochs"]
        require(of_epochs, "schedule=snapshot is of epochs: leave budget at epochs")
        whole = all(epoch == int(epoch) for epoch in cfg.epochs)
        require(whole, "schedule=snapshot looks at whole epochs")

    ablate, values = cfg.ablate or "", cfg.values
    require(
        not ablate.startswith("evaluation"),
        "ablate is for settings of the training; "
        "evaluation.probes, .views and .label_fractions take lists",
    )
    require(bool(ablate) == bool(values), "an ablation needs both: ablate=SETTING and values=[...]")
    numbers = all(type(value) in (int, float) for value in values)
    require(numbers, f"values must be numbers, got {values}")

"""The rows of results.csv: made from evaluations, and read again for tables and figures."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from emp_plugin.config import Run
from emp_plugin.errors import UserError
from emp_plugin.evaluation.protocol import PIXELS, UNTRAINED
from emp_plugin.evaluation.views import VIEWS
from emp_plugin.studies.plan import Trial
from emp_plugin.studies.titles import PROBES, dataset_title, method_title
from emp_plugin.training.probing import describe_view

OF_TRAINING = (
    "steps",
    "images",
    "patches",
    "flops",
    "train_seconds",
    "evaluation_seconds",
)
OF_PROBE = (
    "protocol",
    "features",
    "view",
    "view_patches",
    "augmented",
    "scale",
    "probe",
    "labels",
    "precision",
)
ACCURACIES = ("top1", "top5")
# what a row was made with, by its name in versions.json
OF_VERSIONS = {
    "commit": "commit",
    "machine": "hardware",
    "torch": "torch",
    "solo_learn": "solo-learn",
}
COLUMNS = [
    "dataset",
    "holdout",
    "fraction",
    "method",
    "setting",
    "value",
    "seed",
    "schedule",
    "budget",
    "length",
    "epoch",
    *OF_TRAINING,
    *OF_PROBE,
    *ACCURACIES,
    "collapsed",
    "identity",
    *OF_VERSIONS,
    "inputs",  # of which trial's references these are, or which ones are this trial's
    "paper",  # see paper_name
    "run",
    "error",
]
# Columns that hold no numbers, whatever they look like: an identity may be 12 digits.
TEXTS = [
    "setting",
    "schedule",
    "protocol",
    "precision",
    "identity",
    *OF_VERSIONS,
    "inputs",
    "paper",
    "error",
]
# the schedule of a row in the course of a run: after ``epoch`` epochs of one of ``length``
COURSE = "course"
REFERENCES = (PIXELS, UNTRAINED)
# what a reference has in place of its trial's
NOT_TRAINED = {
    **dict.fromkeys(("length", "epoch", *OF_TRAINING[:-1]), 0),
    **dict.fromkeys(("paper", "schedule", "setting", "value", "identity"), ""),
    "collapsed": False,
}


# --- made from evaluations


def trial_row(trial: Trial, recipe: Run, **values: Any) -> dict[str, Any]:
    """What all rows of a trial have in common, and these values."""
    row: dict[str, Any] = {
        key: getattr(recipe.data, key) for key in ("dataset", "holdout", "fraction")
    }
    row |= {"method": trial.method, "seed": trial.seed, "schedule": trial.schedule}
    row |= {"budget": trial.budget, "length": trial.length}
    for item in trial.override:
        row["setting"], row["value"] = item.split("=")
    return row | values


def version_columns(versions: dict[str, str]) -> dict[str, str]:
    """The columns that are made from a run's versions.json."""
    return {column: versions[name] for column, name in OF_VERSIONS.items()}


def evaluation_rows(row: dict[str, Any], summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one evaluation.

    Args:
        row: what they have in common.
        summary: as in summary.json.
    """
    rows = []
    for result in summary["evaluation"]:
        made = row | {key: summary[key] for key in OF_TRAINING}
        made |= {key: result[key] for key in (*OF_PROBE, *ACCURACIES)}
        if result["model"] in REFERENCES:
            made |= NOT_TRAINED | {"method": result["model"]}
        rows.append(made)
    return rows


def references_in(rows: Iterable[dict[str, Any]], seed: int) -> set[str]:
    """The ``inputs`` of the references that there are with a seed."""
    return {row["inputs"] for row in rows if row["method"] in REFERENCES and row["seed"] == seed}


def make_table(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Rows as they are written; a reference, or a point of a run of two trials, stands once."""
    table = pd.DataFrame(list(rows), columns=COLUMNS)
    references = table.method.isin(REFERENCES)
    repeated = references & table.duplicated(["method", "inputs", "seed", *OF_PROBE])
    course = table.schedule == COURSE
    repeated |= course & table.duplicated(["run", "schedule", "steps", *OF_PROBE])
    return table[~repeated]


# --- read for tables and figures


def read_table(path: Path) -> pd.DataFrame:
    """A CSV of rows, with :data:`TEXTS` as they were written."""
    return pd.read_csv(path, dtype=dict.fromkeys(TEXTS, str))


def read_rows(path: Path) -> pd.DataFrame:
    """The rows of a CSV of :data:`COLUMNS`, with the ``title`` that each has in tables."""
    rows = read_table(path)
    if "protocol" not in rows:
        raise UserError(
            f"{path} is of an evaluation before there were protocols: its tables stay as they are"
        )
    rows = rows.reindex(columns=COLUMNS)
    rows[TEXTS] = rows[TEXTS].fillna("")
    rows["labels"] = rows["labels"].fillna(1.0)  # a failed run has none
    rows["collapsed"] = rows["collapsed"].eq(True)
    rows["title"] = [_title(row.method, row.setting, row.value) for row in rows.itertuples()]
    _name_inputs(rows)
    return rows


def _title(method: str, setting: str, value: float) -> str:
    """What a row is of: "EMP-SSL", or in an ablation "EMP-SSL, num_patches 5"."""
    name = method_title(method)
    return f"{name}, {setting.rpartition('.')[2]} {value:g}" if setting else name


def _name_inputs(rows: pd.DataFrame) -> None:
    """Say in the titles of references which methods they are for, if there are several."""
    measured, references = split_references(rows)
    if references.inputs.nunique() < 2:
        return
    for inputs, alike in references.groupby("inputs"):
        same = measured[measured.inputs == inputs]
        rows.loc[alike.index, "title"] += f", for {', '.join(same.title.unique())}"


def split_references(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(rows of methods, rows of the references)."""
    reference = rows.method.isin(REFERENCES)
    return rows[~reference], rows[reference]


class Cell(NamedTuple):
    """What a column of a table, or a line of a figure's axes, shows: a probe of a view."""

    probe: str
    view: str
    view_patches: int = 0  # of a bag
    augmented: bool = False
    scale: float | None = 1.0  # None: methods have their own

    def __str__(self) -> str:
        view = describe_view(self._asdict() | {"scale": self.scale or 1})
        return f"{PROBES[self.probe]}, {view}"

    @property
    def caption(self) -> str:
        if self.view == "dense":
            return str(self) if self.scale else f"{self}, each method at its scale"
        return f"{self} {'images' if self.view == 'whole' else 'patches'}"

    def holds(self, rows: pd.DataFrame | pd.Series) -> Any:
        """Whether rows, or one row, are of it, whatever their scale."""
        same = (rows["probe"] == self.probe) & (rows["view"] == self.view)
        if self.view == "bag":
            same &= rows["view_patches"] == self.view_patches
            same &= rows["augmented"] == self.augmented
        return same

    def of(self, rows: pd.DataFrame) -> pd.DataFrame:
        return rows[self.holds(rows)]


def cells(rows: pd.DataFrame) -> list[Cell]:
    """The cells that rows are of, in the order of the columns; whole images come first."""
    found = []
    columns = ["probe", "view", "view_patches", "augmented"]
    evaluated = rows[rows.probe.notna()]
    for (probe, view, *bag), alike in evaluated.groupby(columns, dropna=False, sort=False):
        patches, augmented = bag if view == "bag" else (0, False)
        scale = alike.scale.iloc[0] if alike.scale.nunique() == 1 else None
        found.append(Cell(probe, view, int(patches), bool(augmented), scale))

    def order(cell: Cell) -> tuple[Any, ...]:
        return list(PROBES).index(cell.probe), VIEWS.index(cell.view), cell.view_patches

    return sorted(found, key=order)


def data_title(rows: pd.DataFrame) -> str:
    """Dataset, part of its training images, and hold-out."""
    title = dataset_title(rows.dataset.iloc[0])
    holdout, fractions = rows.holdout.max(), rows.fraction.fillna(-1).unique()
    if len(fractions) == 1 and 0 < fractions[0] < 1:
        title += f", {100 * fractions[0]:g} % of the training images"
    if holdout:
        title += f", held-out {100 * holdout:g} % of the training set"
    return title


def protocol_title(rows: pd.DataFrame) -> str:
    """Of which protocol, or protocols, the rows are."""
    names = sorted(set(rows.protocol) - {""})
    if not names:
        return "nothing evaluated"
    return f"protocol{'s' if len(names) > 1 else ''} {' and '.join(names)}"

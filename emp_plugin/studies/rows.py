"""The rows of results.csv: made from evaluations, and read again for tables and figures."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from omegaconf import DictConfig

from emp_plugin.studies.plan import Trial
from emp_plugin.studies.titles import PROBES, dataset_title, method_title

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
    "steps",
    "images",
    "patches",
    "train_seconds",
    "evaluation_seconds",
    "inputs",
    "features",
    "view",
    "probe",
    "labels",
    "top1",
    "top5",
    "paper",
    "run",
    "error",
]
OF_TRAINING = ("steps", "images", "patches", "train_seconds", "evaluation_seconds")
OF_PROBE = ("features", "view", "probe", "labels")
# the schedule of a row in the course of a run: after ``epoch`` epochs of one of ``length``
COURSE = "course"
REFERENCES = ("raw pixels", "untrained")
# what a reference has in place of its trial's
NOT_TRAINED = {
    **dict.fromkeys(("length", "epoch", "steps", "images", "patches", "train_seconds"), 0),
    **dict.fromkeys(("paper", "schedule", "setting", "value"), ""),
}


# --- made from evaluations


def trial_row(trial: Trial, recipe: DictConfig, **values: Any) -> dict[str, Any]:
    """What all rows of a trial have in common, and these values."""
    row = {key: recipe.data[key] for key in ("dataset", "holdout", "fraction")}
    row |= {"method": trial.method, "seed": trial.seed, "schedule": trial.schedule}
    row |= {"budget": trial.budget, "length": trial.length}
    for item in trial.override:
        row["setting"], row["value"] = item.split("=")
    return row | values


def evaluation_rows(
    row: dict[str, Any], summary: dict[str, Any], inputs: dict[str, str]
) -> list[dict[str, Any]]:
    """The rows of one evaluation.

    Args:
        row: what they have in common.
        summary: as in summary.json.
        inputs: by view, whose images the references see; as the study knows it.
    """
    rows = []
    for result in summary["evaluation"]:
        # an evaluation from before there were parts of the labels has none
        result = {"labels": 1.0} | result
        made = row | {key: summary[key] for key in OF_TRAINING}
        made |= {key: result[key] for key in (*OF_PROBE, "top1", "top5")}
        made["inputs"] = inputs[_kind_of_view(result)]
        if result["model"] in REFERENCES:
            made |= NOT_TRAINED | {"method": result["model"]}
        rows.append(made)
    return rows


def references_in(rows: Iterable[dict[str, Any]], seed: int) -> set[tuple[str, str]]:
    """(view, inputs) of the references that there are with a seed."""
    return {
        (_kind_of_view(row), row["inputs"])
        for row in rows
        if row["method"] in REFERENCES and row["seed"] == seed
    }


def _kind_of_view(row: dict[str, Any]) -> str:
    return row["view"].split()[0]


def make_table(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Rows as they are written; a reference, or a point of a run of two trials, stands once."""
    table = pd.DataFrame(list(rows), columns=COLUMNS)
    references = table.method.isin(REFERENCES)
    repeated = references & table.duplicated(["method", "inputs", "seed", *OF_PROBE])
    course = table.schedule == COURSE
    repeated |= course & table.duplicated(["run", "schedule", "steps", *OF_PROBE])
    return table[~repeated]


# --- read for tables and figures


def read_rows(path: Path) -> pd.DataFrame:
    """The rows of a CSV of :data:`COLUMNS`, with the ``title`` that each has in tables."""
    texts = ["setting", "inputs", "schedule", "paper", "error"]
    rows = pd.read_csv(path, dtype=dict.fromkeys(texts, str)).reindex(columns=COLUMNS)
    rows[texts] = rows[texts].fillna("")
    # a failed run has none, nor has a CSV from before there were parts of the labels
    rows["labels"] = rows["labels"].fillna(1.0)
    rows["title"] = [_title(row.method, row.setting, row.value) for row in rows.itertuples()]
    _name_inputs(rows)
    return rows


def _title(method: str, setting: str, value: float) -> str:
    """What a row is of: "EMP-SSL", or in an ablation "EMP-SSL, num_patches 5"."""
    name = method_title(method)
    return f"{name}, {setting.rpartition('.')[2]} {value:g}" if setting else name


def _name_inputs(rows: pd.DataFrame) -> None:
    """Say in the titles of references which methods they are for, where there are several."""
    measured, references = split_references(rows)
    for (view, inputs), alike in references.groupby(["view", "inputs"]):
        if (references.view == view).sum() > len(alike):
            same = measured[(measured.view == view) & (measured.inputs == inputs)]
            rows.loc[alike.index, "title"] += f", for {', '.join(same.title.unique())}"


def split_references(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(rows of methods, rows of the references)."""
    reference = rows.method.isin(REFERENCES)
    return rows[~reference], rows[reference]


class Cell(NamedTuple):
    """What a column of a table, or a line of a figure's axes, shows: a probe of a view."""

    probe: str
    view: str

    def __str__(self) -> str:
        return f"{PROBES[self.probe]}, {self.view}"

    @property
    def caption(self) -> str:
        images = "whole images" if self.view == "whole" else f"{self.view} patches"
        return f"{PROBES[self.probe]}, {images}"

    def of(self, rows: pd.DataFrame) -> pd.DataFrame:
        return rows[(rows.probe == self.probe) & (rows.view == self.view)]


def cells(rows: pd.DataFrame) -> list[Cell]:
    """The cells that rows are of, in the order of the columns; whole images come first."""

    def order(cell: Cell) -> tuple[int, bool, str]:
        return list(PROBES).index(cell.probe), cell.view != "whole", cell.view

    there = set(rows[["probe", "view"]].dropna().itertuples(index=False, name=None))
    return sorted((Cell(*cell) for cell in there), key=order)


def data_title(rows: pd.DataFrame) -> str:
    """Dataset, part of its training images, and hold-out."""
    title = dataset_title(rows.dataset.iloc[0])
    holdout, fractions = rows.holdout.max(), rows.fraction.fillna(-1).unique()
    if len(fractions) == 1 and 0 < fractions[0] < 1:
        title += f", {100 * fractions[0]:g} % of the training images"
    if holdout:
        title += f", held-out {100 * holdout:g} % of the training set"
    return title

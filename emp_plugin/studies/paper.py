"""The figures of arXiv 2304.03977, and which of our rows they may stand beside."""

from pathlib import Path
from typing import Any

import pandas as pd

from emp_plugin.config import Run, read_config, recipe_names, to_dict
from emp_plugin.studies.recipes import global_batch
from emp_plugin.studies.rows import Cell
from emp_plugin.studies.titles import METHODS

HERE = Path(__file__).parent
SETTINGS = (
    "backbone",
    "method_kwargs",
    "momentum",
    "augmentations",
    "optimizer",
    "scheduler",
    "accumulate_grad_batches",
)


def paper_figures(dataset: str, name: str) -> pd.DataFrame:
    """The rows of paper.csv of a method, as it is called there."""
    paper = pd.read_csv(HERE / "paper.csv")
    return paper[(paper.dataset == dataset) & (paper.method == name)]


def paper_minutes(datasets: set[str]) -> pd.DataFrame:
    """The rows of paper_minutes.csv of these datasets."""
    paper = pd.read_csv(HERE / "paper_minutes.csv")
    return paper[paper.dataset.isin(datasets)]


def is_fitted(rows: pd.DataFrame) -> pd.Series:
    """Whether the schedule spans the row's epochs: also at the end of a run of snapshots."""
    ends = rows.epoch == rows.groupby("run").epoch.transform("max")
    return (rows.schedule == "fitted") | (rows.schedule == "snapshot") & ends


def paper_figure(row: pd.Series) -> str:
    """The paper's top-1 accuracy of the same method, linear probe and epochs, or "".

    The schedule is the same, or one that is not said; the figure then has a mark.

    Args:
        row: of a study, with :func:`is_fitted` as a column.
    """
    same = paper_figures(row.dataset, row.paper)
    same = same[(same.epochs - row.epoch).abs() < 0.01]
    marks = {"fitted" if row.is_fitted else row.schedule: "", "not stated": "\\*"}
    if row.is_fitted:
        marks["fitted to 1 or 2"] = "\\*\\*"
    for schedule, mark in marks.items():
        found = same[same.schedule == schedule]
        if len(found):
            return f"{found.top1.iloc[0]:.1f}{mark}"
    return ""


def papers_cell(row: pd.Series) -> tuple[str, Cell]:
    """The features, and the probe of which view, that the paper has of a row's method.

    Of the others than EMP-SSL it says no more than "linear probe".
    """
    if row.paper.startswith("EMP"):
        return "embedding", Cell("published", "bag", 128, True)
    return "backbone", Cell("linear", "whole")


def in_papers_cell(row: pd.Series) -> bool:
    """Whether the paper's figure of a row's method may stand beside it."""
    features, cell = papers_cell(row)
    is_same = row.features == features and bool(cell.holds(row))
    return row.paper != "" and row.labels == 1 and is_same


def paper_name(recipe: Run, folder: Path) -> str:
    """The name in paper.csv of what a recipe trains, or "".

    It is empty where the paper has no such run: on a part of the data, or with settings (the linear
    probe's included) other than those shipped for the method, the dataset, the number of patches
    and the length.

    Args:
        recipe: of the run.
        folder: of the shipped recipes, such as ``scripts/pretrain/cifar``.
    """
    data, shipped = recipe.data, f"{folder.name}/{recipe.method}"
    name = METHODS.get(recipe.method, "")
    same = [f"data.dataset={data.dataset}", f"max_epochs={recipe.max_epochs}"]
    if recipe.method == "emp":
        name = f"EMP-SSL {data.num_patches} patches"
        same.append(f"data.num_patches={data.num_patches}")
    whole = data.fraction in (-1, 1) and not data.holdout
    if not whole or paper_figures(data.dataset, name).empty:
        return ""
    if shipped not in recipe_names(folder.parent):
        return ""
    published = read_config(str(folder.parent), shipped, same)
    return name if _settings(recipe) == _settings(published) else ""


def _settings(cfg: Run) -> dict[str, Any]:
    """What has to be the paper's.

    How many devices share a batch, and in how many chunks patches are projected, is the machine's
    concern.
    """
    given = to_dict(cfg)
    settings = {key: given[key] for key in SETTINGS if key in given}
    settings["optimizer"]["batch_size"] = global_batch(cfg)
    settings["method_kwargs"].pop("patch_chunk", None)
    return settings | {"linear probe": given["evaluation"]["linear"]}

"""How long the runs of a study are: what makes a budget of epochs, minutes or FLOPs equal."""

import json
import math

from emp_plugin.config import Run
from emp_plugin.studies.launch import SPEED_CHECKS, Runs
from emp_plugin.studies.plan import Trial, TrialFailed
from emp_plugin.studies.recipes import Recipes, global_batch
from emp_plugin.studies.settings import StudySettings
from emp_plugin.training.flops import training_flops
from emp_plugin.training.folder import SUMMARY

SPEED_CHECK_STEPS = 4  # of the first one
SPEED_CHECK_SHARE = 0.1  # of the minutes, which the last one takes


class Lengths:
    """The lengths of the runs of a study."""

    def __init__(self, cfg: StudySettings, recipes: Recipes, runs: Runs):
        self.cfg, self.recipes, self.runs = cfg, recipes, runs

    def overrides(self, trial: Trial) -> tuple[str, ...]:
        """The overrides that make a run as long as its budget says.

        Raises:
            TrialFailed: for a batch that is larger than the data, or a failed speed check.
        """
        if trial.budget == "epochs" and trial.length == int(trial.length):
            return (f"max_epochs={int(trial.length)}",)
        per_epoch = self.recipes.steps_per_epoch(trial)
        epochs, limit = split_steps(self._steps_of_budget(trial, per_epoch), per_epoch)
        limits = [f"limit_train_batches={limit}"] if limit < per_epoch else []
        return (f"max_epochs={epochs}", *limits)

    def steps(self, trial: Trial, recipe: Run) -> int:
        """Of a run of this recipe, which has the overrides of its length."""
        limit = recipe.limit_train_batches
        per_epoch = self.recipes.steps_per_epoch(trial) if limit is None else int(limit)
        return recipe.max_epochs * per_epoch

    def epochs(self, trial: Trial, recipe: Run) -> float:
        """Passes through the training set in a run of this recipe."""
        if trial.budget == "epochs":
            return trial.length
        return self.steps(trial, recipe) / self.recipes.steps_per_epoch(trial)

    def _steps_of_budget(self, trial: Trial, per_epoch: int) -> float:
        if trial.budget == "epochs":
            return trial.length * per_epoch
        if trial.budget == "flops":
            emp, recipe = self._emp(), self.recipes.of(trial)
            return steps_for_flops(trial.length, emp, recipe, self.recipes.images(emp))
        rate = self.steps_per_second(trial)
        steps = rate * 60 * trial.length
        print(
            f"  {rate:.3g} steps a second on this machine: "
            f"{steps:.0f} steps in {trial.length:g} minutes",
            flush=True,
        )
        return steps

    def _emp(self) -> Run:
        """The recipe whose FLOPs are the budget: the study's first of EMP, or ``emp``."""
        for method in self.cfg.methods:
            recipe = self.recipes.read(method)
            if recipe.method == "emp":
                return recipe
        return self.recipes.read("emp")

    def steps_per_second(self, trial: Trial) -> float:
        """Of training, measured before the first run and kept, so that all seeds train as long.

        Speed checks grow until one takes a tenth of the minutes, its start included. On a GPU the
        start is most of a short one, and it is not the same for all methods.

        Raises:
            TrialFailed: if a speed check fails.
        """
        steps, wanted = 0, SPEED_CHECK_STEPS
        while wanted > 1.2 * steps:
            steps = wanted
            rate = self.speed_check(trial, steps)
            wanted = round(rate * 60 * trial.length * SPEED_CHECK_SHARE)
        return rate

    def speed_check(self, trial: Trial, steps: int) -> float:
        """Steps a second of a training of so many steps, which is kept and not repeated.

        Raises:
            TrialFailed: if it fails.
        """
        epochs, limit = split_steps(steps, self.recipes.steps_per_epoch(trial))
        overrides = (
            *trial.override,
            f"max_epochs={epochs}",
            f"limit_train_batches={limit}",
            f"seed={self.cfg.seeds[0]}",
            "limit_val_batches=0",
        )
        recipe = self.recipes.read(trial.method, overrides)
        finished = self.runs.finished(recipe, place=SPEED_CHECKS)
        if finished:
            folder = finished[0]
        else:
            overrides += ("evaluation.enabled=False", "checkpoint.enabled=False")
            folder = self.runs.train(trial.method, recipe, overrides, place=SPEED_CHECKS)
        summary = json.loads((folder / SUMMARY).read_text())
        return summary["steps"] / max(summary["train_seconds"], 0.1)  # rounded to tenths


def steps_for_flops(epochs: float, emp: Run, recipe: Run, images: int) -> float:
    """Steps in which a recipe trains with as many FLOPs as EMP.

    Args:
        epochs: of EMP.
        emp: its recipe.
        recipe: the other one.
        images: in one of the epochs.

    Raises:
        TrialFailed: if those of one of them cannot be counted.
    """
    seen = images // global_batch(emp) * global_batch(emp)
    flops, of_recipe = training_flops(emp), training_flops(recipe)
    if flops is None or of_recipe is None:
        raise TrialFailed("its FLOPs, or EMP's, could not be counted: see above")
    return epochs * seen * flops / (global_batch(recipe) * of_recipe)


def split_steps(steps: float, per_epoch: int) -> tuple[int, int]:
    """(epochs, steps in each of them) whose product is near ``steps``.

    An epoch has at most ``per_epoch`` steps.

    >>> split_steps(195, 195), split_steps(390.4, 195), split_steps(40, 195), split_steps(250, 195)
    ((1, 195), (2, 195), (1, 40), (2, 125))
    """
    epochs = max(1, math.ceil(round(steps) / per_epoch))
    return epochs, min(per_epoch, max(1, round(steps / epochs)))

"""Which runs a comparison consists of, and how long each of them trains."""

import math
from typing import NamedTuple

from omegaconf import DictConfig

from emp_plugin.config import augmentations
from emp_plugin.solo_learn import processes


class Job(NamedTuple):
    """One training and the points of it that are evaluated."""

    method: str  # name of the recipe
    seed: int
    schedule: str  # fitted or snapshot
    budget: str
    length: float  # epochs, minutes, or (passes) epochs of EMP
    points: tuple[float, ...]  # in the unit of length; the last one is the end
    override: tuple[str, ...] = ()  # the ablated setting, as it is overridden

    def __str__(self) -> str:
        return f"{', '.join((self.method, *self.override))}, seed {self.seed}, {describe_length(self.budget, self.length)}, schedule {self.schedule}"


def describe_length(budget: str, length: float) -> str:
    """A length in words: "1 epoch", "5 minutes of training", "1 epoch of EMP-SSL in backbone passes"."""
    unit = "minute" if budget == "minutes" else "epoch"
    what = {"epochs": "", "minutes": " of training", "passes": " of EMP-SSL in backbone passes"}[
        budget
    ]
    return f"{length:g} {unit}{'' if length == 1 else 's'}{what}"


def plan(cfg: DictConfig) -> list[Job]:
    """The jobs of a comparison; short ones first, so that one cut off has the methods side by side. A long schedule comes before the fitted ones:
    its last point is one of them."""
    variants = [
        (method, override)
        for method in cfg.methods
        for override in ([(f"{cfg.ablate}={value}",) for value in cfg["values"]] or [()])
    ]
    jobs = []
    for budget in cfg.budget:
        lengths = sorted(cfg.minutes if budget == "minutes" else cfg.epochs)
        if "snapshot" in cfg.schedule:
            jobs += [
                Job(method, seed, "snapshot", budget, lengths[-1], tuple(lengths), override)
                for seed in cfg.seeds
                for method, override in variants
            ]
        if "fitted" in cfg.schedule:
            jobs += [
                Job(method, seed, "fitted", budget, length, (length,), override)
                for length in lengths
                for seed in cfg.seeds
                for method, override in variants
            ]
    return jobs


def global_batch(recipe: DictConfig) -> int:
    """Images in one step, of all devices together."""
    return recipe.optimizer.batch_size * processes(recipe)


def views_per_image(recipe: DictConfig) -> int:
    """Views (patches) of an image in one step, which the backbone sees in as many passes; momentum networks' passes are not counted."""
    return sum(view.num_patches for view in augmentations(recipe))


def steps_for_passes(epochs: float, emp: DictConfig, recipe: DictConfig, images: int) -> float:
    """Steps in which ``recipe`` makes as many backbone passes (images x views) as EMP in ``epochs`` epochs of ``images`` images."""
    passes = epochs * (images // global_batch(emp)) * global_batch(emp) * views_per_image(emp)
    return passes / (global_batch(recipe) * views_per_image(recipe))


def split_steps(steps: float, per_epoch: int) -> tuple[int, int]:
    """(epochs, steps in each of them) whose product is near ``steps``; an epoch has at most ``per_epoch`` steps.

    >>> split_steps(195, 195), split_steps(390.4, 195), split_steps(40, 195), split_steps(250, 195)
    ((1, 195), (2, 195), (1, 40), (2, 125))
    """
    epochs = max(1, math.ceil(round(steps) / per_epoch))
    return epochs, min(per_epoch, max(1, round(steps / epochs)))


def resolved(recipe: DictConfig) -> str:
    """What counts in epochs, as it stands in this run: for the user to see."""
    limit = recipe.get("limit_train_batches")
    settings = {
        "max_epochs": recipe.max_epochs,
        **({"limit_train_batches": limit} if limit is not None else {}),
        "scheduler.warmup_epochs": recipe.scheduler.warmup_epochs,
    }
    settings |= {
        f"method_kwargs.{key}": value
        for key, value in recipe.method_kwargs.items()
        if "epoch" in key
    }
    return ", ".join(f"{key}={value:g}" for key, value in settings.items())

"""The recipes of a study, and how much of the data one step and one epoch of them take."""

from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from emp_plugin.config import Run, augmentations, read_config, recipe_names
from emp_plugin.data import load_dataset
from emp_plugin.data.datasets import IMAGE_SIZE
from emp_plugin.evaluation.views import dense_scale
from emp_plugin.solo_learn import processes
from emp_plugin.studies.plan import Trial, TrialFailed


class Recipes:
    """The recipes of a study with its overrides.

    Args:
        root: folder that holds the groups of recipes, as ``scripts/pretrain`` does.
        group: the folder in it that the study takes its recipes from, such as ``cifar``.
        overrides: of all recipes; ``<method>.key=value`` is of that method alone.
    """

    def __init__(self, root: Path, group: str, overrides: list[str]):
        self.root, self.group, self.overrides = root, group, overrides
        self._read: dict[tuple[str, tuple[str, ...]], Run] = {}
        self._images: dict[str, int] = {}

    def read(self, method: str, overrides: tuple[str, ...] = ()) -> Run:
        """A recipe with the study's overrides and these."""
        key = method, overrides
        if key not in self._read:
            items = [*self.overrides_of(method), *overrides]
            self._read[key] = read_config(str(self.root), f"{self.group}/{method}", items)
        return self._read[key]

    def of(self, trial: Trial) -> Run:
        """A trial's recipe, of the length that it is shipped with."""
        return self.read(trial.method, trial.override)

    def overrides_of(self, method: str) -> list[str]:
        """The study's overrides of this method; its own come last and so win."""
        general = [item for item in self.overrides if self.method_of(item) is None]
        own = [item for item in self.overrides if self.method_of(item) == method]
        return general + [item.removeprefix(f"{method}.") for item in own]

    def method_of(self, override: str) -> str | None:
        """The recipe whose name an override begins with, and which alone it is for."""
        first, dot, _ = override.partition("=")[0].partition(".")
        return first if dot and f"{self.group}/{first}" in recipe_names(self.root) else None

    def images(self, recipe: Run) -> int:
        """Training images; they are counted once for all recipes that take the same ones."""
        of = attrgetter(
            *("dataset", "train_path", "holdout", "fraction", "val_path", "image_size"),
            *("window", "no_labels"),
        )
        data, known = of(recipe.data), repr(of(recipe.data))
        if known not in self._images:
            self._images[known] = len(load_dataset(*data)[0])
        return self._images[known]

    def steps_per_epoch(self, trial: Trial) -> int:
        """Steps in one epoch of a trial's recipe.

        Raises:
            TrialFailed: if there are fewer images than a batch has.
        """
        recipe = self.of(trial)
        images, batch = self.images(recipe), global_batch(recipe)
        if images < batch:
            raise TrialFailed(
                f"a batch has {batch} images, but there are only {images} to train on; "
                f"set {trial.method}.optimizer.batch_size"
            )
        return images // batch


def global_batch(recipe: Run) -> int:
    """Images in one step, of all devices together."""
    return recipe.optimizer.batch_size * processes(recipe)


def views_per_image(recipe: Run) -> int:
    """Views (patches) of an image in one step; momentum networks' passes are not counted."""
    return sum(view.num_patches for view in augmentations(recipe))


def resolved(recipe: Run) -> str:
    """What counts in epochs, as it stands in this run: for the user to see."""
    settings: dict[str, Any] = {"max_epochs": recipe.max_epochs}
    if recipe.limit_train_batches is not None:
        settings["limit_train_batches"] = recipe.limit_train_batches
    settings["scheduler.warmup_epochs"] = recipe.scheduler.warmup_epochs
    for key, value in recipe.method_kwargs.items():
        if "epoch" in key:
            settings[f"method_kwargs.{key}"] = value
    return ", ".join(f"{key}={value:g}" for key, value in settings.items())


def shared_inputs(recipes: Recipes, trials: list[Trial]) -> dict[Trial, str]:
    """By trial, the first one whose raw pixels and untrained network are the same."""
    inputs = [reference_inputs(recipes.of(trial)) for trial in trials]
    firsts = [trials[inputs.index(own)] for own in inputs]
    return {
        trial: " ".join((first.method, *first.override)) for trial, first in zip(trials, firsts)
    }


def reference_inputs(recipe: Run) -> tuple[Any, ...]:
    """What raw pixels and an untrained network are evaluated with, besides the seed."""
    made, settings = augmentations(recipe), recipe.evaluation
    first = made[0].with_patches(1)
    images: list[Any] = [first.mean, first.std]
    if "dense" in settings.views:
        side = recipe.data.image_size or IMAGE_SIZE[recipe.data.dataset]
        scale = settings.dense_scale or dense_scale(made, side)
        images += [scale, first.plain()]
    if "bag" in settings.views:
        images.append(first if settings.bag_augmented else first.plain())
    data = attrgetter("dataset", "holdout", "fraction")(recipe.data)
    evaluation = replace(settings, references=True)
    return images, evaluation, recipe.precision, recipe.backbone, *data

"""Makes solo-learn 1.0.6, its repository's head, work on torchmetrics 1 and with the rest of this project.

Its files are not edited: :func:`apply_repairs` replaces single attributes of its classes. Every patch is one function, here or (if the
wheel needs it too) in :mod:`repairs`, and says why it exists; the tests show for each what happens without it.
"""

import importlib
import warnings
from types import SimpleNamespace

from torch.optim import Optimizer

from emp_plugin.solo_learn.repairs import REPAIRS, exchange_checkpoints, over_processes


def import_solo() -> SimpleNamespace:
    """Import the head and return the modules that are patched."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of APIs and names that solo-learn uses; its user cannot change them
        importlib.import_module("solo")
        return SimpleNamespace(
            **{
                name: importlib.import_module(f"solo.{path}")
                for name, path in (
                    ("base", "methods.base"),
                    ("linear", "methods.linear"),
                    ("swav", "methods.swav"),
                    ("dino", "methods.dino"),
                    ("knn", "utils.knn"),
                    ("lars", "utils.lars"),
                    ("metrics", "utils.metrics"),
                )
            }
        )


def apply_repairs(solo: SimpleNamespace) -> None:
    """Patch the modules of :func:`import_solo`; a second call does nothing."""
    if getattr(solo.base, "_patched_by_emp_plugin", False):
        return
    for patch in (keep_static_rates, *REPAIRS, count_images_once, empty_knn_after_validation):
        patch(solo)
    exchange_checkpoints(solo, "1.0.6")
    solo.base._patched_by_emp_plugin = True


def keep_static_rates(solo: SimpleNamespace) -> None:
    """Parameter groups with ``static_lr`` (SimSiam's predictor) lose that mark before the optimiser is made: :mod:`schedules` needs it."""
    original = solo.base.BaseMethod.configure_optimizers

    def configure_optimizers(self):
        made = original(self)
        if isinstance(made, Optimizer):  # without the head's own schedules
            static = {group["name"] for group in self.learnable_params if group.get("static_lr")}
            for group in made.param_groups:
                # exclude_bias_n_norm_wd splits groups in two and names the second so
                if group.get("name", "").removesuffix("_no_decay") in static:
                    group["static_lr"] = True
        return made

    solo.base.BaseMethod.configure_optimizers = configure_optimizers


def count_images_once(solo: SimpleNamespace) -> None:
    """The means of a validation with several processes are over its images; the head takes the mean of the processes' means, however many images each had."""

    def weighed(original):
        def on_validation_epoch_end(self):
            images = sum(output["batch_size"] for output in self.validation_step_outputs)
            log_dict = self.log_dict
            self.log_dict = lambda log, **_: log_dict(over_processes(self.trainer, log, images))
            try:
                original(self)
            finally:
                del self.log_dict

        return on_validation_epoch_end

    for cls in (solo.base.BaseMethod, solo.base.BaseMomentumMethod, solo.linear.LinearModel):
        cls.on_validation_epoch_end = weighed(cls.on_validation_epoch_end)


def empty_knn_after_validation(solo: SimpleNamespace) -> None:
    """The head leaves it to :mod:`knn`'s ``compute``, which with several processes only sees copies of the memory banks."""

    def emptied(original):
        def on_validation_epoch_end(self):
            original(self)
            if self.knn_eval and not self.trainer.sanity_checking:
                self.knn.reset()

        return on_validation_epoch_end

    for cls in (solo.base.BaseMethod, solo.base.BaseMomentumMethod):
        cls.on_validation_epoch_end = emptied(cls.on_validation_epoch_end)

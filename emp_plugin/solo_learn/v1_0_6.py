"""Repairs that solo-learn 1.0.6 needs besides those of :mod:`repairs`."""

import warnings
from types import SimpleNamespace

from torch.optim import Optimizer

from emp_plugin.solo_learn import repairs


def import_solo() -> SimpleNamespace:
    """Import solo-learn; the modules of :func:`repairs.import_modules`."""
    with warnings.catch_warnings():
        # about APIs and names that solo-learn uses; its user cannot change them
        warnings.simplefilter("ignore")
        return repairs.import_modules()


def keep_static_rates(solo: SimpleNamespace) -> None:
    """Parameter groups with ``static_lr`` (SimSiam's predictor) keep that mark in the optimiser.

    solo-learn takes it off before the optimiser is made, but :mod:`schedules` needs it.
    """
    original = solo.base.BaseMethod.configure_optimizers

    def configure_optimizers(self):
        made = original(self)
        if isinstance(made, Optimizer):  # without solo-learn's own schedules
            static = {group["name"] for group in self.learnable_params if group.get("static_lr")}
            for group in made.param_groups:
                # exclude_bias_n_norm_wd splits groups in two and names the second so
                if group.get("name", "").removesuffix("_no_decay") in static:
                    group["static_lr"] = True
        return made

    solo.base.BaseMethod.configure_optimizers = configure_optimizers


def count_images_once(solo: SimpleNamespace) -> None:
    """A validation's means are over the images of all processes.

    1.0.6 takes the mean of the processes' means, however many images each had.
    """

    def weighed(original):
        def on_validation_epoch_end(self):
            images = sum(output["batch_size"] for output in self.validation_step_outputs)
            log_dict = self.log_dict
            self.log_dict = lambda log, **_: log_dict(
                repairs.over_processes(self.trainer, log, images)
            )
            try:
                original(self)
            finally:
                del self.log_dict

        return on_validation_epoch_end

    for cls in (solo.base.BaseMethod, solo.base.BaseMomentumMethod, solo.linear.LinearModel):
        cls.on_validation_epoch_end = weighed(cls.on_validation_epoch_end)


def empty_knn_after_validation(solo: SimpleNamespace) -> None:
    """1.0.6 leaves it to ``compute``, which with several processes sees copies of the banks."""

    def emptied(original):
        def on_validation_epoch_end(self):
            original(self)
            if self.knn_eval and not self.trainer.sanity_checking:
                self.knn.reset()

        return on_validation_epoch_end

    for cls in (solo.base.BaseMethod, solo.base.BaseMomentumMethod):
        cls.on_validation_epoch_end = emptied(cls.on_validation_epoch_end)


REPAIRS = (
    *repairs.REPAIRS,
    keep_static_rates,
    count_images_once,
    empty_knn_after_validation,
)

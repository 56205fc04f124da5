"""An exponential average of a run's weights, which is what the run ends with."""

from typing import Any

import torch
from torch import Tensor

from emp_plugin.solo_learn import pl

TRAINED = "emp_plugin_trained_weights"  # in a checkpoint, beside the average


class WeightAverage(pl.Callback):
    """Averages weights and BatchNorm's statistics after every step, and evaluates the average.

    A checkpoint holds the average as its weights, so that whoever reads it evaluates that, and the
    trained ones beside it, from which a run is continued. When training ends the method has the
    average. Validation during the training sees the trained weights. Lightning's own
    ``WeightAveraging`` cannot read a checkpoint in which the backbone has another name.

    Args:
        decay: share of the average that a step keeps. In the beginning it is (1 + t) / (10 + t)
            after t steps, if that is less, so that the initial weights are soon forgotten.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.average: dict[str, Tensor] | None = None

    def on_load_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.average = _copy(module)  # Lightning has loaded it
        module.load_state_dict(checkpoint[TRAINED])

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        average = self.average or _copy(module)
        self.average = {name: value.to(module.device) for name, value in average.items()}
        self.step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.global_step == self.step:
            return  # gradients are being accumulated
        self.step = trainer.global_step
        keep = min(self.decay, (1 + self.step) / (10 + self.step))
        now = module.state_dict()
        floats = [name for name, value in self.average.items() if value.is_floating_point()]
        torch._foreach_lerp_(
            [self.average[name] for name in floats], [now[name] for name in floats], 1 - keep
        )
        for name in self.average.keys() - floats:  # BatchNorm's counters
            self.average[name].copy_(now[name])

    def on_save_checkpoint(
        self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[TRAINED] = checkpoint["state_dict"]
        checkpoint["state_dict"] = checkpoint["state_dict"] | self.average

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        module.load_state_dict(self.average, strict=False)


def _copy(module: pl.LightningModule) -> dict[str, Tensor]:
    state = module.state_dict().items()
    return {name: value.clone() for name, value in state if isinstance(value, Tensor)}

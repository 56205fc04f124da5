"""A step of LARS beside one of plain SGD with momentum and weight decay.

Settings and parameters are those of the recipe `cifar/emp_native`.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from common import arguments, report, side_by_side
from step import SCRIPTS

from emp_plugin.config import augmentations, read_config
from emp_plugin.data import load_dataset
from emp_plugin.solo_learn import pl
from emp_plugin.training.data import PretrainData
from emp_plugin.training.probing import fresh_method
from emp_plugin.training.run import build_trainer
from emp_plugin.transforms import BatchMultiPatch


class TimeOptimizer(pl.Callback):
    """Times the optimiser that Lightning has made for the method."""

    def __init__(self, trials: int):
        self.trials = trials

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
        copies = [parameter.detach().clone().requires_grad_() for parameter in module.parameters()]
        for copy in copies:
            copy.grad = torch.randn_like(copy)
        sgd = torch.optim.SGD(copies, lr=0.3, momentum=0.9, nesterov=True, weight_decay=1e-4)
        self.case = side_by_side(trainer.optimizers[0].step, sgd.step, self.trials)
        self.case["parameters"] = sum(copy.numel() for copy in copies)


def main() -> None:
    args = arguments(__doc__.splitlines()[0], trials=20)
    overrides = [
        "data.dataset=digits",
        "data.num_patches=2",
        "optimizer.batch_size=4",
        "limit_train_batches=1",
        "enable_progress_bar=False",
        "enable_model_summary=False",
    ]
    cfg = read_config(SCRIPTS, "cifar/emp_native", overrides)
    views = [BatchMultiPatch.from_augmentation(augmentation) for augmentation in augmentations(cfg)]
    images, _ = load_dataset("digits", None)
    data = PretrainData(images, None, views, cfg.optimizer.batch_size, cfg.seed, stacked=True)
    watch = TimeOptimizer(args.trials)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(cfg, Path(folder))
        trainer.callbacks.append(watch)
        trainer.fit(fresh_method(cfg), datamodule=data)
    name = f"LARS, {watch.case['parameters'] / 1e6:.1f} M parameters; SGD"
    report("LARS step", {name: watch.case}, args)


if __name__ == "__main__":
    main()

"""Run by test_versions_agree.py under each version.

It trains methods, and evaluates checkpoints of the other version:

python one_version.py train FOLDER [FOLDER OF INITIAL WEIGHTS]
python one_version.py evaluate FOLDER
"""

import sys
from pathlib import Path

import torch
from conftest import RandomImages, make_config, make_trainer

from emp_plugin.config import to_dict
from emp_plugin.solo_learn import backbone_of, pl
from emp_plugin.training.callbacks import CONFIG_KEY
from emp_plugin.training.probing import fresh_method, load_method

BATCH = 8
STEPS = {
    "emp": 20,
    "simclr": 20,
    "simclr-warmup": 20,
    "byol": 20,
    "byol-sgd": 20,
    "vicreg": 2,
    "ressl": 2,
}
# the others in float64; why: test_versions_agree.py
FLOAT32 = ("emp", "simclr-warmup", "byol-sgd")
VARIANTS = {
    # the beginning of a long run, where the learning rate rises to a hundredth of its peak
    "simclr-warmup": {"max_epochs": 100, "scheduler__warmup_epochs": 99},
    # without LARS
    "byol-sgd": {
        "optimizer__name": "sgd",
        "optimizer__kwargs": {"momentum": 0.9},
        "optimizer__lr": 0.05,
    },
}


class Losses(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, outputs, *_):
        self.seen.append(outputs["loss"].item())


class Images(RandomImages):
    def __init__(self, length: int, views: int, dtype: torch.dtype):
        super().__init__(length, True, views)
        self.dtype = dtype

    def __getitem__(self, index: int):
        index, images, target = super().__getitem__(index)
        return index, [image.to(self.dtype) for image in images], target


def features(method) -> torch.Tensor:
    """Of fixed images, by the network in evaluation mode, in float32."""
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    method = method.float()
    with torch.no_grad():
        return backbone_of(method.eval())(images)


def train(name: str, folder: Path, initial: Path | None) -> None:
    """Leaves the initial and the trained checkpoint, the losses, and the trained one's features."""
    views = 4 if name == "emp" else 2
    cfg = make_config(
        name.partition("-")[0],
        seed=0,
        optimizer__batch_size=BATCH,
        optimizer__kwargs__nesterov=name == "emp",
        data__num_large_crops=views,
        **VARIANTS.get(name, {}),
    )
    dtype = torch.float32 if name in FLOAT32 else torch.float64
    method = fresh_method(cfg).to(dtype)
    if initial:
        start = torch.load(initial / f"{name}.initial.pt", weights_only=True)
        method.load_state_dict(start["state_dict"])
    losses = Losses()
    data = Images(STEPS[name] * BATCH, views=views, dtype=dtype)
    trainer = make_trainer(
        callbacks=[losses],
        limit_val_batches=0,
        precision="32-true" if name in FLOAT32 else "64-true",
    )
    trainer.strategy.connect(method)
    trainer.save_checkpoint(folder / f"{name}.initial.pt", weights_only=True)
    trainer.fit(method, torch.utils.data.DataLoader(data, BATCH, drop_last=True))
    trainer.save_checkpoint(folder / f"{name}.pt", weights_only=False)
    checkpoint = torch.load(folder / f"{name}.pt", weights_only=True)
    torch.save(checkpoint | {CONFIG_KEY: to_dict(cfg)}, folder / f"{name}.pt")
    torch.save((losses.seen, features(method)), folder / f"{name}.results.pt")


def evaluate(name: str, folder: Path) -> None:
    torch.save(features(load_method(folder / f"{name}.pt")[0]), folder / f"{name}.elsewhere.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    job, *folders = sys.argv[1:]
    folders = [Path(folder) for folder in folders]
    for name in STEPS:
        if job == "train":
            train(name, folders[0], *folders[1:] or [None])
        else:
            evaluate(name, folders[0])

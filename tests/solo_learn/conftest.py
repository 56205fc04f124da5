import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from emp_plugin.config import from_dict, to_dict
from emp_plugin.solo_learn import API, METHODS, installed, pl

OWN = {
    "emp": {"embedding_dim": 32, "proj_hidden_dim": 32, "proj_output_dim": 16},
    "simclr": {"temperature": 0.2},
    "byol": {"pred_hidden_dim": 8},
    "vicreg": {},
    "swav": {"num_prototypes": 6, "queue_size": 8, "epoch_queue_starts": 0, "temperature": 0.1},
    "ressl": {"queue_size": 8, "temperature_q": 0.1, "temperature_k": 0.04},
    "barlow_twins": {},
    "deepclusterv2": {"num_prototypes": [3, 3]},
    "dino": {"num_prototypes": 6, "clip_grad": 0.1},
    "mocov2plus": {"queue_size": 8, "temperature": 0.2},
    "nnbyol": {"pred_hidden_dim": 8, "queue_size": 8},
    "nnclr": {"pred_hidden_dim": 8, "queue_size": 8, "temperature": 0.2},
    "nnsiam": {"pred_hidden_dim": 8, "queue_size": 8},
    "simsiam": {"pred_hidden_dim": 8},
    "wmse": {"whitening_size": 4, "whitening_eps": 0.1, "proj_output_dim": 2},
    # of 1.0.6 alone
    "all4one": {"proj_output_dim": 8, "pred_hidden_dim": 8, "queue_size": 8, "temperature": 0.2},
    "mocov3": {"pred_hidden_dim": 8, "temperature": 0.2},
    "supcon": {"temperature": 0.2},
    "vibcreg": {},
}


def make_config(method: str, **overrides):
    """A small run in the schema of 1.0.6; overrides are dotted keys with __ for the dots."""
    method_kwargs = {}
    if method in OWN:
        method_kwargs = {"proj_hidden_dim": 8, "proj_output_dim": 4, **OWN[method]}
    cfg = OmegaConf.create(
        {
            "name": "test",
            "method": method,
            "max_epochs": 1,
            "devices": [0],
            "accumulate_grad_batches": 1,
            "backbone": {"name": "resnet18", "kwargs": {}, "stem_padding": None},
            "method_kwargs": method_kwargs,
            "augmentations": [],
            "momentum": {"base_tau": 0.9, "final_tau": 1.0, "classifier": False},
            "data": {
                "dataset": "cifar10",
                "num_classes": 3,
                "num_large_crops": 2,
                "num_small_crops": 0,
            },
            "optimizer": {
                "name": "lars",
                "batch_size": 4,
                "lr": 0.4,
                "classifier_lr": 0.1,
                "weight_decay": 1e-4,
                "exclude_bias_n_norm_wd": False,
                "kwargs": {"clip_lr": True, "eta": 0.02, "exclude_bias_n_norm": True},
            },
            "scheduler": {
                "name": "warmup_cosine",
                "warmup_epochs": 0.5,
                "min_lr": 0.0,
                "warmup_start_lr": 3e-5,
                "lr_decay_steps": None,
                "interval": "step",
            },
            "knn_eval": {"enabled": False, "k": 20, "distance_func": "euclidean"},
        }
    )
    for key, value in overrides.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, merge=False, force_add=True)
    return from_dict(OmegaConf.to_container(cfg))


def make_linear(solo_linear=None, classes: int = 3, **overrides):
    """solo-learn's linear probe on a tiny backbone, by default of the installed module.

    Overrides as in make_config.
    """
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(192, 6))
    backbone.num_features = 6
    cls = METHODS["linear"] if solo_linear is None else solo_linear.LinearModel
    if API == "1.0.6":
        optimizer = {
            "optimizer__name": "sgd",
            "optimizer__kwargs": {"momentum": 0.9},
            "optimizer__lr": 0.1,
            "optimizer__weight_decay": 0.0,
        }
        data = {"data__num_classes": classes}
        cfg = make_config("simclr", scheduler__warmup_epochs=0, **data, **optimizer, **overrides)
        return cls(backbone, OmegaConf.create(to_dict(cfg)))
    return cls(
        backbone,
        num_classes=classes,
        max_epochs=1,
        batch_size=4,
        optimizer="sgd",
        lars=False,
        lr=0.1,
        weight_decay=0.0,
        exclude_bias_n_norm=False,
        extra_optimizer_args={"momentum": 0.9},
        scheduler="cosine",
    )


class RandomImages(torch.utils.data.Dataset):
    """8x8 images in solo-learn's batch formats."""

    def __init__(self, length: int, training: bool, views: int = 2):
        self.length, self.training, self.views = length, training, views

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int):
        generator = torch.Generator().manual_seed(index)
        images = [torch.randn(3, 8, 8, generator=generator) for _ in range(self.views)]
        return (index, images, index % 3) if self.training else (images[0], index % 3)


def loader(length: int, training: bool, batch_size: int = 4):
    images = RandomImages(length, training)
    return torch.utils.data.DataLoader(images, batch_size, drop_last=training)


def make_trainer(**kwargs):
    small = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**(small | kwargs))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Threads wait for each other on a busy machine of few cores, which takes 20 times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tools():
    """The functions above: in pytest's importlib mode, tests cannot import this file."""
    return SimpleNamespace(
        make_config=make_config, make_linear=make_linear, make_trainer=make_trainer, loader=loader
    )


@pytest.fixture(scope="session")
def untouched():
    """solo-learn's modules once more, not repaired: what fails in them is real.

    ``sys.modules`` keeps the others.
    """
    in_use = {name: sys.modules.pop(name) for name in _solo_names()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # timm notes that the backbones are registered again
            return installed.import_solo()
    finally:
        for name in _solo_names():
            del sys.modules[name]
        sys.modules.update(in_use)


def _solo_names() -> list[str]:
    return [name for name in sys.modules if name.split(".")[0] == "solo"]

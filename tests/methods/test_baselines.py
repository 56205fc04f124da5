"""The shipped recipes of the baselines train what solo-learn trains: its losses on the same features, and networks that move as they should."""

import copy
from collections import defaultdict

import pytest
import torch
from solo.losses.byol import byol_loss_func
from solo.losses.ressl import ressl_loss_func
from solo.losses.simclr import simclr_loss_func
from solo.losses.swav import swav_loss_func
from solo.losses.vicreg import vicreg_loss_func
from solo.utils.sinkhorn_knopp import SinkhornKnopp

from emp_plugin.config import augmentations
from emp_plugin.data import load_dataset
from emp_plugin.solo_learn import API, backbone_of, pl
from emp_plugin.training.data import PretrainData
from emp_plugin.training.probing import fresh_method
from emp_plugin.transforms import BatchMultiPatch

BASELINES = ("simclr", "byol", "vicreg", "swav", "ressl")
SMALL = ("optimizer.batch_size=16", "max_epochs=1", "precision=32")
HEADS = {
    "simclr": ["method_kwargs.proj_hidden_dim=32"],
    "vicreg": ["method_kwargs.proj_hidden_dim=32", "method_kwargs.proj_output_dim=24"],
    "byol": ["method_kwargs.proj_hidden_dim=32", "method_kwargs.pred_hidden_dim=32"],
    "swav": [
        "method_kwargs.proj_hidden_dim=32",
        "method_kwargs.num_prototypes=20",
        "method_kwargs.queue_size=16",
    ],
    "ressl": ["method_kwargs.proj_hidden_dim=32", "method_kwargs.queue_size=64"],
}


@pytest.fixture(scope="module")
def digits():
    """(train, test), as the recipes have them."""
    return load_dataset("digits", None, image_size=16)


class Record(pl.Callback):
    """What the heads gave in each step, the queue before it, and the state before the first one."""

    def __init__(self):
        self.outputs, self.queues, self.logged = [], [], []

    def on_train_start(self, trainer, module):
        self.before = copy.deepcopy(module.state_dict())
        self.tau = module.momentum_updater.cur_tau if hasattr(module, "momentum_updater") else None
        for name in ("projector", "momentum_projector", "predictor", "prototypes"):
            if hasattr(module, name):
                getattr(module, name).register_forward_hook(
                    lambda _, __, z, name=name: self.outputs[-1][name].append(z.detach())
                )

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.outputs.append(defaultdict(list))
        self.queues.append(getattr(module, "queue", torch.empty(0)).clone())

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.logged.append({key: value.item() for key, value in trainer.callback_metrics.items()})


def fit(cfg, train, steps):
    """The method after ``steps`` steps with the run's own data path, and what was recorded."""
    model = fresh_method(cfg)
    views = [BatchMultiPatch.from_augmentation(augmentation) for augmentation in augmentations(cfg)]
    data = PretrainData(
        train,
        None,
        views,
        cfg.optimizer.batch_size,
        cfg.seed,
        cfg.data.num_workers,
        on_device=cfg.data.views == "device",
    )
    record = Record()
    trainer = pl.Trainer(
        max_epochs=cfg.max_epochs,
        limit_train_batches=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[record],
        log_every_n_steps=1,
    )
    trainer.fit(model, datamodule=data)
    return model, record


def expected_loss(name, out, queue, sk_epsilon):
    """solo-learn's loss function on the recorded outputs, with the settings published for CIFAR, but for SwAV's ``sk_epsilon``."""
    if name == "simclr":
        z = out["projector"]
        arguments = (torch.cat(z), torch.arange(len(z[0])).repeat(2)) if API == "1.0.6" else z
        return "train_nce_loss", simclr_loss_func(*arguments, temperature=0.2)
    if name == "byol":
        (p1, p2), (z1, z2) = out["predictor"], out["momentum_projector"]
        return "train_neg_cos_sim", byol_loss_func(p2, z1) + byol_loss_func(p1, z2)
    if name == "vicreg":
        return "train_vicreg_loss", vicreg_loss_func(
            *out["projector"], sim_loss_weight=25.0, var_loss_weight=25.0, cov_loss_weight=1.0
        )
    if name == "swav":
        p, of_queue = out["prototypes"][:2], out["prototypes"][2:] or [torch.empty(0)] * 2
        return "train_swav_loss", swav_loss_func(
            p,
            [
                SinkhornKnopp(3, sk_epsilon, 1)(torch.cat(both))[: len(p[0])]
                for both in zip(p, of_queue)
            ],
            0.1,
        )
    # the head passes both views through both networks, the wheel the first through the one and the second through the other
    q, k = (
        torch.nn.functional.normalize(z, dim=-1)
        for z in (out["projector"][0], out["momentum_projector"][-1])
    )
    return "train_ressl_loss" if API == "1.0.6" else "ressl_loss", ressl_loss_func(
        q, k, queue, 0.1, 0.002
    )  # the temperatures of digits/ressl.yaml


@pytest.fixture(scope="module")
def trained():
    """Two steps of every baseline on 32 digits, trained once for all tests."""
    made = {}

    def get(name, config, train):
        if name not in made:
            cfg = config(f"digits/{name}", *SMALL, *HEADS[name])
            made[name] = fit(cfg, train.subset(range(32)), 2)
        return made[name]

    return get


@pytest.mark.parametrize("name", BASELINES)
def test_losses_of_the_first_steps_are_solo_learns(trained, config, digits, name):
    """In the second one SwAV's assignments and ReSSL's relations are taken over the keys of the first, too."""
    model, record = trained(name, config, digits[0])
    for out, queue, logged in zip(record.outputs, record.queues, record.logged, strict=True):
        key, expected = expected_loss(name, out, queue, getattr(model, "sk_epsilon", None))
        assert logged.get(f"{key}_step", logged.get(key)) == pytest.approx(
            expected.item(), rel=1e-5
        )
    assert not queue.numel() or not torch.equal(queue, record.queues[0])
    assert record.outputs[0].keys() >= {"projector"}
    assert len(record.outputs[0]["projector"]) == (1 if name == "ressl" and API == "1.0.2" else 2)


@pytest.mark.parametrize("name", BASELINES)
def test_what_is_trained_moves_and_nothing_else_does(trained, config, digits, name):
    model, record = trained(name, config, digits[0])
    # a bias before BatchNorm has no gradient
    still = {
        key
        for key, value in model.named_parameters()
        if value.ndim > 1 and torch.equal(value, record.before[key])
    }
    assert still == ({"prototypes.weight_g"} if name == "swav" else set())
    assert {key for key, value in model.named_parameters() if not value.requires_grad} == still | {
        key for key, _ in model.named_parameters() if key.startswith("momentum_")
    }


@pytest.mark.parametrize("name", ["byol", "ressl"])
def test_momentum_networks_follow_by_tau(config, digits, name):
    cfg = config(
        f"digits/{name}",
        *SMALL,
        *HEADS[name],
        "scheduler.warmup_epochs=0",
        "momentum.base_tau=0.99",
    )
    model, record = fit(cfg, digits[0].subset(range(16)), 1)
    assert record.tau == pytest.approx(0.99)
    prefixes = {child: name for name, child in model.named_children()}
    assert [
        prefixes[momentum].removeprefix("momentum_") for _, momentum in model.momentum_pairs
    ] == [prefixes[online] for online, _ in model.momentum_pairs]
    assert [online for online, _ in model.momentum_pairs] == [backbone_of(model), model.projector]
    for online, momentum in model.momentum_pairs:
        prefix = prefixes[momentum]
        for key, value in online.named_parameters():
            expected = 0.99 * record.before[f"{prefix}.{key}"] + 0.01 * value
            torch.testing.assert_close(momentum.get_parameter(key), expected, rtol=1e-5, atol=1e-7)
    assert model.momentum_updater.cur_tau == pytest.approx(1.0)  # the run is over


def test_ressls_queue_takes_the_teachers_keys(trained, config, digits):
    model, record = trained("ressl", config, digits[0])
    keys = torch.cat(
        [
            torch.nn.functional.normalize(step["momentum_projector"][-1], dim=-1)
            for step in record.outputs
        ]
    )
    torch.testing.assert_close(model.queue[:32], keys)
    torch.testing.assert_close(model.queue[32:], record.before["queue"][32:])


def test_swavs_prototypes_train_in_the_shortest_run(trained, config, digits):
    """Published: frozen for 2 of 1000 epochs. In a run of 2 steps that is less than the first."""
    model, record = trained("swav", config, digits[0])
    assert model.freeze_prototypes_epochs == pytest.approx(0.002)
    assert model.epoch_queue_starts == pytest.approx(0.05)
    assert not torch.equal(model.prototypes.weight_v, record.before["prototypes.weight_v"])
    assert [len(step["prototypes"]) for step in record.outputs] == [
        2,
        4,
    ]  # the second step uses the queue, which is full then


@pytest.mark.parametrize("name", BASELINES)
def test_cifars_recipes_say_what_solo_learn_publishes(config, name):
    """1000 epochs: nothing is left to fit, and these are the published numbers (scripts/pretrain/cifar at commit 9187ea39)."""
    cfg = config(f"cifar/{name}")
    assert cfg.max_epochs == 1000
    assert cfg.optimizer.batch_size == 256
    assert cfg.optimizer.classifier_lr == 0.1
    assert cfg.scheduler.warmup_epochs == 10
    published = {
        "simclr": ("lars", 0.4, 1e-4),
        "byol": ("lars", 1.0, 1e-5),
        "vicreg": ("lars", 0.3, 1e-4),
        "swav": ("lars", 0.6, 1e-6),
        "ressl": ("sgd", 0.05, 1e-4),
    }[name]
    assert (cfg.optimizer.name, cfg.optimizer.lr, cfg.optimizer.weight_decay) == published
    if name == "swav":
        assert (
            cfg.method_kwargs.epoch_queue_starts,
            cfg.method_kwargs.freeze_prototypes_epochs,
        ) == (50, 2)
        assert fresh_method(cfg).sk_epsilon == 0.05
        assert fresh_method(config("digits/swav")).sk_epsilon == 0.02
    first, second = (
        (augmentations(cfg) * 2)[:2] if len(cfg.augmentations) == 1 else augmentations(cfg)
    )
    assert sum(augmentation.num_patches for augmentation in augmentations(cfg)) == 2
    assert first.mean == (0.4914, 0.4822, 0.4465)
    assert first.scale == ((0.2, 1.0) if name == "vicreg" else (0.08, 1.0))
    assert first.ratio == (3 / 4, 4 / 3)
    assert first.interpolation == "bicubic"
    assert second.solarize_prob == {"byol": 0.2, "vicreg": 0.1}.get(name, 0)
    assert first.solarize_prob == (0.1 if name == "vicreg" else 0)
    assert second.jitter_prob == (0 if name == "ressl" else 0.8)
    assert config(f"cifar/{name}", "data.dataset=cifar100").augmentations[-1].std == [
        0.2673,
        0.2564,
        0.2762,
    ]


@pytest.mark.parametrize(
    ("dataset", "size"), [("imagenet100", 224), ("tiny-imagenet", 64), ("custom", 224)]
)
@pytest.mark.parametrize("name", BASELINES)
def test_recipes_of_larger_images_say_what_solo_learn_publishes_for_imagenet100(
    config, name, dataset, size
):
    """Published in scripts/pretrain/imagenet-100 at commit 9187ea39; with its checkout, tests/solo_learn/test_recipes_exchange.py compares the files, and those of CIFAR."""
    cfg = config(f"{dataset}/{name}")
    assert (cfg.name, cfg.max_epochs, cfg.optimizer.batch_size, cfg.scheduler.warmup_epochs) == (
        f"{name}-{dataset}",
        400,
        256,
        10,
    )
    published = {
        "simclr": ("lars", 0.3, 1e-4),
        "byol": ("lars", 0.5, 1e-6),
        "vicreg": ("lars", 0.3, 1e-4),
        "swav": ("lars", 0.6, 1e-6),
        "ressl": ("sgd", 0.3, 1e-4),
    }[name]
    assert (cfg.optimizer.name, cfg.optimizer.lr, cfg.optimizer.weight_decay) == published
    made = augmentations(cfg)
    assert {augmentation.output_size for augmentation in made} == {size}
    assert sum(augmentation.num_patches for augmentation in made) == 2
    assert {augmentation.mean for augmentation in made} == {(0.485, 0.456, 0.406)}
    assert {augmentation.std for augmentation in made} == {(0.229, 0.224, 0.225)}
    assert [augmentation.blur_prob for augmentation in made] == {
        "byol": [1.0, 0.1],
        "ressl": [0.5, 0],
    }.get(name, [0.5])
    assert config(f"{dataset}/{name}", "max_epochs=4").scheduler.warmup_epochs == pytest.approx(0.1)


@pytest.mark.parametrize("name", BASELINES)
def test_what_counts_in_epochs_is_fitted_to_the_run(config, name):
    cfg = config(f"cifar/{name}", "max_epochs=1")
    assert cfg.scheduler.warmup_epochs == pytest.approx(0.01)
    assert (
        config(
            f"cifar/{name}", "max_epochs=1", "scheduler.warmup_epochs=0.5"
        ).scheduler.warmup_epochs
        == 0.5
    )


@pytest.mark.parametrize("name", BASELINES)
def test_views_of_images_in_workers(config, digits, name):
    """With ``data.views=image``; the same training with and without workers."""
    losses = []
    for workers in (0, 2):
        cfg = config(
            f"digits/{name}",
            *SMALL,
            *(setting for setting in HEADS[name] if name != "swav" or "queue" not in setting),
            "data.views=image",
            f"data.num_workers={workers}",
            "optimizer.batch_size=8",
        )
        _, record = fit(cfg, digits[0].subset(range(16)), 2)
        losses.append([logged["train_class_loss_step"] for logged in record.logged])
    assert losses[0] == losses[1]

"""The shipped recipes of the baselines train what solo-learn trains.

Their losses on the same features are solo-learn's, and the networks move as they should.
"""

import copy
from collections import defaultdict
from functools import partial

import pytest
import torch
import torch.nn.functional as F
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
    "simclr": ["proj_hidden_dim=32"],
    "vicreg": ["proj_hidden_dim=32", "proj_output_dim=24"],
    "byol": ["proj_hidden_dim=32", "pred_hidden_dim=32"],
    "swav": ["proj_hidden_dim=32", "num_prototypes=20", "queue_size=16"],
    "ressl": ["proj_hidden_dim=32", "queue_size=64"],
}


def small(name):
    """Overrides that make a baseline's run tiny."""
    return [*SMALL, *(f"method_kwargs.{setting}" for setting in HEADS[name])]


@pytest.fixture(scope="module")
def digits():
    """(train, test), as the recipes have them."""
    return load_dataset("digits", None, image_size=16)


class Record(pl.Callback):
    """Outputs of the heads in each step, the queue before it, and the state before the first."""

    def __init__(self):
        self.outputs, self.queues, self.logged = [], [], []

    def on_train_start(self, trainer, module):
        self.before = copy.deepcopy(module.state_dict())
        self.tau = module.momentum_updater.cur_tau if hasattr(module, "momentum_updater") else None
        for name in ("projector", "momentum_projector", "predictor", "prototypes"):
            if hasattr(module, name):
                getattr(module, name).register_forward_hook(partial(self.keep, name))

    def keep(self, name, layer, inputs, output):
        self.outputs[-1][name].append(output.detach())

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
    """(what it is logged as, solo-learn's loss on the recorded outputs).

    Its settings are those published for CIFAR, but for SwAV's ``sk_epsilon`` and ReSSL's
    temperatures, which are those of ``digits/ressl.yaml``.
    """
    if name == "simclr":
        z = out["projector"]
        arguments = (torch.cat(z), torch.arange(len(z[0])).repeat(2)) if API == "1.0.6" else z
        return "train_nce_loss", simclr_loss_func(*arguments, temperature=0.2)
    if name == "byol":
        (p1, p2), (z1, z2) = out["predictor"], out["momentum_projector"]
        return "train_neg_cos_sim", byol_loss_func(p2, z1) + byol_loss_func(p1, z2)
    if name == "vicreg":
        weights = dict(sim_loss_weight=25.0, var_loss_weight=25.0, cov_loss_weight=1.0)
        return "train_vicreg_loss", vicreg_loss_func(*out["projector"], **weights)
    if name == "swav":
        p, of_queue = out["prototypes"][:2], out["prototypes"][2:] or [torch.empty(0)] * 2
        assign = SinkhornKnopp(3, sk_epsilon, 1)
        assignments = [assign(torch.cat(both))[: len(p[0])] for both in zip(p, of_queue)]
        return "train_swav_loss", swav_loss_func(p, assignments, 0.1)
    # 1.0.2 passes the first view through one network and the second through the other, 1.0.6 both
    # views through both
    q = F.normalize(out["projector"][0], dim=-1)
    k = F.normalize(out["momentum_projector"][-1], dim=-1)
    key = "train_ressl_loss" if API == "1.0.6" else "ressl_loss"
    return key, ressl_loss_func(q, k, queue, 0.1, 0.002)


@pytest.fixture(scope="module")
def trained():
    """Two steps of every baseline on 32 digits, trained once for all tests."""
    made = {}

    def get(name, config, train):
        if name not in made:
            cfg = config(f"digits/{name}", *small(name))
            made[name] = fit(cfg, train.subset(range(32)), 2)
        return made[name]

    return get


@pytest.mark.parametrize("name", BASELINES)
def test_losses_of_the_first_steps_are_solo_learns(trained, config, digits, name):
    """In the second, SwAV's assignments and ReSSL's relations are over the first's keys, too."""
    model, record = trained(name, config, digits[0])
    for out, queue, logged in zip(record.outputs, record.queues, record.logged, strict=True):
        key, expected = expected_loss(name, out, queue, getattr(model, "sk_epsilon", None))
        loss = logged.get(f"{key}_step", logged.get(key))
        assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert not queue.numel() or not torch.equal(queue, record.queues[0])
    assert record.outputs[0].keys() >= {"projector"}
    assert len(record.outputs[0]["projector"]) == (1 if name == "ressl" and API == "1.0.2" else 2)


@pytest.mark.parametrize("name", BASELINES)
def test_what_is_trained_moves_and_nothing_else_does(trained, config, digits, name):
    model, record = trained(name, config, digits[0])
    parameters = dict(model.named_parameters())
    # a bias before BatchNorm has no gradient
    weights = {key: value for key, value in parameters.items() if value.ndim > 1}
    still = {key for key, value in weights.items() if torch.equal(value, record.before[key])}
    assert still == ({"prototypes.weight_g"} if name == "swav" else set())
    frozen = {key for key, value in parameters.items() if not value.requires_grad}
    assert frozen == still | {key for key in parameters if key.startswith("momentum_")}


@pytest.mark.parametrize("name", ["byol", "ressl"])
def test_momentum_networks_follow_by_tau(config, digits, name):
    settings = ("scheduler.warmup_epochs=0", "momentum.base_tau=0.99")
    cfg = config(f"digits/{name}", *small(name), *settings)
    model, record = fit(cfg, digits[0].subset(range(16)), 1)
    assert record.tau == pytest.approx(0.99)
    prefixes = {child: name for name, child in model.named_children()}
    assert [online for online, _ in model.momentum_pairs] == [backbone_of(model), model.projector]
    for online, momentum in model.momentum_pairs:
        prefix = prefixes[momentum]
        assert prefix.removeprefix("momentum_") == prefixes[online]
        for key, value in online.named_parameters():
            expected = 0.99 * record.before[f"{prefix}.{key}"] + 0.01 * value
            torch.testing.assert_close(momentum.get_parameter(key), expected, rtol=1e-5, atol=1e-7)
    assert model.momentum_updater.cur_tau == pytest.approx(1.0)  # the run is over


def test_ressls_queue_takes_the_teachers_keys(trained, config, digits):
    model, record = trained("ressl", config, digits[0])
    keys = torch.cat([step["momentum_projector"][-1] for step in record.outputs])
    keys = F.normalize(keys, dim=-1)
    torch.testing.assert_close(model.queue[:32], keys)
    torch.testing.assert_close(model.queue[32:], record.before["queue"][32:])


def test_swavs_prototypes_train_in_the_shortest_run(trained, config, digits):
    """Published: frozen for 2 of 1000 epochs. In a run of 2 steps that is less than the first."""
    model, record = trained("swav", config, digits[0])
    assert model.freeze_prototypes_epochs == pytest.approx(0.002)
    assert model.epoch_queue_starts == pytest.approx(0.05)
    assert not torch.equal(model.prototypes.weight_v, record.before["prototypes.weight_v"])
    # the second step uses the queue, which is full then
    assert [len(step["prototypes"]) for step in record.outputs] == [2, 4]


@pytest.mark.parametrize("name", BASELINES)
def test_cifars_recipes_say_what_solo_learn_publishes(config, name):
    """The numbers of its scripts/pretrain/cifar at commit 9187ea39.

    In 1000 epochs, the published length, nothing is fitted to the run.
    """
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
        assert cfg.method_kwargs["epoch_queue_starts"] == 50
        assert cfg.method_kwargs["freeze_prototypes_epochs"] == 2
        assert fresh_method(cfg).sk_epsilon == 0.05
        assert fresh_method(config("digits/swav")).sk_epsilon == 0.02
    made = augmentations(cfg)
    assert sum(augmentation.num_patches for augmentation in made) == 2
    first, second = made[0], made[-1]
    assert first.mean == (0.4914, 0.4822, 0.4465)
    assert first.scale == ((0.2, 1.0) if name == "vicreg" else (0.08, 1.0))
    assert first.ratio == (3 / 4, 4 / 3)
    assert first.interpolation == "bicubic"
    assert second.solarize_prob == {"byol": 0.2, "vicreg": 0.1}.get(name, 0)
    assert first.solarize_prob == (0.1 if name == "vicreg" else 0)
    assert second.jitter_prob == (0 if name == "ressl" else 0.8)
    of_cifar100 = config(f"cifar/{name}", "data.dataset=cifar100").augmentations[-1]
    assert of_cifar100["std"] == [0.2673, 0.2564, 0.2762]


@pytest.mark.parametrize(
    ("dataset", "size"), [("imagenet100", 224), ("tiny-imagenet", 64), ("custom", 224)]
)
@pytest.mark.parametrize("name", BASELINES)
def test_recipes_of_larger_images_say_what_solo_learn_publishes_for_imagenet100(
    config, name, dataset, size
):
    """The numbers of its scripts/pretrain/imagenet-100 at commit 9187ea39.

    Where there is a checkout of it, tests/solo_learn/test_recipes_exchange.py compares the files,
    and those of CIFAR.
    """
    cfg = config(f"{dataset}/{name}")
    assert cfg.name == f"{name}-{dataset}"
    assert cfg.max_epochs == 400
    assert cfg.optimizer.batch_size == 256
    assert cfg.scheduler.warmup_epochs == 10
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
    blurs = {"byol": [1.0, 0.1], "ressl": [0.5, 0]}.get(name, [0.5])
    assert [augmentation.blur_prob for augmentation in made] == blurs
    assert config(f"{dataset}/{name}", "max_epochs=4").scheduler.warmup_epochs == pytest.approx(0.1)


@pytest.mark.parametrize("name", BASELINES)
def test_what_counts_in_epochs_is_fitted_to_the_run(config, name):
    fitted = config(f"cifar/{name}", "max_epochs=1")
    assert fitted.scheduler.warmup_epochs == pytest.approx(0.01)
    given = config(f"cifar/{name}", "max_epochs=1", "scheduler.warmup_epochs=0.5")
    assert given.scheduler.warmup_epochs == 0.5


@pytest.mark.parametrize("name", BASELINES)
def test_views_of_images_in_workers(config, digits, name):
    """With ``data.views=image``; the same training with and without workers."""
    settings = [*small(name), "data.views=image", "optimizer.batch_size=8"]
    if name == "swav":
        settings.remove("method_kwargs.queue_size=16")
    losses = []
    for workers in (0, 2):
        cfg = config(f"digits/{name}", *settings, f"data.num_workers={workers}")
        _, record = fit(cfg, digits[0].subset(range(16)), 2)
        losses.append([logged["train_class_loss_step"] for logged in record.logged])
    assert losses[0] == losses[1]

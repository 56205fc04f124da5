from dataclasses import dataclass

import pytest
import torch
from omegaconf import OmegaConf

from emp_plugin.solo_learn import (
    API,
    METHODS,
    BaseMethod,
    backbone_of,
    build_method,
    settings,
    split_settings,
)
from emp_plugin.solo_learn.settings import _device_count


@dataclass
class Settings:
    width: int = 3
    preset: str = "code"


class Mine(BaseMethod):
    lr_scaled_by_batch_size = False

    def __init__(self, *args, **kwargs):
        own, args, kwargs = split_settings(Settings, args, kwargs)
        super().__init__(*args, **kwargs)
        self.settings = own


@pytest.fixture
def mine(monkeypatch):
    monkeypatch.setitem(METHODS, "mine", Mine)


def test_configuration_reaches_the_constructor(tools):
    cfg = tools.make_config(
        "byol",
        optimizer__batch_size=64,
        devices=[0, 1],
        num_nodes=2,
        accumulate_grad_batches=3,
        momentum__classifier=True,
        momentum__base_tau=0.97,
        knn_eval__enabled=True,
        knn_eval__k=7,
        knn_eval__distance_func="cosine",
        scheduler__min_lr=0.01,
        optimizer__kwargs__nesterov=True,
    )
    method = build_method(cfg)
    assert method.lr == pytest.approx(0.4 * 64 * 4 / 256 * 3)
    assert method.classifier_lr == pytest.approx(0.1 * 64 * 4 / 256 * 3)
    assert dict(method.extra_optimizer_args).items() >= {"momentum": 0.9, "nesterov": True}.items()
    assert method.weight_decay == 1e-4
    assert method.batch_size == 64
    assert method.warmup_epochs == 0.5
    assert method.max_epochs == 1
    assert method.num_classes == 3
    assert method.min_lr == pytest.approx(0.03)
    assert method.momentum_updater.base_tau == 0.97
    assert method.momentum_classifier is not None
    assert method.knn.k == 7
    assert method.knn.distance_fx == "cosine"
    assert method.predictor[0].out_features == 8
    assert method.num_crops == 2
    assert backbone_of(method) is method.momentum_pairs[0][0]
    assert backbone_of(method).conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_defaults_of_small_configs(tools):
    settings = {"optimizer__name": "adamw", "optimizer__kwargs": {"betas": [0.8, 0.9]}}
    method = build_method(tools.make_config("vicreg", devices=None, **settings))
    assert (method.sim_loss_weight, method.var_loss_weight, method.cov_loss_weight) == (25, 25, 1.0)
    assert method.optimizer == "adamw"
    assert method.extra_optimizer_args == {"betas": (0.8, 0.9)}
    assert method.lr == pytest.approx(0.4 * 4 / 256)


def test_the_configuration_is_left_alone(tools):
    cfg, same = (tools.make_config("simclr", backbone__stem_padding=1) for _ in range(2))
    build_method(cfg)
    assert cfg == same


def test_methods_with_settings_of_their_own(tools, mine):
    cfg = tools.make_config("mine", method_kwargs__width=5, accumulate_grad_batches=2)
    method = build_method(cfg)
    assert method.settings == Settings(5, "code")
    assert method.lr == 0.4
    assert method.classifier_lr == 0.1


@pytest.mark.skipif(API != "1.0.2", reason="about 1.0.2's constructors")
def test_settings_are_also_taken_from_keywords():
    """The command line of 1.0.2 passes all its arguments to the constructor."""
    split = split_settings(Settings, (1,), {"width": 5, "lr": 0.1})
    assert split == (Settings(5), (1,), {"lr": 0.1})


def test_settings_on_1_0_6(monkeypatch):
    monkeypatch.setattr(settings, "API", "1.0.6")
    cfg = OmegaConf.create({"method_kwargs": {"width": 5}})
    assert split_settings(Settings, (cfg,), {}) == (Settings(5), (cfg,), {})
    assert split_settings(Settings, (), {"cfg": OmegaConf.create({})})[0] == Settings()
    cfg.method_kwargs.widht = 1
    with pytest.raises(ValueError, match="method_kwargs.widht"):
        split_settings(Settings, (cfg,), {})


@pytest.mark.parametrize(
    ("dataset", "small"),
    [("cifar10", True), ("cifar100", True), ("digits", True), ("imagenet100", False)],
)
def test_small_images_get_the_small_stem(tools, dataset, small):
    backbone = backbone_of(build_method(tools.make_config("simclr", data__dataset=dataset)))
    assert backbone.conv1.kernel_size == ((3, 3) if small else (7, 7))
    assert isinstance(backbone.maxpool, torch.nn.Identity) == small


def test_stem_padding_changes_maps_and_not_weights(tools):
    made = []
    for padding in (None, 1):
        torch.manual_seed(0)
        made.append(build_method(tools.make_config("byol", backbone__stem_padding=padding)))
    x = torch.randn(1, 3, 32, 32)
    for wide, narrow in zip(*(method.momentum_pairs[0] for method in made)):
        assert wide.conv1(x).shape[-1] == 34
        assert narrow.conv1(x).shape[-1] == 32
        assert torch.equal(wide.conv1.weight, narrow.conv1.weight)


@pytest.mark.parametrize("name", ["vit_tiny", "swin_tiny"])
def test_transformers_take_the_crop_size(tools, name):
    kwargs = {"patch_size": 4} if name == "vit_tiny" else {}
    views = {"augmentations": [{"crop_size": 32}]}
    cfg = tools.make_config("simclr", backbone__name=name, backbone__kwargs=kwargs, **views)
    backbone = backbone_of(build_method(cfg)).eval()
    assert backbone(torch.randn(1, 3, 32, 32)).shape == (1, backbone.num_features)


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("simclrr", {}, "unknown method 'simclrr'.*byol"),
        ("base", {}, "unknown method 'base'"),
        ("simclr", {"backbone__name": "resnet19"}, "no 'resnet19'.*resnet18"),
        ("simclr", {"backbone__name": "vit_tiny", "backbone__stem_padding": 1}, "stem_padding"),
        ("simclr", {"data__dataset": "imagenet100", "backbone__stem_padding": 1}, "stem_padding"),
        ("simclr", {"backbone__stem_padding": -1}, "negative"),
        ("simclr", {"method_kwargs__temprature": 1}, "method_kwargs.temprature.*temperature"),
        ("mine", {"method_kwargs__widht": 1}, "method_kwargs.widht.*width"),
        ("simclr", {"optimizer__name": "lamb"}, "unknown optimizer.name 'lamb'"),
        ("simclr", {"optimizer__name": "sgd"}, "optimizer.kwargs.clip_lr with optimizer.name=sgd"),
        ("simclr", {"scheduler__name": "reduce"}, "unknown scheduler.name 'reduce'"),
        ("simclr", {"scheduler__name": "step"}, "lr_decay_steps"),
        (
            "simclr",
            {"knn_eval__enabled": True, "knn_eval__distance_func": "dot"},
            "unknown knn_eval.distance_func 'dot'",
        ),
        ("ressl", {"method_kwargs__queue_size": 10}, "queue_size=10 must be a multiple.* 4"),
        ("ressl", {"method_kwargs__base_tau_momentum": 0.5}, "contradicts momentum.base_tau"),
    ],
)
def test_what_cannot_work_is_named(tools, mine, method, change, message):
    with pytest.raises(ValueError, match=message):
        build_method(tools.make_config(method, **change))


def test_solo_learns_own_ressl_recipe_is_understood(tools):
    repeated = {
        "method_kwargs__base_tau_momentum": 0.9,
        "method_kwargs__momentum_classifier": None,
    }
    build_method(tools.make_config("ressl", **repeated))


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ([0], 1),
        ([0, 1], 2),
        (3, 3),
        ("2", 2),
        ("0,3", 2),
        ("0,", 1),
        ("auto", 1),
        (None, 1),
        (-1, 1),
    ],
)
def test_number_of_devices(devices, expected):
    assert _device_count(devices, "cpu") == expected

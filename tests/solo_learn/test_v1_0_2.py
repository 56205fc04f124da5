"""Repairs of v1_0_2.py: what they mend, and what happens without them."""

import warnings

import pytest
import torch

from emp_plugin.solo_learn import (
    API,
    METHODS,
    BaseMethod,
    BaseMomentumMethod,
    build,
    build_method,
    installed,
    pl,
)

pytestmark = pytest.mark.skipif(API != "1.0.2", reason="about solo-learn 1.0.2")


def test_untouched_modules_are_refused_by_lightning(tools, untouched):
    for cls in (
        untouched.base.BaseMethod,
        untouched.base.BaseMomentumMethod,
        untouched.linear.LinearModel,
    ):
        assert "validation_epoch_end" in vars(cls)
    for cls in (BaseMethod, BaseMomentumMethod, METHODS["linear"]):
        assert not hasattr(cls, "validation_epoch_end")
    model = tools.make_linear(untouched.linear, classes=5)
    with pytest.raises(NotImplementedError, match="validation_epoch_end"):
        tools.make_trainer().fit(model, tools.loader(4, False), tools.loader(4, False))


def test_lars_without_its_correction_warns_once(tools, monkeypatch):
    def fit():
        trainer = tools.make_trainer(limit_val_batches=0, limit_train_batches=1)
        trainer.fit(build_method(tools.make_config("byol")), tools.loader(4, True))

    installed._warn_of_lars.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        fit()  # corrected
        assert not [one for one in caught if "LARS" in str(one.message)]
        monkeypatch.setattr(build, "corrected", lambda cls: cls)
        fit()
        fit()
    [warning] = [str(one.message) for one in caught if "LARS" in str(one.message)]
    assert "emp_plugin.solo_learn.corrected" in warning


def test_untouched_momentum_hook_fails(tools, untouched, monkeypatch):
    method = build_method(tools.make_config("byol"))
    original = untouched.base.BaseMomentumMethod.on_train_batch_end
    monkeypatch.setattr(BaseMomentumMethod, "on_train_batch_end", original)
    trainer = tools.make_trainer(limit_val_batches=0, limit_train_batches=1)
    with pytest.raises(TypeError, match="dataloader_idx"):
        trainer.fit(method, tools.loader(8, True))


def test_dino_clips_its_own_way_and_lightnings(tools, untouched, monkeypatch):
    method = build_method(tools.make_config("dino"))

    def fit():
        one_step = {"limit_val_batches": 0, "limit_train_batches": 1}
        trainer = tools.make_trainer(**one_step, gradient_clip_val=1.0)
        trainer.fit(method, tools.loader(4, True))

    fit()
    conv = method.encoder.conv1.weight
    conv.grad = torch.full_like(conv, 5.0)
    method.clip_gradients(0.1)
    assert conv.grad.norm().item() == pytest.approx(0.1, rel=1e-3)
    monkeypatch.setattr(METHODS["dino"], "clip_gradients", untouched.dino.DINO.clip_gradients)
    with pytest.raises(TypeError, match="gradient_clip_val"):
        fit()


def test_the_constructors_keywords(tools):
    """What the schema of 1.0.6 calls otherwise, and the defaults of 1.0.2's command line."""
    method = build_method(tools.make_config("byol"))
    assert method.lars
    assert method.optimizer == "sgd"
    assert method.eta_lars == 0.02
    assert method.grad_clip_lars
    assert method.exclude_bias_n_norm
    settings = {"optimizer__name": "adamw", "optimizer__kwargs": {}}
    method = build_method(tools.make_config("vicreg", **settings))
    assert method.optimizer == "adamw"
    assert not method.lars


def test_what_1_0_2_lacks_is_named(tools):
    for change, message in [
        ({"backbone__name": "convnext_tiny"}, "1.0.2 has no 'convnext_tiny'.*resnet18"),
        ({"optimizer__exclude_bias_n_norm_wd": True}, "exclude_bias_n_norm_wd"),
    ]:
        with pytest.raises(ValueError, match=message):
            build_method(tools.make_config("simclr", **change))


def test_lightning_of_this_version():
    assert pl.__name__ == "pytorch_lightning"

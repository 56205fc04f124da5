"""Patches of wheel.py that have no file of their own: what they mend, and what happens without them."""

import pytest
import torch

from emp_plugin.solo_learn import (
    API,
    METHODS,
    BaseMethod,
    BaseMomentumMethod,
    build_method,
    pl,
)

pytestmark = pytest.mark.skipif(
    API != "1.0.2", reason="about the wheel; solo-learn's head is in use"
)


def test_unpatched_modules_are_refused_by_lightning(tools, unpatched):
    for cls in (
        unpatched.base.BaseMethod,
        unpatched.base.BaseMomentumMethod,
        unpatched.linear.LinearModel,
    ):
        assert "validation_epoch_end" in vars(cls)
    for cls in (BaseMethod, BaseMomentumMethod, METHODS["linear"]):
        assert not hasattr(cls, "validation_epoch_end")
    with pytest.raises(NotImplementedError, match="validation_epoch_end"):
        tools.make_trainer().fit(
            tools.make_linear(unpatched.linear, classes=5),
            tools.loader(4, False),
            tools.loader(4, False),
        )


def test_unpatched_momentum_hook_fails(tools, unpatched, monkeypatch):
    method = build_method(tools.make_config("byol"))
    monkeypatch.setattr(
        BaseMomentumMethod,
        "on_train_batch_end",
        unpatched.base.BaseMomentumMethod.on_train_batch_end,
    )
    with pytest.raises(TypeError, match="dataloader_idx"):
        tools.make_trainer(limit_val_batches=0, limit_train_batches=1).fit(
            method, tools.loader(8, True)
        )


def test_dino_clips_its_own_way_and_lightnings(tools, unpatched, monkeypatch):
    method = build_method(tools.make_config("dino"))
    fit = lambda: tools.make_trainer(
        limit_val_batches=0, limit_train_batches=1, gradient_clip_val=1.0
    ).fit(method, tools.loader(4, True))  # noqa: E731
    fit()
    conv = method.encoder.conv1.weight
    conv.grad = torch.full_like(conv, 5.0)
    method.clip_gradients(0.1)
    assert conv.grad.norm().item() == pytest.approx(0.1, rel=1e-3)
    monkeypatch.setattr(METHODS["dino"], "clip_gradients", unpatched.dino.DINO.clip_gradients)
    with pytest.raises(TypeError, match="gradient_clip_val"):
        fit()


def test_the_constructors_keywords(tools):
    """What the head's schema calls otherwise, and the defaults of the wheel's command line."""
    method = build_method(tools.make_config("byol"))
    assert method.lars
    assert method.optimizer == "sgd"
    assert method.eta_lars == 0.02
    assert method.grad_clip_lars
    assert method.exclude_bias_n_norm
    cfg = tools.make_config("vicreg", optimizer__name="adamw")
    cfg.optimizer.kwargs = {}
    method = build_method(cfg)
    assert method.optimizer == "adamw"
    assert not method.lars


def test_what_the_wheel_lacks_is_named(tools):
    for change, message in [
        ({"backbone__name": "convnext_tiny"}, "1.0.2 has no 'convnext_tiny'.*resnet18"),
        ({"optimizer__exclude_bias_n_norm_wd": True}, "exclude_bias_n_norm_wd"),
    ]:
        with pytest.raises(ValueError, match=message):
            build_method(tools.make_config("simclr", **change))


def test_lightning_of_this_generation():
    assert pl.__name__ == "pytorch_lightning"

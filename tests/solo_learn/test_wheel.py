"""Every patch of wheel.py that has no file of its own: what it mends, and what happens without it. The main paths run end to end."""
import copy

import pytest
import torch
from torch import nn

from emp_plugin.solo_learn import METHODS, BaseMethod, BaseMomentumMethod, build_method, pl

BASELINES = {"simclr": 1, "byol": 2, "vicreg": 0, "swav": 0, "ressl": 2}  # 1: with k-NN, 2: with a momentum classifier


def linear_model(solo_linear=None, classes=3):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(192, 6))
    backbone.num_features = 6
    cls = METHODS["linear"] if solo_linear is None else solo_linear.LinearModel
    return cls(backbone, num_classes=classes, max_epochs=1, batch_size=4, optimizer="sgd", lars=False, lr=0.1, weight_decay=0.0,
               exclude_bias_n_norm=False, extra_optimizer_args={"momentum": 0.9}, scheduler="cosine")


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_fit_and_validate(tools, name):
    torch.manual_seed(0)
    method = build_method(tools.make_config(name, knn_eval__enabled=BASELINES[name] == 1, momentum__classifier=BASELINES[name] == 2))
    before = copy.deepcopy(method.encoder.state_dict())
    trainer = tools.make_trainer()
    trainer.fit(method, tools.loader(8, True), tools.loader(7, False))
    expected = {"val_loss", "val_acc1", "val_acc5"}
    expected |= {"val_knn_acc1", "val_knn_acc5"} if BASELINES[name] == 1 else set()
    expected |= {f"momentum_{key}" for key in ("val_loss", "val_acc1", "val_acc5")} if BASELINES[name] == 2 else set()
    assert expected == {key for key in trainer.callback_metrics if "val" in key}
    assert all(torch.isfinite(value) for value in trainer.callback_metrics.values())
    assert trainer.callback_metrics["val_acc5"] == 100  # of three classes
    assert not torch.equal(before["layer4.1.conv2.weight"], method.encoder.state_dict()["layer4.1.conv2.weight"])
    assert trainer.global_step == 2


def test_linear_model_fits_and_its_means_count_every_image(tools):
    """Two validation batches of 4 and 3 images: the mean of the batches' means would be another number."""
    model = linear_model()
    images = [tools.loader(7, False).dataset[i] for i in range(7)]
    trainer = tools.make_trainer()
    trainer.fit(model, tools.loader(8, False), tools.loader(7, False))
    with torch.no_grad():
        logits = model(torch.stack([x for x, _ in images]))["logits"]
        expected = nn.functional.cross_entropy(logits, torch.tensor([y for _, y in images]))
    assert trainer.callback_metrics["val_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert trainer.callback_metrics["val_acc5"] == 100


def test_validation_without_training(tools):
    method = build_method(tools.make_config("simclr", knn_eval__enabled=True))
    metrics = tools.make_trainer().validate(method, tools.loader(4, False), verbose=False)[0]
    assert set(metrics) == {"val_loss", "val_acc1", "val_acc5"}


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"base", "linear", "emp", *BASELINES}))
def test_other_methods_can_be_built(tools, name):
    assert isinstance(build_method(tools.make_config(name)), BaseMethod)


def test_unpatched_modules_are_refused_by_lightning(tools, unpatched):
    for cls in (unpatched.base.BaseMethod, unpatched.base.BaseMomentumMethod, unpatched.linear.LinearModel):
        assert "validation_epoch_end" in vars(cls)
    for cls in (BaseMethod, BaseMomentumMethod, METHODS["linear"]):
        assert not hasattr(cls, "validation_epoch_end")
    with pytest.raises(NotImplementedError, match="validation_epoch_end"):
        tools.make_trainer().fit(linear_model(unpatched.linear, classes=5), tools.loader(4, False), tools.loader(4, False))


def test_momentum_moves_and_unpatched_hook_fails(tools, unpatched, monkeypatch):
    method = build_method(tools.make_config("byol"))
    momentum = method.momentum_encoder.conv1.weight.clone()
    fit = lambda: tools.make_trainer(limit_val_batches=0, limit_train_batches=1).fit(method, tools.loader(8, True))  # noqa: E731
    fit()
    expected = 0.9 * momentum + 0.1 * method.encoder.conv1.weight
    assert torch.allclose(method.momentum_encoder.conv1.weight, expected, atol=1e-7) and not torch.equal(expected, momentum)
    monkeypatch.setattr(BaseMomentumMethod, "on_train_batch_end", unpatched.base.BaseMomentumMethod.on_train_batch_end)
    with pytest.raises(TypeError, match="dataloader_idx"):
        fit()


def test_few_classes(unpatched):
    from solo.methods import base, linear
    logits, targets = torch.eye(3), torch.tensor([0, 1, 0])
    for module in (base, linear):
        assert [a.item() for a in module.accuracy_at_k(logits, targets)] == pytest.approx([200 / 3, 100])
    for module in (unpatched.base, unpatched.linear):
        with pytest.raises(RuntimeError, match="out of range"):
            module.accuracy_at_k(logits, targets)


def test_dino_clips_its_own_way_and_lightnings(tools, unpatched, monkeypatch):
    method = build_method(tools.make_config("dino"))
    fit = lambda: tools.make_trainer(limit_val_batches=0, limit_train_batches=1, gradient_clip_val=1.0).fit(method, tools.loader(4, True))  # noqa: E731
    fit()
    conv = method.encoder.conv1.weight
    conv.grad = torch.full_like(conv, 5.0)
    method.clip_gradients(0.1)
    assert conv.grad.norm().item() == pytest.approx(0.1, rel=1e-3)
    monkeypatch.setattr(METHODS["dino"], "clip_gradients", unpatched.dino.DINO.clip_gradients)
    with pytest.raises(TypeError, match="gradient_clip_val"):
        fit()


def test_checkpoint_of_a_method_can_be_loaded(tools, tmp_path):
    method = build_method(tools.make_config("vicreg"))
    trainer = tools.make_trainer(limit_val_batches=0, limit_train_batches=1)
    trainer.fit(method, tools.loader(4, True))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    fresh = build_method(tools.make_config("vicreg"))
    fresh.load_state_dict(torch.load(tmp_path / "a.ckpt", weights_only=False)["state_dict"])
    assert torch.equal(fresh.encoder.conv1.weight, method.encoder.conv1.weight)
    assert pl.__name__ == "pytorch_lightning"

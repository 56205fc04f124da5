"""solo-learn's methods as this project builds and runs them, of whichever version is installed."""

import copy

import pytest
import torch
from torch import nn

from emp_plugin.solo_learn import METHODS, BaseMethod, backbone_of, build_method, pl

# with what else they validate
BASELINES = {"simclr": "knn", "byol": "momentum", "vicreg": "", "swav": "", "ressl": "momentum"}
# mae reconstructs images: it needs a transformer, and no views
NOT_HERE = {"base", "linear", "emp", "mae"}


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_fit_and_validate(tools, name):
    torch.manual_seed(0)
    knn, momentum = BASELINES[name] == "knn", BASELINES[name] == "momentum"
    cfg = tools.make_config(name, knn_eval__enabled=knn, momentum__classifier=momentum)
    method = build_method(cfg)
    weight = "layer4.1.conv2.weight"
    before = copy.deepcopy(backbone_of(method).state_dict())
    trainer = tools.make_trainer()
    trainer.fit(method, tools.loader(8, True), tools.loader(7, False))
    expected = {"val_loss", "val_acc1", "val_acc5"}
    if momentum:
        expected |= {f"momentum_{key}" for key in expected}
    if knn:
        expected |= {"val_knn_acc1", "val_knn_acc5"}
    assert expected == {key for key in trainer.callback_metrics if "val" in key}
    assert all(torch.isfinite(value) for value in trainer.callback_metrics.values())
    assert trainer.callback_metrics["val_acc5"] == 100  # of three classes
    assert not torch.equal(before[weight], backbone_of(method).state_dict()[weight])
    assert trainer.global_step == 2


@pytest.mark.parametrize("name", ["simclr", "byol"])
def test_images_without_labels_train_and_have_no_accuracy(tools, name):
    """Without the repair the whole loss is NaN."""
    method = build_method(tools.make_config(name, momentum__classifier=name == "byol"))
    _, [view, _], targets = next(iter(tools.loader(8, True)))
    steps = [method._base_shared_step]
    if name == "byol":
        steps.append(method._shared_step_momentum)
    for step in steps:
        out = step(view, torch.full_like(targets, -1))
        out["loss"].backward()
        assert out["loss"] == 0
        assert torch.isnan(out["acc1"]).all()
        assert torch.isnan(out["acc5"]).all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in method.parameters())
        out = step(view, targets)
        assert out["loss"] > 0
        assert out["acc5"] == 100
        right = (out["logits"].argmax(1) == targets).double().mean()
        assert out["acc1"].item() == pytest.approx(100 * right.item())


@pytest.mark.parametrize("name", sorted(set(METHODS) - NOT_HERE - set(BASELINES)))
def test_other_methods_can_be_built(tools, name):
    assert isinstance(build_method(tools.make_config(name)), BaseMethod)


@pytest.mark.parametrize("name", sorted(set(METHODS) - NOT_HERE))
def test_a_setting_that_a_method_does_not_have_is_named(tools, name):
    with pytest.raises(ValueError, match="method_kwargs.nonsense"):
        build_method(tools.make_config(name, method_kwargs__nonsense=1))


def test_linear_model_fits_and_its_means_count_every_image(tools):
    """In validation batches of 4 and 3 images: the mean of their means would be another number."""
    model = tools.make_linear()
    images = [tools.loader(7, False).dataset[i] for i in range(7)]
    trainer = tools.make_trainer()
    trainer.fit(model, tools.loader(8, False), tools.loader(7, False))
    with torch.no_grad():
        logits = model(torch.stack([x for x, _ in images]))["logits"]
        expected = nn.functional.cross_entropy(logits, torch.tensor([y for _, y in images]))
    assert trainer.callback_metrics["val_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert trainer.callback_metrics["val_acc5"] == 100


def test_validation_without_training(tools):
    """There are no neighbours: 1.0.2 says nothing of them, 1.0.6 -1."""
    method = build_method(tools.make_config("simclr", knn_eval__enabled=True))
    metrics = tools.make_trainer().validate(method, tools.loader(4, False), verbose=False)[0]
    assert {"val_loss", "val_acc1", "val_acc5"} <= set(metrics)
    assert all(metrics[key] == -1 for key in set(metrics) - {"val_loss", "val_acc1", "val_acc5"})


def test_momentum_moves(tools):
    method = build_method(tools.make_config("byol"))
    momentum_backbone = method.momentum_pairs[0][1]
    before = momentum_backbone.conv1.weight.clone()
    trainer = tools.make_trainer(limit_val_batches=0, limit_train_batches=1)
    trainer.fit(method, tools.loader(8, True))
    expected = 0.9 * before + 0.1 * backbone_of(method).conv1.weight
    assert torch.allclose(momentum_backbone.conv1.weight, expected, atol=1e-7)
    assert not torch.equal(expected, before)


def test_dino_resumed_in_an_epoch_knows_which(tools, tmp_path):
    """Its loss has another temperature in every epoch of the warm-up."""

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            epochs.append(module.dino_loss_func.epoch)
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)

    def fit(**kwargs):
        method = build_method(tools.make_config("dino", max_epochs=2))
        trainer = tools.make_trainer(limit_val_batches=0, max_epochs=2, callbacks=[Watch()])
        trainer.fit(method, tools.loader(8, True), **kwargs)

    epochs = []
    fit()
    assert epochs == [0, 0, 1, 1]
    epochs.clear()
    fit(ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert epochs[0] == 1


def test_few_classes(untouched):
    from solo.methods import base, linear

    logits, targets = torch.eye(3), torch.tensor([0, 1, 0])
    for module in (base, linear):
        accuracies = [a.item() for a in module.accuracy_at_k(logits, targets)]
        assert accuracies == pytest.approx([200 / 3, 100])
    for module in (untouched.base, untouched.linear):
        with pytest.raises(RuntimeError, match="out of range"):
            module.accuracy_at_k(logits, targets)

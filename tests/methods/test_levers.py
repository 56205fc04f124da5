"""Settings of EMP beyond the paper, each off unless it is set."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from emp_plugin.losses import patch_invariance
from emp_plugin.methods import EMPSettings
from emp_plugin.solo_learn import backbone_of
from emp_plugin.training.flops import training_flops
from emp_plugin.training.probing import fresh_method
from support.runs import TINY_EMP, pretrain


@pytest.fixture
def method(config):
    """Builds a small EMP for digits, which logs nothing."""

    def build(*overrides):
        model = fresh_method(config("digits/emp", *TINY_EMP, *overrides))
        model.log_dict = lambda values, **_: None
        return model

    return build


def a_step(model, patches):
    return model.training_step([torch.arange(4), patches, torch.tensor([0, 1, 2, 3])], 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"bn_momentum": 0.0},
        {"bn_momentum": 1.5},
        {"bn_momentum": "fast"},
        {"ema_decay": 1.0},
        {"centred": 1},
        {"eps": [0.1, 0.0]},
        {"eps": [0.1]},
        {"invariance_weight": [1.0, True]},
    ],
)
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ValueError, match=f"method_kwargs.{next(iter(wrong))}"):
        EMPSettings(**wrong)


def test_with_a_momentum_of_1_statistics_are_those_of_the_last_batch(method):
    model, seen = method("method_kwargs.bn_momentum=1.0").train(), []
    backbone_of(model).bn1.register_forward_hook(lambda norm, x, y: seen.append(x[0]))
    for _ in range(2):
        a_step(model, torch.randn(2, 4, 3, 16, 16))
    last = seen[-1].mean((0, 2, 3))
    torch.testing.assert_close(backbone_of(model).bn1.running_mean, last)
    assert {norm.momentum for norm in (model.embedder[1], model.projector[1])} == {1.0}


MUON = ("optimizer.name=muon", "~optimizer.kwargs", "optimizer.kwargs.momentum=0")


def test_muons_update_of_a_convolution_is_orthogonal_and_adamws_of_a_norm_is_not(method):
    model = method(*MUON, "scheduler.name=none", "optimizer.weight_decay=0", "optimizer.lr=0.01")
    convolution, norm = backbone_of(model).layer1[0].conv1.weight, backbone_of(model).bn1.weight
    before = convolution.detach().clone(), norm.detach().clone()
    optimizer = model.configure_optimizers()
    a_step(model.train(), torch.randn(2, 4, 3, 16, 16)).backward()
    optimizer.step()
    update = (convolution.detach() - before[0]).flatten(1)
    lengths = torch.linalg.svdvals(update) / (0.01 * 0.2 * update.shape[1] ** 0.5)
    assert 0.6 < lengths.min() < lengths.max() < 1.3  # Newton-Schulz's five iterations
    # the first step of Adam is the rate, towards the sign of the gradient
    torch.testing.assert_close(
        norm.detach(), before[1] - 0.01 * norm.grad.sign(), atol=1e-5, rtol=0
    )


def test_muons_products_are_counted_once_for_a_batch(config):
    """Of an m x n matrix, m <= n, five times: two products of m m n, one of m m m."""
    recipe = config("digits/emp", *TINY_EMP, *MUON)
    sgd = config("digits/emp", *TINY_EMP)
    shapes = [w.flatten(1).shape for w in fresh_method(recipe).parameters() if w.ndim > 1]
    sides = [(min(shape), max(shape)) for shape in shapes]
    products = sum(5 * 2 * (2 * m * m * n + m**3) for m, n in sides if m >= 4)
    counted = training_flops(recipe) - training_flops(sgd)
    assert counted == pytest.approx(products / recipe.optimizer.batch_size, rel=1e-3)


def test_others_leave_the_patch_itself_out():
    z = torch.randn(3, 2, 5, dtype=torch.float64)
    similar = [
        torch.cosine_similarity(z[i, image], (z[[j for j in range(3) if j != i], image]).mean(0), 0)
        for i in range(3)
        for image in range(2)
    ]
    torch.testing.assert_close(patch_invariance(z, others=True), torch.stack(similar).mean())
    with pytest.raises(ValueError, match="at least 2"):
        patch_invariance(z[:1], others=True)


def test_centred_projections_share_no_direction(method):
    patches = torch.randn(3, 4, 3, 16, 16)
    seen = []
    model = method("method_kwargs.centred=true").train()
    model.projector.register_forward_hook(lambda module, x, y: seen.append(y))
    _, z = model.project(patches)
    assert seen[0].mean(0).abs().max() < 1e-5
    torch.testing.assert_close(z, F.normalize(seen[0], dim=-1).unflatten(0, (3, 4)))
    assert torch.isfinite(a_step(model, patches))


def test_a_course_is_a_line_over_the_run(method):
    """Of five steps, the middle one has the mean of both ends."""
    model = method("method_kwargs.invariance_weight=[10,50]", "method_kwargs.eps=[0.4,0.2]")
    model.trainer = SimpleNamespace(
        estimated_stepping_batches=5, num_training_batches=5, accumulate_grad_batches=1
    )
    seen = []
    for step in (0, 2, 4):
        model.trainer.global_step = step
        seen.append((model.now(model.settings.invariance_weight), model.now(model.settings.eps)))
    assert seen == [(10, 0.4), (30, pytest.approx(0.3)), (50, pytest.approx(0.2))]


def test_a_run_with_all_of_them_ends(tmp_path):
    settings = ["method_kwargs.invariance_weight=[10,50]", "method_kwargs.eps=[0.4,0.2]"]
    settings += ["method_kwargs.others=true", "method_kwargs.centred=true", *MUON]
    settings += ["scheduler.name=warmup_linear", "method_kwargs.bn_momentum=0.3"]
    settings += ["limit_train_batches=3", "limit_val_batches=0", "method_kwargs.patch_chunk=1"]
    small = ["data.patch_size=8", "data.output_size=8", "evaluation.enabled=False", "max_epochs=1"]
    assert pretrain(tmp_path, *TINY_EMP, *settings, *small) == 0

"""LARS under Lightning, whose optimiser steps compute the gradients in a closure."""

import pytest
import torch
from solo.utils import lars as solos
from torch import nn

from emp_plugin.solo_learn import API, build_method, lars, pl

ETA, LR, DECAY, MOMENTUM = 0.02, 0.5, 0.01, 0.9
only_1_0_2 = pytest.mark.skipif(API != "1.0.2", reason="about 1.0.2's LARSWrapper")


def make_lars(params, clip=False, exclude=True, ours=True):
    """solo-learn's LARS, a wrapper of SGD in 1.0.2, an optimiser in 1.0.6; or ours in its place."""
    of_sgd = {"lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY, "nesterov": True}
    of_lars = {"eta": ETA, "exclude_bias_n_norm": exclude}
    if API == "1.0.6":
        made = solos.LARS(params, **of_sgd, **of_lars, clip_lr=clip)
    else:
        made = solos.LARSWrapper(torch.optim.SGD(params, **of_sgd), **of_lars, clip=clip)
    return lars.at_once(made) if ours else made


class Regression(pl.LightningModule):
    def __init__(self, clip, ours=True):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        self.clip, self.ours = clip, ours

    def training_step(self, batch, batch_idx):
        return ((self.net(batch[0]) - batch[1]) ** 2).mean()

    def configure_optimizers(self):
        optimizer = make_lars(self.parameters(), self.clip, ours=self.ours)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def data():
    """Two batches of three."""
    generator = torch.Generator().manual_seed(1)
    return torch.utils.data.TensorDataset(
        torch.randn(6, 4, generator=generator).double(),
        torch.randn(6, 2, generator=generator).double(),
    )


def batch(step):
    start = 3 * (step % 2)
    return data()[start : start + 3]


def train(tools, clip=False, ours=True, steps=4, **fit):
    model = Regression(clip, ours)
    trainer = tools.make_trainer(max_epochs=steps // 2)
    trainer.fit(model, torch.utils.data.DataLoader(data(), 3), **fit)
    return model, trainer


def by_hand(clip, steps=4):
    """LARS (You et al. 2017) around SGD with Nesterov momentum, one parameter at a time."""
    model = Regression(clip)
    velocity = {}
    for step in range(steps):
        lr = LR / (1 + step)
        x, y = batch(step)
        grads = torch.autograd.grad(((model.net(x) - y) ** 2).mean(), list(model.net.parameters()))
        with torch.no_grad():
            for p, g in zip(model.net.parameters(), grads):
                if p.ndim > 1:
                    rate = ETA * p.norm() / (g.norm() + DECAY * p.norm() + 1e-8)
                    rate = min(rate / lr, 1.0) if clip else rate
                    g = rate * (g + DECAY * p)
                velocity[p] = MOMENTUM * velocity[p] + g if p in velocity else g
                p -= lr * (g + MOMENTUM * velocity[p])
    return model


def same(a, b):
    return all(
        torch.allclose(p, q, rtol=1e-10, atol=0)
        for p, q in zip(a.net.parameters(), b.net.parameters())
    )


@pytest.mark.parametrize("clip", [False, True])
def test_equals_the_formula_under_lightning(tools, clip):
    assert same(train(tools, clip=clip)[0], by_hand(clip))


@only_1_0_2
def test_solo_learns_own_uses_raw_gradients(tools):
    model, _ = train(tools, ours=False)
    assert not same(model, by_hand(False))
    plain = Regression(False)
    sgd = torch.optim.SGD(plain.parameters(), lr=LR, momentum=MOMENTUM, nesterov=True)
    for step in range(4):
        sgd.param_groups[0]["lr"] = LR / (1 + step)
        sgd.zero_grad()
        plain.training_step(batch(step), 0).backward()
        sgd.step()
    assert same(model, plain)  # neither LARS nor weight decay


@pytest.mark.parametrize("exclude", [True, False])
@pytest.mark.parametrize("clip", [False, True])
def test_steps_have_the_same_bits_without_waiting_for_a_gpu(clip, exclude):
    """Groups have rates and decays of their own; weights or gradients are zero, NaN or not there.

    A value that Python asks for, and waits for, shows in a profile.
    """
    ended, events = [], []
    for ours in (True, False):
        draws = torch.Generator().manual_seed(0)
        shapes = [(30, 20), (20,), (8, 3, 3, 3), (4, 4), (4, 4), (5,), (), (64, 33), (5, 5)]
        params = [
            nn.Parameter(10.0 ** (i % 4 - 2) * torch.randn(shape, generator=draws))
            for i, shape in enumerate(shapes)
        ]
        params[3].data.zero_()
        groups = [
            {"params": params[:3], "weight_decay": 0.02},
            {"params": params[3:7], "lr": 0.0},
            {"params": params[7:], "lr": 0.3, "weight_decay": 0.0},
        ]
        optimizer = make_lars(groups, clip, exclude, ours)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for step in range(4):
                for i, p in enumerate(params):
                    p.grad = 10.0 ** (-3 * (i % 2)) * torch.randn(p.shape, generator=draws)
                params[4].grad *= step % 2
                params[0].grad = None if step == 1 else params[0].grad
                params[8].grad *= torch.nan if step == 3 else 1
                optimizer.step()
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.02, DECAY, 0.0]
        values = [
            value
            for p in params
            for value in (p.detach(), p.grad, optimizer.state[p].get("momentum_buffer"))
        ]
        ended.append([value for value in values if value is not None])
        events.append({event.name for event in profile.events()})
    assert len(ended[0]) == 27
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(*ended))
    assert ["aten::_local_scalar_dense" in names for names in events] == [False, True]


@pytest.mark.parametrize("name", ["emp", "simclr"])
def test_our_methods_step_by_it(tools, name):
    method = build_method(tools.make_config(name, scheduler__name="none"))
    assert type(method.configure_optimizers()) is lars.LARSAtOnce


def test_step_returns_the_closures_loss_and_restores_weight_decay():
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = make_lars([p])

    def closure():
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4
    assert optimizer.param_groups[0]["weight_decay"] == DECAY
    assert optimizer.step() is None


def test_checkpoint_restores_momentum_and_schedule(tools, tmp_path):
    _, trainer = train(tools, steps=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, again = train(tools, steps=4, ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    assert again.global_step == 4
    assert same(resumed, by_hand(False))


def test_gradient_scaler_takes_it():
    p = nn.Parameter(torch.ones(2, 2))
    q = nn.Parameter(torch.ones(2, 2))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaled, plain = (make_lars([x]) for x in (p, q))
    scaler.scale((p**2).sum()).backward()
    (q**2).sum().backward()
    scaler.step(scaled)
    scaler.update()
    plain.step()
    assert torch.allclose(p, q)
    assert not torch.equal(p, torch.ones(2, 2))

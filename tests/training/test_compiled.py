"""Networks compiled for the training: the same run, and an eager one where the compiler fails."""

import copy
import os
import signal

import pandas as pd
import pytest
import torch
from torch import nn

from emp_plugin.config import from_dict, to_dict
from emp_plugin.errors import UserError
from emp_plugin.solo_learn import pl
from emp_plugin.training import compiled
from emp_plugin.training.compiled import Compiled
from emp_plugin.training.data import PretrainData
from emp_plugin.training.folder import identity
from emp_plugin.training.probing import fresh_method, load_data
from emp_plugin.training.run import device_views
from support import runs
from support.runs import TINY_EMP, at_step, the_run

SETTINGS = [
    "optimizer.batch_size=16",
    "data.fraction=0.06",
    "limit_val_batches=1",
    "max_epochs=2",
    "evaluation.enabled=False",
    "checkpoint.every_n_steps=2",
    "checkpoint.min_seconds=0",
]
HEADS = {
    "emp": TINY_EMP,
    "simclr": ["method_kwargs.proj_hidden_dim=32"],
    "byol": ["method_kwargs.proj_hidden_dim=32", "method_kwargs.pred_hidden_dim=32"],
}


def pretrain(folder, *overrides, method="emp"):
    settings = [*SETTINGS, *HEADS[method], *overrides]
    assert runs.pretrain(folder, *settings, recipe=f"digits/{method}") == 0
    return the_run(folder)


def assert_same(run, other):
    """The same weights under the same names, and the same logged values."""
    ours, theirs = (
        torch.load(folder / "last.ckpt", weights_only=True)["state_dict"] for folder in (run, other)
    )
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    tables = [pd.read_csv(folder / "metrics.csv").sort_values("step") for folder in (run, other)]
    left, right = (table[sorted(table)].reset_index(drop=True) for table in tables)
    pd.testing.assert_frame_equal(left, right)


# settings


@pytest.mark.parametrize(
    ("setting", "mode"),
    [
        ("compile=off", "off"),
        ("compile=False", "off"),
        ("compile=default", "default"),
        ("compile=reduce-overhead", "reduce-overhead"),
        ("disable_channel_last=False", "off"),
    ],
)
def test_the_setting(config, setting, mode):
    assert config("cifar/emp", f"performance.{setting}").performance.compile == mode


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["performance.compile=True"], "must be one of off, default, reduce-overhead, got True"),
        (["performance.compile=max"], "must be one of off, default, reduce-overhead, got max"),
        (["performance.compile=default", "method_kwargs.patch_chunk=5"], "set one of them only"),
    ],
)
def test_settings_that_are_refused(config, overrides, message):
    with pytest.raises(UserError, match=message):
        config("cifar/emp", *overrides)


def test_several_devices_are_refused(tmp_path, capsys):
    settings = [*SETTINGS, *TINY_EMP, "devices=2", "performance.compile=default"]
    assert runs.pretrain(tmp_path, *settings) == 1
    assert "performance.compile is for one device" in capsys.readouterr().err


def test_a_compiled_training_is_another_one(config):
    modes = ("off", "default", "reduce-overhead")
    eager, *others = (identity(config("cifar/emp", f"performance.compile={m}")) for m in modes)
    assert len({eager, *others}) == 3
    before = to_dict(config("cifar/emp"))
    del before["performance"]["compile"]  # as runs of before have it in their files
    assert identity(from_dict(before)) == eager


# a compiler that only counts


@pytest.mark.parametrize(
    ("method", "mode", "online", "teacher"),
    [("emp", "default", 3, 0), ("byol", "reduce-overhead", 3, 2)],
)
def test_each_network_is_compiled_once_and_for_training_alone(
    tmp_path, monkeypatch, method, mode, online, teacher
):
    """And CUDA graphs are told of every step of the optimiser."""
    graphs, asked, evaluating, marks = [], [], [], []
    compile_with = torch.compile

    def backend(graph, _):
        graphs.append(graph)

        def run(*inputs):
            evaluating.append(torch.is_inference_mode_enabled())
            return graph(*inputs)

        return run

    def count(function, **settings):
        asked.append(settings.pop("mode"))
        return compile_with(function, backend=backend, **settings)

    twice = "accumulate_grad_batches=2"
    eager = pretrain(tmp_path / "eager", twice, method=method)
    monkeypatch.setattr(torch, "compile", count)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    run = pretrain(tmp_path / "compiled", f"performance.compile={mode}", twice, method=method)
    assert_same(run, eager)
    networks = online + teacher
    assert asked == [mode] * online + ["default"] * teacher
    assert len(graphs) == networks
    views = 1 if method == "emp" else 2  # that each network takes apart
    assert evaluating == [False] * (networks * (10 * views + 1))  # and one is tried before
    assert len(marks) == (6 if mode == "reduce-overhead" else 0)  # of five batches two and a half
    assert pd.read_json(run / "summary.json", typ="series").compiled
    assert not pd.read_json(eager / "summary.json", typ="series").compiled


# a compiler that fails


def fails_at_once(forward, **_):
    raise RuntimeError("no compiler\nat all")


def fails_in_the_projector(forward, **_):
    def run(x):
        if isinstance(forward.__self__, nn.Sequential):
            raise RuntimeError("no compiler\nat all")
        return forward(x + 1)

    return run


class FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x + 1

    @staticmethod
    def backward(ctx, upstream):
        raise RuntimeError("no compiler\nat all")


def fails_in_backward(forward, **_):
    return lambda x: FailingBackward.apply(forward(x))


@pytest.fixture(scope="module")
def eager(tmp_path_factory):
    return pretrain(tmp_path_factory.mktemp("eager"))


@pytest.mark.parametrize("failing", [fails_at_once, fails_in_the_projector, fails_in_backward])
def test_without_a_compiler_the_run_is_an_eager_one(eager, tmp_path, monkeypatch, capsys, failing):
    monkeypatch.setattr(torch, "compile", failing)
    run = pretrain(tmp_path, "performance.compile=default")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("performance.compile")] == [
        "performance.compile=default: this run is not compiled, because the compiler failed "
        "(RuntimeError: no compiler)"
    ]
    assert_same(run, eager)
    assert not pd.read_json(run / "summary.json", typ="series").compiled


def test_a_continued_run_stays_what_it_was(tmp_path, monkeypatch, capsys):
    setting = "performance.compile=default"
    runs_at = "auto_resume.enabled=True"
    for name, first, second in (("eager", fails_at_once, None), ("compiled", None, fails_at_once)):
        folder = tmp_path / name
        monkeypatch.setattr(torch, "compile", first or (lambda forward, **_: forward))
        with monkeypatch.context() as stop:
            at_step(stop, 3, lambda _: os.kill(os.getpid(), signal.SIGTERM))
            assert runs.pretrain(folder, *SETTINGS, *TINY_EMP, setting, runs_at) == 1
        assert "stopped by SIGTERM" in capsys.readouterr().err
        monkeypatch.setattr(torch, "compile", second or (lambda forward, **_: forward))
        status = runs.pretrain(folder, *SETTINGS, *TINY_EMP, setting, runs_at)
        if name == "eager":
            assert status == 0
            run = the_run(folder)
            assert not pd.read_json(run / "summary.json", typ="series").compiled
        else:
            assert status == 1
            assert (
                "this run was compiled so far, and the compiler failed" in capsys.readouterr().err
            )


def test_the_trial_leaves_buffers_and_random_numbers():
    part = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    state, random = copy.deepcopy(part.state_dict()), torch.get_rng_state()
    compiled._try([part], [part], [torch.randn(6, 4)])
    torch.randn(3)  # it is the caller's again
    torch.set_rng_state(random)
    assert all(torch.equal(part.state_dict()[name], value) for name, value in state.items())


# inductor


class Beside(pl.Callback):
    """Loss and gradients of every step, next to those of an eager twin with the same weights."""

    def __init__(self, twin):
        self.twin, self.errors = twin.train(), []
        twin.log = twin.log_dict = lambda *args, **kwargs: None

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.twin.load_state_dict(module.state_dict())
        self.twin.zero_grad()
        with torch.random.fork_rng():
            self.loss = self.twin.training_step(batch, batch_idx)
        self.loss.backward()

    def on_before_backward(self, trainer, module, loss):
        self.errors.append([abs(loss.item() / self.loss.item() - 1)])

    def on_before_optimizer_step(self, trainer, module, optimizer):
        pairs = [
            (ours.grad, theirs.grad)
            for ours, theirs in zip(module.parameters(), self.twin.parameters())
            if theirs.grad is not None
        ]
        whole = torch.stack([theirs.norm() for _, theirs in pairs]).norm()
        for ours, theirs in pairs:
            # a bias before BatchNorm has no gradient but what is rounded
            size = max(theirs.norm(), 1e-2 * whole)
            self.errors[-1].append(((ours - theirs).norm() / size).item())


class Doubles(PretrainData):
    """Patches in float64."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        indices, patches, targets = super().on_after_batch_transfer(batch, dataloader_idx)
        return [indices, patches.double(), targets]


def smooth(model):
    """The method with SiLU for ReLU, whose gradient jumps at zero."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.ReLU):
                setattr(parent, name, nn.SiLU())
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "bits"), [("emp", 32), ("emp", 64), ("simclr", 32), ("byol", 32)]
)
def test_a_compiled_step_is_the_eager_one(config, method, bits):
    """Loss and every weight's gradient, in 20 steps, each from the same weights.

    A rounding that turns one ReLU over changes gradients in float32 by up to 1e-2, eager's against
    float64's too. So that network is compared in float64, and in float32 a smooth one.
    """
    cfg = config(f"digits/{method}", "optimizer.batch_size=16", *HEADS[method])
    made = [fresh_method(cfg) for _ in range(2)]
    model, twin = map(smooth, made) if bits == 32 else (each.double() for each in made)
    train, _ = load_data(cfg.data)
    of_bits = PretrainData if bits == 32 else Doubles
    data = of_bits(train, None, device_views(cfg), 16, 0, stacked=method == "emp")
    watch, beside = Compiled("default"), Beside(twin)
    trainer = pl.Trainer(
        max_epochs=1,
        limit_train_batches=20,
        precision=f"{bits}-true",
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watch, beside],
    )
    trainer.fit(model, datamodule=data)
    assert watch.forwards
    assert len(beside.errors) == 20
    assert 0 < max(map(max, beside.errors)) < (1e-4 if bits == 32 else 1e-9)


@pytest.mark.slow
def test_a_compiled_run_cut_short_ends_as_if_it_never_was(tmp_path, monkeypatch):
    class Cut(Exception):
        pass

    def cut(trainer):
        raise Cut

    settings = ["performance.compile=default", "auto_resume.enabled=True"]
    whole = pretrain(tmp_path / "whole", *settings)
    with monkeypatch.context() as patch:
        at_step(patch, 7, cut)
        with pytest.raises(Cut):
            pretrain(tmp_path / "cut", *settings)
    assert_same(pretrain(tmp_path / "cut", *settings), whole)

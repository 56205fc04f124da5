"""The gauges of a run's projections: their numbers, the hook, and the word on a collapse."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from emp_plugin.training import run as training_run
from emp_plugin.training.gauge import CollapseGauge, effective_rank, gauges, spread
from support import runs
from support.runs import TINY_EMP, the_run

SETTINGS = [
    "optimizer.batch_size=8",
    "data.fraction=0.045",
    "data.holdout=0.02",
    "max_epochs=1",
    "evaluation.enabled=False",
    "limit_val_batches=0",
]
EMP = [*TINY_EMP, "data.patch_size=8", "data.output_size=8"]
SMALL = [
    "method_kwargs.proj_hidden_dim=16",
    "method_kwargs.proj_output_dim=8",
    "augmentations=[{crop_size: 8, num_crops: 2, patch_size: 8}]",
]


def projections(views, b, d, seed=0):
    """Of unequal length, around a direction that all share."""
    z = torch.randn(views, b, d, dtype=torch.float64, generator=torch.manual_seed(seed))
    return (z + 3) * torch.linspace(0.5, 2, b, dtype=torch.float64)[:, None]


def reference(z):
    """Rank and spread of projections (views, b, d), from eigenvalues and plain loops."""
    z = z / np.sqrt((z * z).sum(-1, keepdims=True))
    mean = z.mean(0)
    eigenvalues = np.linalg.eigvalsh(np.cov(mean, rowvar=False))
    first = z[0]
    deviations = [np.sqrt(((c - c.mean()) ** 2).mean()) for c in first.T]
    rank = eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
    return rank, np.mean(deviations) * np.sqrt(z.shape[-1])


@pytest.mark.parametrize("shape", [(4, 12, 5), (4, 5, 12), (1, 6, 6)])
def test_gauges_are_their_formulas(shape):
    z = projections(*shape)
    assert gauges(z).tolist() == pytest.approx(reference(z.numpy()), rel=1e-10)
    assert gauges(z.float()).tolist() == pytest.approx(reference(z.numpy()), rel=1e-4)


def test_gauges_at_their_ends():
    even = torch.nn.functional.normalize(torch.randn(2000, 64), dim=1)
    assert spread(even) == pytest.approx(1, abs=0.01)
    assert effective_rank(even) == pytest.approx(64, rel=0.05)
    one = even[:1].expand(50, -1)
    assert spread(one) == pytest.approx(0, abs=1e-6)
    assert effective_rank(torch.ones(50, 4)) == 0
    line = one + torch.linspace(-1, 1, 50)[:, None] * even[1]
    assert effective_rank(line) == pytest.approx(1, abs=1e-4)


def test_rank_does_not_see_what_all_images_share():
    z = torch.randn(50, 16, dtype=torch.float64)
    torch.testing.assert_close(effective_rank(z + 100), effective_rank(z))


def test_gauges_are_in_float32_under_autocast():
    z = projections(2, 8, 4).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gauges(z), gauges(z.float()))
    assert gauges(z.bfloat16()).dtype == torch.float32


class Watched(CollapseGauge):
    """Keeps what the loss saw, to be compared with what was logged."""

    kept = []

    def on_before_backward(self, trainer, module, loss):
        rows = torch.cat(self.outputs)
        Watched.kept.append(rows.unflatten(0, (-1, self.images)))
        super().on_before_backward(trainer, module, loss)


METHODS = {
    "emp": (EMP, 2),
    "chunks": ([*EMP, "method_kwargs.patch_chunk=1"], 2),
    "byol": ([*SMALL, "method_kwargs.pred_hidden_dim=16"], 2),
    "ressl": ([*SMALL, "method_kwargs.queue_size=16"], None),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_step_s_projections_are_those_of_its_forward_pass(tmp_path, monkeypatch, name):
    settings, views = METHODS[name]
    Watched.kept = []
    monkeypatch.setattr(training_run, "CollapseGauge", Watched)
    recipe = f"digits/{'emp' if name == 'chunks' else name}"
    assert runs.pretrain(tmp_path, *SETTINGS, *settings, recipe=recipe) == 0
    run = the_run(tmp_path)
    shapes = {tuple(z.shape) for z in Watched.kept}
    assert shapes == {(views, 8, 8)} if views else {z[1:] for z in shapes} == {(8, 8)}
    metrics = pd.read_csv(run / "metrics.csv")
    expected = [reference(z.double().numpy()) for z in Watched.kept]
    columns = metrics[["train_rank", "train_std"]].dropna().values
    np.testing.assert_allclose(columns, expected, rtol=1e-4)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["collapsed"] is False


@pytest.mark.parametrize("name", ["chunks", "byol"])
def test_training_is_the_same_without_the_gauge(tmp_path, monkeypatch, name):
    class Blind(CollapseGauge):
        def on_train_start(self, *_):
            pass

    settings = METHODS[name][0]
    recipe = f"digits/{'emp' if name == 'chunks' else name}"
    assert runs.pretrain(tmp_path / "with", *SETTINGS, *settings, recipe=recipe) == 0
    monkeypatch.setattr(training_run, "CollapseGauge", Blind)
    assert runs.pretrain(tmp_path / "without", *SETTINGS, *settings, recipe=recipe) == 0
    folders = the_run(tmp_path / "with"), the_run(tmp_path / "without")
    metrics, blind = (pd.read_csv(folder / "metrics.csv") for folder in folders)
    assert "train_rank" not in blind
    pd.testing.assert_frame_equal(metrics[blind.columns], blind)
    ours, theirs = (
        torch.load(folder / "last.ckpt", weights_only=True)["state_dict"] for folder in folders
    )
    for key in theirs:
        assert torch.equal(ours[key], theirs[key]), key


class Steps:
    """Drives the callback with projections made by hand, as a Trainer would."""

    def __init__(self, gauge, log_every_n_steps=1):
        self.gauge = gauge
        self.trainer = SimpleNamespace(
            global_step=0,
            is_global_zero=True,
            log_every_n_steps=log_every_n_steps,
            fast_dev_run=False,
        )
        self.module = nn.Module()
        self.module.projector = nn.Identity()
        self.module.log_dict = lambda values: None
        gauge.on_train_start(self.trainer, self.module)

    def make(self, *views):
        images = len(views[0])
        self.gauge.on_train_batch_start(self.trainer, self.module, [torch.arange(images)], 0)
        for view in views:
            self.module.projector(view)
        self.gauge.on_before_backward(self.trainer, self.module, None)
        self.module.projector(views[0])  # again, as EMP's chunks in the backward pass
        assert self.gauge.outputs is None
        self.trainer.global_step += 1
        self.gauge.on_train_batch_end(self.trainer, self.module, None, None, 0)


def healthy():
    return torch.randn(16, 8)


def collapsed():
    return torch.ones(16, 8) + 1e-3 * torch.randn(16, 8)


def test_a_collapse_is_said_once_and_late_by_a_step(capsys):
    steps = Steps(gauge := CollapseGauge())
    for _ in range(5):
        steps.make(healthy(), healthy())
    for _ in range(gauge.PATIENCE):
        steps.make(collapsed(), collapsed())
        assert capsys.readouterr().err == ""
    for _ in range(2 * gauge.PATIENCE):
        steps.make(collapsed(), collapsed())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: the projections have collapsed at step {5 + gauge.PATIENCE}")
    assert "optimizer.lr" in line
    assert gauge.collapsed_at == 5 + gauge.PATIENCE


def test_it_looks_at_every_fifth_step_and_at_those_that_are_logged():
    steps, logged, looked = Steps(gauge := CollapseGauge(), log_every_n_steps=7), [], []
    steps.module.log_dict = lambda values: logged.append(steps.trainer.global_step + 1)
    for step in range(1, 22):
        steps.make(healthy())
        looked += [step] if gauge.values is not None else []
    assert logged == [7, 14, 21]
    assert looked == [5, 7, 10, 14, 15, 20, 21]
    steps = Steps(gauge := CollapseGauge(), log_every_n_steps=0)
    for _ in range(gauge.PATIENCE + 1):
        steps.make(collapsed())
    assert gauge.collapsed_at == gauge.PATIENCE


def test_a_short_dip_is_no_collapse(capsys):
    steps = Steps(gauge := CollapseGauge())
    for _ in range(3):
        for _ in range(gauge.PATIENCE - 1):
            steps.make(collapsed())
        steps.make(healthy())
    gauge.on_train_end(steps.trainer, steps.module)
    assert capsys.readouterr().err == ""
    assert gauge.collapsed_at is None


def test_one_line_of_projections_is_a_collapse(capsys):
    """They are spread out, but along a single direction."""
    steps = Steps(gauge := CollapseGauge())
    for _ in range(gauge.PATIENCE + 1):
        signs = torch.randn(16).sign()[:, None]
        steps.make(signs * torch.ones(16, 8) + 1e-3 * torch.randn(16, 8))
    assert gauge.collapsed_at == gauge.PATIENCE


def test_a_resumed_run_goes_on_counting_and_says_nothing_twice(capsys):
    steps = Steps(gauge := CollapseGauge())
    for _ in range(gauge.PATIENCE - 1):
        steps.make(collapsed())
    state, gauge = gauge.state_dict(), CollapseGauge()
    low = gauge.PATIENCE - 1
    assert state == {"collapsed_at": None, "low_steps": low, "looked_at": low}
    gauge.load_state_dict(state)
    steps = Steps(gauge)
    steps.trainer.global_step = low
    steps.make(collapsed())
    gauge.on_train_end(steps.trainer, steps.module)
    assert gauge.collapsed_at == gauge.PATIENCE
    capsys.readouterr()
    again = CollapseGauge()
    again.load_state_dict(gauge.state_dict())
    steps = Steps(again)
    for _ in range(2 * gauge.PATIENCE):
        steps.make(collapsed())
    assert capsys.readouterr().err == ""


def test_a_method_without_a_projector_is_left_out():
    steps = Steps(CollapseGauge())
    steps.module = nn.Module()
    steps.gauge = CollapseGauge()
    steps.gauge.on_train_start(steps.trainer, steps.module)
    steps.gauge.on_train_batch_start(steps.trainer, steps.module, [torch.arange(4)], 0)
    steps.gauge.on_before_backward(steps.trainer, steps.module, None)
    steps.gauge.on_train_batch_end(steps.trainer, steps.module, None, None, 0)
    assert steps.gauge.state_dict() == {
        "collapsed_at": None,
        "low_steps": 0,
        "looked_at": 0,
    }


def test_a_projector_that_is_not_called_is_left_out():
    steps = Steps(gauge := CollapseGauge())
    steps.make(healthy())
    steps.gauge.on_train_batch_start(steps.trainer, steps.module, [torch.arange(16)], 1)
    steps.gauge.on_before_backward(steps.trainer, steps.module, None)
    steps.gauge.on_train_batch_end(steps.trainer, steps.module, None, None, 1)
    assert gauge.pending is None


def test_the_hook_goes_with_the_training():
    steps = Steps(gauge := CollapseGauge())
    gauge.teardown(steps.trainer, steps.module, "fit")
    gauge.on_train_batch_start(steps.trainer, steps.module, [torch.arange(16)], 0)
    steps.module.projector(healthy())
    assert gauge.outputs == []


def test_a_collapsed_run_is_marked(tmp_path, monkeypatch, capsys):
    """With thresholds that any run falls below."""
    monkeypatch.setattr(CollapseGauge, "PATIENCE", 2)
    monkeypatch.setattr(CollapseGauge, "MIN_STD", 2.0)
    assert runs.pretrain(tmp_path, *SETTINGS, *EMP) == 0
    assert capsys.readouterr().err.count("the projections have collapsed at step 2") == 1
    assert json.loads((the_run(tmp_path) / "summary.json").read_text())["collapsed"] is True

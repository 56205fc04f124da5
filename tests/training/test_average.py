"""The average of a run's weights against one in float64, and after a resume."""

import pytest
import torch
from omegaconf import OmegaConf

from emp_plugin.training.average import TRAINED
from emp_plugin.training.callbacks import CONFIG_KEY
from emp_plugin.training.probing import fresh_method, load_method
from support.runs import TINY_EMP, at_step, pretrain, the_run

SETTINGS = [
    *TINY_EMP,
    "method_kwargs.ema_decay=0.4",
    "optimizer.batch_size=16",
    "optimizer.lr=0.1",
    "limit_train_batches=6",
    "limit_val_batches=0",
    "max_epochs=1",
    "data.patch_size=8",
    "data.output_size=8",
    "checkpoint.every_n_steps=1",
    "checkpoint.min_seconds=0",
    "checkpoint.keep_every_n_steps=1",
    "auto_resume.enabled=True",
    "evaluation.views=[whole]",
    "evaluation.probes=[knn]",
]


def checkpoint(folder, name):
    return torch.load(the_run(folder) / name, weights_only=True)


def of(state, name):
    """The tensor with that end of its name: versions differ in the beginning."""
    return next(value for key, value in state.items() if key.endswith(name))


def test_a_run_ends_with_the_average_and_resumes_with_it(tmp_path, monkeypatch):
    class Cut(Exception):
        pass

    def cut(trainer):
        raise Cut

    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert pretrain(whole, *SETTINGS) == 0
    with monkeypatch.context() as patch:
        at_step(patch, 4, cut)
        with pytest.raises(Cut):
            pretrain(halves, *SETTINGS)
    assert pretrain(halves, *SETTINGS) == 0

    last = checkpoint(whole, "last.ckpt")
    assert last["global_step"] == 6
    ours, theirs = last["state_dict"], checkpoint(halves, "last.ckpt")["state_dict"]
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    cfg = last[CONFIG_KEY]
    model, *_ = load_method(the_run(whole) / "last.ckpt")
    for name in ("layer1.0.conv1.weight", "layer1.0.bn1.running_mean"):
        average = of(fresh_method(OmegaConf.create(cfg)).state_dict(), name).double()
        for step in range(1, 7):
            file = f"step={step}.ckpt" if step < 6 else "last.ckpt"
            keep = min(0.4, (1 + step) / (10 + step))
            now = of(checkpoint(whole, file)[TRAINED], name).double()
            average = keep * average + (1 - keep) * now
        torch.testing.assert_close(of(ours, name).double(), average, rtol=1e-5, atol=1e-7)
        assert torch.equal(of(model.state_dict(), name), of(ours, name))
        assert not torch.equal(of(ours, name), of(last[TRAINED], name))

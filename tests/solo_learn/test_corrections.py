"""SwAV's epochs and the momentum's tau move with the optimiser's steps, SwAV's queue waits.

Schedules and LARS have files of their own.
"""

import math

import pytest
import torch

from emp_plugin.solo_learn import build_method, pl


class Watch(pl.Callback):
    """Notes, after every step, SwAV's prototypes, or tau as it stands for the next step."""

    def __init__(self):
        self.prototypes, self.taus, self.forwards = [], [], []

    def on_train_start(self, trainer, module):
        if hasattr(module, "prototypes"):
            self.calls = 0
            module.prototypes.register_forward_hook(self.count)

    def count(self, *_):
        self.calls += 1

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if hasattr(module, "prototypes"):
            self.calls = 0
            self.prototypes.append(module.prototypes.weight_v.detach().clone())
        else:
            self.taus.append(module.momentum_updater.cur_tau)

    def on_train_batch_end(self, *args):
        if self.prototypes:
            self.forwards.append(self.calls)


def watched(tools, method, length=24, **trainer):
    watch = Watch()
    trainer = tools.make_trainer(limit_val_batches=0, callbacks=[watch], **trainer)
    trainer.fit(method, tools.loader(length, True))
    return watch


def test_swav_in_one_epoch(tools):
    """6 steps: frozen in the first half, with the queue from the fifth step on."""
    cfg = tools.make_config(
        "swav",
        method_kwargs__freeze_prototypes_epochs=0.5,
        method_kwargs__epoch_queue_starts=4 / 6,
        scheduler__warmup_epochs=0,
    )
    watch = watched(tools, build_method(cfg))
    moved = [not torch.equal(a, b) for a, b in zip(watch.prototypes, watch.prototypes[1:])]
    assert moved == [False, False, False, True, True]
    assert watch.forwards == [2, 2, 2, 2, 4, 4]  # two views; then also the queue of each


def test_swavs_queue_waits_until_it_is_full(tools):
    """8 images in batches of 4: by its setting it would begin at once, with zeros for images."""
    method = build_method(tools.make_config("swav", method_kwargs__epoch_queue_starts=0))
    watch = watched(tools, method)
    assert watch.forwards == [2, 2, 4, 4, 4, 4]


@pytest.mark.parametrize(("epochs", "moved"), [(1, [False, True]), (2, [False, False])])
def test_swavs_whole_epochs_are_solo_learns(tools, epochs, moved):
    cfg = tools.make_config(
        "swav",
        max_epochs=3,
        method_kwargs__freeze_prototypes_epochs=epochs,
        scheduler__warmup_epochs=0,
    )
    watch = watched(tools, build_method(cfg), length=4, max_epochs=3)
    assert [not torch.equal(a, b) for a, b in zip(watch.prototypes, watch.prototypes[1:])] == moved


def test_prototypes_keep_length_one(tools):
    cfg = tools.make_config("swav", method_kwargs__freeze_prototypes_epochs=0, optimizer__lr=4.0)
    method = build_method(cfg)
    before = method.prototypes.weight_v.detach().clone()
    watched(tools, method)
    z = torch.eye(method.proj_output_dim)
    assert not torch.equal(before, method.prototypes.weight_v)
    torch.testing.assert_close(method.prototypes(z).norm(dim=0), torch.ones(6))


@pytest.mark.parametrize(("limit", "epochs", "steps"), [(1.0, 1, 6), (2, 1, 2), (3, 2, 6)])
def test_tau_spans_the_steps_of_the_run(tools, limit, epochs, steps):
    method = build_method(tools.make_config("byol", max_epochs=epochs))
    watch = watched(tools, method, max_epochs=epochs, limit_train_batches=limit)
    expected = [1 - 0.1 * (math.cos(math.pi * step / steps) + 1) / 2 for step in range(steps)]
    assert watch.taus == pytest.approx(expected)

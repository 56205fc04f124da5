"""SwAV's epochs and the momentum's tau move with the optimiser's steps, SwAV's queue waits.

What takes fewer calls, or no wait for a GPU, has the bits of solo-learn's on a CPU. Its own classes
are not corrected.

Schedules and LARS have files of their own.
"""

import inspect
import math
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from solo.losses import vicreg
from solo.utils import metrics, momentum
from torch import nn

from emp_plugin.solo_learn import API, METHODS, build_method, corrected, corrections, pl
from support import ROOT, run_python


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


def test_covariances_without_a_mask_have_the_same_bits():
    made = []
    for losses in (corrections, vicreg):
        z = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
        loss = losses.covariance_loss(*z)
        loss.backward()
        made.append((loss.detach(), z.grad))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*made))


def test_a_teacher_updated_at_once_has_the_same_bits():
    ended = []
    for at_once in (True, False):
        torch.manual_seed(0)
        online, teacher = (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)) for _ in range(2))
        updater = momentum.MomentumUpdater(0.9, 1.0)
        for step in range(3):
            if at_once:
                corrections.follow(online, teacher, updater.cur_tau)
            else:
                updater.update(online, teacher)
            updater.update_tau(step, 3)
        ended.append(list(teacher.parameters()))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*ended))


def test_ressls_queue_moves_as_before():
    ended = []
    for cls in (corrected(METHODS["ressl"]), METHODS["ressl"]):
        method = SimpleNamespace(
            queue=torch.zeros(8, 3), queue_ptr=torch.zeros(1, dtype=torch.long), queue_size=8
        )
        for step in range(1, 6):  # past the end
            cls.dequeue_and_enqueue(method, torch.full((2, 3), float(step)))
        ended.append((method.queue, method.queue_ptr))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*ended))
    assert ended[0][1] == 2


def test_accuracies_from_one_sum_have_the_same_bits(untouched):
    logits, targets = torch.randn(48, 10), torch.randint(-1, 10, (48,))
    ours, theirs = (
        module.accuracy_at_k(logits, targets, (1, 3, 5)) for module in (metrics, untouched.metrics)
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_the_corrected_class_of_a_method():
    for name, cls in METHODS.items():
        if name in ("emp", "base", "linear"):
            continue
        ours = corrected(cls)
        assert issubclass(ours, cls)
        assert issubclass(ours, corrections.CorrectedMomentum) == hasattr(cls, "momentum_pairs")
        assert (ours.__name__, ours) == (cls.__name__, corrected(cls))
        assert corrected(ours) is ours
        assert pickle.loads(pickle.dumps(ours)) is ours
    assert corrected(METHODS["emp"]) is METHODS["emp"]


def test_a_method_can_be_handed_to_another_process(tools, tmp_path):
    """As Lightning hands it to processes that it spawns: none has made this class before."""
    method = build_method(tools.make_config("byol"))
    (tmp_path / "byol").write_bytes(pickle.dumps(method))
    code = "import pickle, sys; print(*type(pickle.load(open(sys.argv[1], 'rb'))).corrections)"
    done = run_python(code, tmp_path / "byol")
    assert done.stdout.split() == ["lars", "rates", "tau"]


def test_a_method_of_ones_own_keeps_what_it_overrides(tools, monkeypatch):
    class Mine(METHODS["ressl"]):
        def on_train_batch_end(self, *args):
            seen.append(self.trainer.global_step)
            super().on_train_batch_end(*args)

        def dequeue_and_enqueue(self, keys):
            seen.append("keys")
            super().dequeue_and_enqueue(keys)

    seen = []
    monkeypatch.setitem(METHODS, "mine", Mine)
    method = build_method(replace(tools.make_config("ressl"), method="mine"))
    before = method.momentum_projector[0].weight.clone()
    watch = watched(tools, method, length=8)
    assert seen == ["keys", 1, "keys", 2]
    assert watch.taus == pytest.approx([0.9, 0.95])
    assert not torch.equal(before, method.momentum_projector[0].weight)


def changed_functions():
    """Functions of this project that stand in solo-learn's modules and classes."""
    for path, module in list(sys.modules.items()):
        if path.split(".")[0] != "solo":
            continue
        classes = [cls for cls in vars(module).values() if getattr(cls, "__module__", "") == path]
        for owner in (module, *filter(inspect.isclass, classes)):
            for name, value in vars(owner).items():
                function = inspect.unwrap(getattr(value, "fget", getattr(value, "__func__", value)))
                code = getattr(function, "__code__", None)
                if code and Path(code.co_filename).is_relative_to(ROOT / "emp_plugin"):
                    yield f"{path}.{'' if owner is module else owner.__name__ + '.'}{name}"


def test_solo_learns_own_classes_are_repaired_alone():
    expected = {f"solo.{of}.accuracy_at_k" for of in ("utils.metrics", "methods.base")}
    expected.add("solo.methods.linear.accuracy_at_k")
    if API == "1.0.2":
        hooks = [f"on_validation_{when}" for when in ("epoch_start", "batch_end", "epoch_end")]
        expected |= {f"solo.methods.linear.LinearModel.{hook}" for hook in hooks}
        own = [*hooks, "configure_optimizers"]  # which warns of LARS
        expected |= {f"solo.methods.base.BaseMethod.{name}" for name in own}
        expected.add("solo.methods.dino.DINO.clip_gradients")
    assert set(changed_functions()) == expected

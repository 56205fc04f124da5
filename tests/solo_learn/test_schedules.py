import math
from types import SimpleNamespace

import pytest
import torch

from emp_plugin.solo_learn import API, BaseMethod, build_method, corrections, installed, pl
from emp_plugin.solo_learn.schedules import per_step, steps_of, warmup_cosine

only_1_0_2 = pytest.mark.skipif(API != "1.0.2", reason="about solo-learn 1.0.2")
only_1_0_6 = pytest.mark.skipif(
    API != "1.0.6", reason="about solo-learn 1.0.6: SOLO_LEARN=<checkout> bash scripts/test.sh"
)
corrected_or_not = pytest.mark.parametrize(
    "corrected", [True, pytest.param(False, marks=only_1_0_6)]
)


def sgd(*lrs, **extra):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr, **extra} for lr in lrs]
    return torch.optim.SGD(groups)


def rates(scheduler, steps):
    seen = []
    for _ in range(steps):
        seen.append(scheduler.get_last_lr())
        scheduler.optimizer.step()
        scheduler.step()
    return seen


def test_cosine_equals_torchs():
    ours = rates(per_step(sgd(0.3), "cosine", total=7, epoch=7, min_lr=0.01), 8)
    theirs = rates(torch.optim.lr_scheduler.CosineAnnealingLR(sgd(0.3), 7, eta_min=0.01), 8)
    assert torch.tensor(ours).allclose(torch.tensor(theirs))


def test_step_equals_torchs_with_milestones_in_epochs():
    ours = rates(per_step(sgd(0.3), "step", total=12, epoch=3, lr_decay_steps=[1, 3]), 12)
    theirs = rates(torch.optim.lr_scheduler.MultiStepLR(sgd(0.3), [3, 9]), 12)
    assert torch.tensor(ours).allclose(torch.tensor(theirs))
    with pytest.raises(ValueError, match="lr_decay_steps"):
        per_step(sgd(0.3), "step", total=12, epoch=3)


def test_warmup_cosine_in_closed_form():
    scheduler = per_step(
        sgd(0.3, 0.1),
        "warmup_cosine",
        total=10,
        epoch=8,
        warmup_epochs=0.5,
        warmup_start_lr=0.02,
        min_lr=0.001,
    )
    for step, pair in enumerate(rates(scheduler, 11)):
        for peak, lr in zip((0.3, 0.1), pair):
            line = 0.02 + (peak - 0.02) * step / 4
            curve = 0.001 + (peak - 0.001) * 0.5 * (1 + math.cos(math.pi * (step - 4) / 6))
            assert lr == pytest.approx(line if step < 4 else curve)


def test_no_warmup_starts_at_the_rate_and_a_long_one_warns():
    assert warmup_cosine(0, 0.3, warmup=0, total=5, start=0.01) == 0.3
    with pytest.warns(UserWarning, match="warm-up"):
        scheduler = per_step(sgd(0.3), "warmup_cosine", total=4, epoch=4, warmup_epochs=10)
    assert rates(scheduler, 4)[-1][0] == pytest.approx(0.3 * 3 / 40)


def test_static_groups_keep_their_rate():
    assert rates(per_step(sgd(0.3, static_lr=True), "cosine", total=4, epoch=4), 5) == [[0.3]] * 5


def test_scheduler_resumes_from_its_state():
    def make():
        return per_step(sgd(0.3), "warmup_cosine", total=10, epoch=5, warmup_epochs=1)

    whole, first, second = make(), make(), make()
    expected = rates(whole, 10)
    rates(first, 4)
    second.load_state_dict(first.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    assert rates(second, 6) == expected[4:]


@only_1_0_2
def test_stand_in_for_pl_bolts():
    scheduler = installed.LinearWarmupCosineAnnealingLR(
        sgd(0.3), 2, 6, warmup_start_lr=0.1, eta_min=0.02
    )
    assert [lr for (lr,) in rates(scheduler, 7)] == pytest.approx(
        [warmup_cosine(epoch, 0.3, 2, 6, 0.1, 0.02) for epoch in range(7)]
    )


def rates_of_a_run(tools, monkeypatch, corrected=True, name="simclr", **overrides):
    """Learning rates of every parameter group in each of 4 steps; or solo-learn's own."""
    seen = []

    class Recorder(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    method = build_method(tools.make_config(name, optimizer__batch_size=256, **overrides))
    if not corrected:
        own = BaseMethod.configure_optimizers.__get__(method)
        monkeypatch.setattr(method, "configure_optimizers", own)
    trainer = tools.make_trainer(callbacks=[Recorder()], limit_val_batches=0)
    trainer.fit(method, tools.loader(16, True))
    return seen


@pytest.mark.parametrize("name", ["simclr", "emp"])
def test_rates_of_a_run_of_one_epoch(tools, monkeypatch, name):
    seen = rates_of_a_run(tools, monkeypatch, name=name, scheduler__warmup_start_lr=0.01)
    assert [group[0] for group in seen] == pytest.approx(
        [warmup_cosine(step, 0.4, 2, 4, 0.01) for step in range(4)]
    )


@only_1_0_2
def test_solo_learns_rates_of_a_run_of_one_epoch(tools, monkeypatch):
    """The learning rate is the start of the warm-up in every step."""
    seen = rates_of_a_run(tools, monkeypatch, False, scheduler__warmup_start_lr=0.01)
    assert [group[0] for group in seen] == pytest.approx([0.01] * 4)


@corrected_or_not
def test_the_classifier_has_a_rate_of_its_own(tools, corrected, monkeypatch):
    """Without a warm-up 1.0.6 itself gives the backbone's rate to all."""
    seen = rates_of_a_run(tools, monkeypatch, corrected, scheduler__warmup_epochs=0)
    peak = 0.1 if corrected else 0.4
    assert [group[1] for group in seen] == pytest.approx(
        [warmup_cosine(step, peak, 0, 4) for step in range(4)]
    )


@corrected_or_not
def test_a_warmup_may_end_within_a_step(tools, corrected, monkeypatch):
    """1.5 steps of 4: the rate of 1.0.6 itself goes to twice its value."""
    warmup = {"scheduler__warmup_epochs": 0.375, "scheduler__warmup_start_lr": 0.0}
    seen = rates_of_a_run(tools, monkeypatch, corrected, **warmup)
    expected = [warmup_cosine(step, 0.4, 1.5, 4) for step in range(4)]
    assert ([group[0] for group in seen] == pytest.approx(expected)) == corrected
    assert (max(group[0] for group in seen) > 0.6) != corrected


@pytest.mark.parametrize("marked", [True, pytest.param(False, marks=only_1_0_6)])
@pytest.mark.parametrize("split", [False, pytest.param(True, marks=only_1_0_6)])
def test_static_rates_of_a_run(tools, marked, split, monkeypatch):
    """SimSiam's predictor keeps its rate, also where exclude_bias_n_norm_wd splits its group."""
    if not marked:
        monkeypatch.setattr(corrections, "_mark_static", lambda *_: None)
    seen = rates_of_a_run(
        tools, monkeypatch, name="simsiam", optimizer__exclude_bias_n_norm_wd=split
    )
    static = [column for column in zip(*seen) if max(column) == min(column) == pytest.approx(0.4)]
    assert len(static) == (0 if not marked else 2 if split else 1)


@only_1_0_6
def test_schedules_by_epoch_are_1_0_6s_own(tools):
    method = build_method(tools.make_config("simclr"))
    method.scheduler_interval = "epoch"
    method.trainer = SimpleNamespace()
    made = method.configure_optimizers()[1][0]
    assert made["interval"] == "epoch"
    assert type(made["scheduler"]).__name__ == "LinearWarmupCosineAnnealingLR"


def test_a_run_needs_a_length():
    def trainer(steps, batches, accumulated):
        return SimpleNamespace(
            estimated_stepping_batches=steps,
            num_training_batches=batches,
            accumulate_grad_batches=accumulated,
        )

    with pytest.raises(ValueError, match="max_epochs"):
        steps_of(trainer(math.inf, 4, 1))
    assert steps_of(trainer(6, 5, 2)) == (6, 3)

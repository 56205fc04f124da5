"""Equal epochs, minutes and backbone passes, in steps; nothing is trained."""

import pytest

from emp_plugin.studies.lengths import split_steps, steps_for_passes
from emp_plugin.studies.recipes import views_per_image
from emp_plugin.studies.run import Study
from emp_plugin.studies.settings import read_comparison
from support import SCRIPTS


def study(folder, *overrides):
    items = [f"results_dir={folder}", "optimizer.batch_size=16", *overrides]
    cfg, rest = read_comparison(str(SCRIPTS / "compare"), "digits", items)
    return Study(cfg, SCRIPTS / "pretrain", rest)


@pytest.mark.parametrize("steps", [1, 7, 194.6, 195, 196, 390, 391, 1000, 12345])
def test_split_steps_comes_near(steps):
    epochs, limit = split_steps(steps, 195)
    assert 1 <= limit <= 195
    assert abs(epochs * limit - steps) <= epochs / 2 + 0.5
    assert epochs == 1 or (epochs - 1) * 195 < steps + 1  # no more epochs than it takes


def test_equal_passes(config):
    emp, byol = config("cifar/emp"), config("cifar/byol")
    assert (views_per_image(emp), views_per_image(byol)) == (20, 2)
    steps = steps_for_passes(1, emp, byol, 50_000)
    assert steps * 256 * 2 == pytest.approx(500 * 100 * 20)
    assert steps_for_passes(1, emp, emp, 50_000) == 500


def test_images_are_counted_for_every_value_of_an_ablation(tmp_path):
    of_fractions = study(
        tmp_path,
        "ablate=data.fraction",
        "values=[0.1,0.5]",
        "methods=[emp]",
        "epochs=[0.5]",
        "data.holdout=0",
    )
    steps = [of_fractions.recipes.steps_per_epoch(trial) for trial in of_fractions.trials]
    assert steps == [144 // 16, 719 // 16]  # of 1437 images


def test_all_devices_share_the_batch(tmp_path):
    def steps(devices):
        of_simclr = study(
            tmp_path, "methods=[simclr]", f"devices={devices}", "optimizer.batch_size=8"
        )
        return of_simclr.recipes.steps_per_epoch(of_simclr.trials[0])

    assert steps(2) == steps(1) // 2


@pytest.mark.parametrize(("start", "step"), [(0.0, 6.0), (3.0, 0.05), (3.0, 0.02), (1.0, 0.003)])
def test_a_slow_start_does_not_shorten_equal_minutes(tmp_path, monkeypatch, start, step):
    """The start of training takes ``start`` seconds here, and every step ``step``."""
    of_emp = study(tmp_path, "budget=minutes", "minutes=5", "methods=[emp]")
    checks = []

    def speed_check(trial, steps):
        checks.append(steps)
        return steps / (start + steps * step)

    monkeypatch.setattr(of_emp.lengths, "speed_check", speed_check)
    steps = 300 * of_emp.lengths.steps_per_second(of_emp.trials[0])
    assert start + steps * step == pytest.approx(300, rel=0.12)
    assert len(checks) < 8
    assert start + checks[-1] * step <= 40

"""Equal epochs, minutes and FLOPs, in steps; nothing is trained."""

import pytest

from emp_plugin.studies import lengths
from emp_plugin.studies.lengths import split_steps, steps_for_flops
from emp_plugin.studies.run import Study
from emp_plugin.studies.settings import read_comparison
from support import SCRIPTS


def study(folder, *overrides):
    items = [f"results_dir={folder}", "optimizer.batch_size=16", *overrides]
    cfg, rest = read_comparison("digits", items)
    return Study(cfg, SCRIPTS / "pretrain", rest)


@pytest.mark.parametrize("steps", [1, 7, 194.6, 195, 196, 390, 391, 1000, 12345])
def test_split_steps_comes_near(steps):
    epochs, limit = split_steps(steps, 195)
    assert 1 <= limit <= 195
    assert abs(epochs * limit - steps) <= epochs / 2 + 0.5
    assert epochs == 1 or (epochs - 1) * 195 < steps + 1  # no more epochs than it takes


def test_equal_flops(config, monkeypatch):
    emp, byol = config("cifar/emp"), config("cifar/byol")
    flops = {"emp": 60, "byol": 8}  # of training on one image
    monkeypatch.setattr(lengths, "training_flops", lambda recipe: flops[recipe.method])
    # 500 steps of 100 images, and steps of 256; half a batch that is left over is not trained on
    assert steps_for_flops(1, emp, byol, 50_050) == pytest.approx(500 * 100 * 60 / (256 * 8))
    assert steps_for_flops(0.5, emp, byol, 50_050) == pytest.approx(250 * 100 * 60 / (256 * 8))
    assert steps_for_flops(1, emp, emp, 50_050) == 500


def test_flops_are_counted_of_all_networks(config):
    """BYOL's second network passes forwards alone: SimCLR makes a third more steps, or nearly."""

    def steps(name):
        recipe = config(f"digits/{name}", "optimizer.batch_size=64")
        return steps_for_flops(1, config("digits/emp"), recipe, 1000)

    assert 1.2 < steps("simclr") / steps("byol") < 1.45


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

"""Which trials a study has, and in which order."""

import pytest

from emp_plugin.studies.plan import Trial, describe_length, plan
from emp_plugin.studies.settings import read_comparison


def trials(*overrides):
    return plan(read_comparison("digits", list(overrides))[0])


def test_short_runs_come_first_and_methods_stand_side_by_side():
    planned = trials("methods=[emp,byol]", "seeds=[0,1]", "epochs=[3,1]")
    assert [(trial.length, trial.seed, trial.method) for trial in planned] == [
        (length, seed, method) for length in (1, 3) for seed in (0, 1) for method in ("emp", "byol")
    ]


def test_a_long_schedule_comes_before_the_fitted_ones():
    assert trials("methods=[emp]", "epochs=[1,10]", "schedule=[fitted,snapshot]") == [
        Trial("emp", 0, "snapshot", "epochs", 10, (1, 10)),
        Trial("emp", 0, "fitted", "epochs", 1, (1,)),
        Trial("emp", 0, "fitted", "epochs", 10, (10,)),
    ]


def test_an_ablation_has_a_trial_for_each_value():
    planned = trials(
        "methods=[emp]",
        "ablate=data.num_patches",
        "values=[2,5]",
        "budget=[epochs,minutes]",
        "minutes=2",
        "epochs=1",
    )
    assert [(trial.budget, trial.length, trial.override) for trial in planned] == [
        (budget, length, (f"data.num_patches={n}",))
        for budget, length in (("epochs", 1), ("minutes", 2))
        for n in (2, 5)
    ]
    assert str(planned[1]) == "emp, data.num_patches=5, seed 0, 1 epoch, schedule fitted"


@pytest.mark.parametrize(
    ("budget", "length", "text"),
    [
        ("epochs", 1, "1 epoch"),
        ("epochs", 0.5, "0.5 epochs"),
        ("minutes", 5, "5 minutes of training"),
        ("flops", 1, "1 epoch of EMP-SSL in FLOPs"),
    ],
)
def test_lengths_in_words(budget, length, text):
    assert describe_length(budget, length) == text

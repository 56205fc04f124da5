"""A step has few calls beside its network's and none that waits; see benchmarks/launches.py."""

import pytest

from emp_plugin.config import augmentations, read_config
from launches import MOST, RECIPES, VIEWS, count
from support import SCRIPTS


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_has_few_calls_and_none_that_waits(recipe):
    counts = count(recipe)
    made = augmentations(read_config(str(SCRIPTS / "pretrain"), f"cifar/{recipe}", []))
    assert counts.calls["views"] <= VIEWS * len(made)
    assert counts.others <= MOST[recipe] * counts.network
    assert counts.calls["optimiser"] <= 30
    assert counts.calls["momentum update"] <= 10
    assert not counts.waits

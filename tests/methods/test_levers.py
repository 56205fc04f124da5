"""Settings of EMP beyond the paper, each off unless it is set."""

import pytest
import torch

from emp_plugin.methods import EMPSettings
from emp_plugin.solo_learn import backbone_of
from emp_plugin.training.probing import fresh_method
from support.runs import TINY_EMP


@pytest.fixture
def method(config):
    """Builds a small EMP for digits, which logs nothing."""

    def build(*overrides):
        model = fresh_method(config("digits/emp", *TINY_EMP, *overrides))
        model.log_dict = lambda values, **_: None
        return model

    return build


def a_step(model, patches):
    return model.training_step([torch.arange(4), patches, torch.tensor([0, 1, 2, 3])], 0)


@pytest.mark.parametrize(
    "wrong",
    [{"bn_momentum": 0.0}, {"bn_momentum": 1.5}, {"bn_momentum": "fast"}],
)
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ValueError, match=f"method_kwargs.{next(iter(wrong))}"):
        EMPSettings(**wrong)


def test_with_a_momentum_of_1_statistics_are_those_of_the_last_batch(method):
    model, seen = method("method_kwargs.bn_momentum=1.0").train(), []
    backbone_of(model).bn1.register_forward_hook(lambda norm, x, y: seen.append(x[0]))
    for _ in range(2):
        a_step(model, torch.randn(2, 4, 3, 16, 16))
    last = seen[-1].mean((0, 2, 3))
    torch.testing.assert_close(backbone_of(model).bn1.running_mean, last)
    assert {norm.momentum for norm in (model.embedder[1], model.projector[1])} == {1.0}

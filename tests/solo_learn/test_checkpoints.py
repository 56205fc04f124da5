"""Checkpoints that both versions, and the programs of solo-learn 1.0.6, can read."""

import pytest
import torch

from emp_plugin.errors import UserError
from emp_plugin.solo_learn import API, backbone_of, build_method, checkpoints


@pytest.fixture
def saved(tools, tmp_path):
    """A method after one step, and its checkpoint."""
    method = build_method(tools.make_config("byol"))
    trainer = tools.make_trainer(limit_val_batches=0, limit_train_batches=1)
    trainer.fit(method, tools.loader(4, True))
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    return method, tmp_path / "a.ckpt"


def names(state):
    return {key.partition(".")[0] for key in state}


def test_the_backbone_is_called_as_in_1_0_6(saved):
    """Its main_linear.py takes what is called backbone: all that a ResNet has, and nothing else."""
    method, path = saved
    state = torch.load(path, weights_only=True)["state_dict"]
    assert names(state) >= {"backbone", "momentum_backbone"}
    assert not [key for key in state if "encoder" in key]
    parts = {key.removeprefix("backbone.") for key in state if key.startswith("backbone.")}
    assert parts == set(backbone_of(method).state_dict())


@pytest.mark.parametrize("style", ["1.0.2", "1.0.6"])
def test_either_name_is_read(tools, saved, style):
    method, path = saved
    state = torch.load(path, weights_only=True)["state_dict"]
    if style == "1.0.2":
        state = checkpoints._rename(state, checkpoints.NAMES_OF_1_0_2)
        assert names(state) >= {"encoder", "momentum_encoder"}
    fresh = build_method(tools.make_config("byol"))
    fresh.load_state_dict(state)
    for mine, theirs in zip(fresh.state_dict().values(), method.state_dict().values()):
        assert torch.equal(mine, theirs)


def test_weights_of_another_network_are_still_refused(tools, saved):
    state = torch.load(saved[1], weights_only=True)["state_dict"]
    with pytest.raises(RuntimeError, match="momentum_"):
        build_method(tools.make_config("simclr")).load_state_dict(state)


@pytest.fixture
def fit(tools, saved):
    """Continues the checkpoint for a step; gives the number of steps."""

    def fit():
        trainer = tools.make_trainer(limit_val_batches=0, max_epochs=2)
        trainer.fit(
            build_method(tools.make_config("byol")),
            tools.loader(4, True),
            ckpt_path=saved[1],
            weights_only=True,
        )
        return trainer.global_step

    return fit


def test_a_run_continues_under_its_corrections_alone(tools, saved, fit):
    checkpoint = torch.load(saved[1], weights_only=True)
    assert checkpoint[checkpoints.CORRECTIONS] == ["lars", "rates", "tau"]
    torch.save(checkpoint | {checkpoints.CORRECTIONS: ["lars", "rates"]}, saved[1])
    with pytest.raises(UserError, match=r"\(corrections: lars, rates\).*: lars, rates, tau\)"):
        fit()
    evaluate(tools, saved[1])
    del checkpoint[checkpoints.CORRECTIONS]  # one from before they were named
    torch.save(checkpoint, saved[1])
    assert fit() == 2


def test_a_run_continues_under_its_version_alone(tools, saved, fit):
    assert fit() == 2
    checkpoint = torch.load(saved[1], weights_only=True)
    [former] = [old for old, now in checkpoints.FORMER_NAMES.items() if now == API]
    torch.save(checkpoint | {checkpoints.WRITTEN_BY: former}, saved[1])
    assert fit() == 2  # one from before versions were called by their numbers
    other = "1.0.6" if API == "1.0.2" else "1.0.2"
    torch.save(checkpoint | {checkpoints.WRITTEN_BY: other}, saved[1])
    refusal = f"written under solo-learn {other}.*auto_resume.enabled=False"
    with pytest.raises(UserError, match=refusal):
        fit()
    evaluate(tools, saved[1])


def evaluate(tools, path):
    trainer = tools.make_trainer()  # evaluating it is not continuing it
    trainer.validate(
        build_method(tools.make_config("byol")),
        tools.loader(4, False),
        ckpt_path=path,
        verbose=False,
        weights_only=True,
    )

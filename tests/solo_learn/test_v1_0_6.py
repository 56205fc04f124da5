"""What is particular to solo-learn 1.0.6: its constructors, and what is repaired for it alone."""

import pytest
import torch
from omegaconf import OmegaConf

from emp_plugin.config import to_dict
from emp_plugin.solo_learn import API, METHODS, backbone_of, build_method, pl

pytestmark = pytest.mark.skipif(
    API != "1.0.6", reason="about solo-learn 1.0.6: SOLO_LEARN=<checkout> bash scripts/test.sh"
)


def test_emp_is_built_as_every_method_there_is(tools):
    """As main_pretrain.py does it: add_and_assert_specific_cfg fills in defaults of ``cfg``."""
    cfg = OmegaConf.create(to_dict(tools.make_config("emp")))
    for key in ("knn_eval", "accumulate_grad_batches"):
        del cfg[key]
    cls = METHODS[cfg.method]
    method = cls(cls.add_and_assert_specific_cfg(cfg))
    assert cfg.knn_eval.enabled is False
    assert method.settings.embedding_dim == 32
    assert method.lr == 0.4
    batch = [None, [torch.randn(4, 3, 8, 8)] * 2, torch.arange(4) % 3]
    assert torch.isfinite(method.training_step(batch, 0))


def test_a_missing_setting_is_named(tools):
    cfg = tools.make_config("simclr", method_kwargs={"proj_hidden_dim": 8, "proj_output_dim": 4})
    with pytest.raises(ValueError, match="method_kwargs.temperature is not set; simclr needs it"):
        build_method(cfg)


def test_the_stem_of_1_0_6_itself_is_for_cifar_alone(tools):
    cfg = tools.make_config("simclr", data__dataset="digits")
    theirs = METHODS["simclr"](OmegaConf.create(to_dict(cfg)))
    assert theirs.backbone.conv1.kernel_size == (7, 7)
    assert backbone_of(build_method(cfg)).conv1.kernel_size == (3, 3)


def test_weight_decay_can_spare_biases_and_norms(tools):
    method = build_method(tools.make_config("simclr", optimizer__exclude_bias_n_norm_wd=True))
    assert method.exclude_bias_n_norm_wd


def test_lightning_of_this_version():
    assert pl.__name__ == "lightning.pytorch"

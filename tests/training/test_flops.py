"""Counted arithmetic against that of the layers, worked out by hand."""

import pytest
import torch
from torch import nn

from emp_plugin.solo_learn import backbone_of, build_method
from emp_plugin.training import flops
from emp_plugin.training.flops import flops_of_batches, training_flops


def forward_flops(parts, x):
    """(all, of the first layer): two operations for every weight that an output is made with."""
    counts = []

    def count(layer, inputs, output):
        weights = layer.weight[0].numel()  # of one output
        counts.append(2 * output.numel() * weights)

    layers = [m for part in parts for m in part.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    for part in parts:
        x = part.eval()(x)
    for hook in hooks:
        hook.remove()
    return sum(counts), counts[0]


@pytest.mark.parametrize(("recipe", "patches", "side"), [("emp_native", 20, 16), ("simclr", 2, 32)])
def test_a_resnet18_is_counted_as_its_layers_say(config, recipe, patches, side):
    """Forward once, backward twice, but that images have no gradient."""
    cfg = config(f"cifar/{recipe}")
    method = build_method(cfg)
    parts = [backbone_of(method), *([method.embedder] if recipe == "emp_native" else [])]
    with torch.inference_mode():
        total, first = forward_flops([*parts, method.projector], torch.zeros(1, 3, side, side))
    expected = patches * (3 * total - first)
    assert expected > 1e9
    # the rest is the objective's products, and the online classifier's
    assert training_flops(cfg) == pytest.approx(expected, rel=0.01)


def test_a_teacher_counts_and_what_is_computed_again_does_not(config):
    student = training_flops(config("cifar/simclr"))
    teacher = training_flops(config("cifar/byol"))
    assert 1.25 < teacher / student < 1.4  # its forward pass is a third of forward and backward
    whole = training_flops(config("cifar/emp_native", "data.num_patches=4"))
    chunks = training_flops(
        config("cifar/emp_native", "data.num_patches=4", "method_kwargs.patch_chunk=2")
    )
    assert chunks == whole


def test_counting_leaves_the_random_numbers_alone(config):
    before = torch.get_rng_state()
    training_flops(config("digits/simclr", "seed=11"))
    assert torch.equal(before, torch.get_rng_state())


def test_a_training_counts_the_images_of_all_processes(config, monkeypatch):
    monkeypatch.setattr(flops, "training_flops", lambda cfg: 1000)
    settings = ("optimizer.batch_size=8", "accumulate_grad_batches=3")
    assert flops_of_batches(config("digits/emp", *settings), 5) == 1000 * 5 * 8
    assert flops_of_batches(config("digits/emp", *settings, "devices=2"), 5) == 1000 * 5 * 8 * 2
    every = (*settings, "devices=auto")
    assert flops_of_batches(config("digits/emp", *every), 5) is None
    assert flops_of_batches(config("digits/emp", *every, "accelerator=cpu"), 5) == 1000 * 5 * 8
    monkeypatch.setattr(flops, "training_flops", lambda cfg: None)
    assert flops_of_batches(config("digits/emp"), 5) is None

"""The head by itself, and in a loop of one's own."""

import pytest
import timm
import torch

from emp_plugin.heads import EMPHead
from emp_plugin.losses import EMPSSLLoss, emp_ssl_loss
from emp_plugin.transforms import BatchMultiPatch


def by_hand(head, h, layers):
    """Linear, BatchNorm over the rows and ReLU, for each of the layers; then the last one."""
    weights = iter(head.parameters())
    for _ in range(layers):
        h = h @ next(weights).T + next(weights)
        scale, shift = next(weights), next(weights)
        h = (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt() * scale + shift
        h = h.clamp_min(0)
    z = h @ next(weights).T + next(weights)
    return z / (z * z).sum(1, keepdim=True).sqrt()


@pytest.mark.parametrize(
    ("preset", "hidden", "sizes"), [("code", 2, (4096, 1024)), ("paper", 1, (24, 512))]
)
def test_a_head_is_its_layers(preset, hidden, sizes):
    head = EMPHead(24, preset).double()
    h = torch.randn(7, 24, dtype=torch.float64)
    z = head(h)
    torch.testing.assert_close(z, by_hand(head, h, hidden))
    assert (head.embed(h).shape[1], z.shape[1]) == sizes


def test_projections_have_length_one_in_float32_whatever_the_precision():
    head = EMPHead(16, embedding_dim=8, proj_hidden_dim=8, proj_output_dim=4)
    with torch.autocast("cpu", torch.bfloat16):
        z = head(torch.randn(20, 16))
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.norm(dim=1), torch.ones(20))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "best"}, "preset must be one of code, paper, got 'best'"),
        ({"embedding_dim": -1}, "embedding_dim must be at least 0"),
        ({"proj_hidden_dim": 0}, "proj_hidden_dim must be at least 1"),
        ({"proj_output_dim": 2.5}, "proj_output_dim has the wrong type: 2.5"),
    ],
)
def test_impossible_sizes_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        EMPHead(16, **settings)


def test_a_loop_of_one_s_own_learns():
    """timm's backbone, our patches, head and loss: patches of an image come to agree."""
    backbone = timm.create_model("resnet18", num_classes=0)
    head = EMPHead(backbone.num_features, proj_hidden_dim=64, proj_output_dim=32)
    make_patches = BatchMultiPatch(num_patches=4, patch_size=16, output_size=32)
    loss_of = EMPSSLLoss()
    weights = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(weights, lr=0.003, momentum=0.9)
    patches = make_patches(torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8))
    losses = []
    for _ in range(6):
        h = backbone(patches.flatten(0, 1))
        z = head(h).unflatten(0, patches.shape[:2])
        loss = loss_of(z)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 10
    parts = emp_ssl_loss(z)
    assert loss == parts.loss == -(parts.coding_rate + 200 * parts.invariance)

"""The objective against DESIGN's formula, evaluated independently with numpy in float64."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from emp_plugin.losses import EMPSSLLoss, emp_ssl_loss, patch_invariance, total_coding_rate


def reference(z: np.ndarray, weight: float, eps: float) -> tuple[float, float, float]:
    """(loss, R, D) from eigenvalues and plain loops; shares nothing with the implementation."""
    n, b, d = z.shape
    rate = 0.0
    for patch in z:
        singular = np.linalg.svd(patch, compute_uv=False)
        rate += 0.5 * sum(math.log1p(d / (b * eps) * s * s) for s in singular) / n
    centre = z.mean(0)
    similarity = 0.0
    for i in range(n):
        for j in range(b):
            norms = np.linalg.norm(z[i, j]) * np.linalg.norm(centre[j])
            similarity += float(z[i, j] @ centre[j]) / norms / (n * b)
    return -(rate + weight * similarity), rate, similarity


def projections(n, b, d, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, b, d, generator=generator, dtype=torch.float64)
    return F.normalize(z, dim=-1).to(dtype)


GRID = [(1, 4, 8), (2, 8, 4), (5, 3, 16), (20, 10, 10), (3, 1, 7), (4, 33, 5)]


@pytest.mark.parametrize(("n", "b", "d"), GRID)
@pytest.mark.parametrize("eps", [0.05, 0.2, 2.0])
@pytest.mark.parametrize("weight", [0.0, 200.0])
def test_value_in_float64(n, b, d, eps, weight):
    z = projections(n, b, d)
    got = [x.item() for x in emp_ssl_loss(z, weight, eps)]
    expected = reference(z.numpy(), weight, eps)
    np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-10)
    assert EMPSSLLoss(weight, eps)(z).item() == pytest.approx(expected[0], rel=1e-10, abs=1e-10)


@pytest.mark.parametrize(("n", "b", "d"), GRID)
@pytest.mark.parametrize("eps", [0.05, 0.2])
def test_gradient_by_finite_differences(n, b, d, eps):
    z = projections(n, b, d).requires_grad_()
    emp_ssl_loss(z, 200.0, eps).loss.backward()
    base, rng, h = z.detach().numpy(), np.random.default_rng(0), 1e-6
    for _ in range(6):  # directional derivatives of the independent reference
        direction = rng.standard_normal(z.shape)
        above, *_ = reference(base + h * direction, 200.0, eps)
        below, *_ = reference(base - h * direction, 200.0, eps)
        slope = (z.grad * torch.from_numpy(direction)).sum().item()
        assert slope == pytest.approx((above - below) / (2 * h), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(("n", "b", "d"), GRID)
def test_float32_is_close_to_float64(n, b, d):
    single = emp_ssl_loss(projections(n, b, d, torch.float32)).loss
    double = emp_ssl_loss(projections(n, b, d)).loss
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-4)


def test_known_errors_of_the_field_would_show():
    """R with the opposite sign, with b^2 in place of b, or with eps squared twice is far off."""
    z = projections(4, 8, 16)
    rate = total_coding_rate(z, 0.2).mean().item()
    singular = np.linalg.svd(z.numpy(), compute_uv=False) ** 2
    for wrong in (16 / (8 * 8 * 0.2), 16 / (8 * 0.2**2)):
        assert abs(rate - 0.5 * np.log1p(wrong * singular).sum(-1).mean()) > 0.1
    # minimising the loss must spread images
    spread, collapsed = torch.eye(8).expand(3, 8, 8), torch.ones(3, 8, 8) / math.sqrt(8)
    assert emp_ssl_loss(spread).loss < emp_ssl_loss(collapsed).loss
    # and draw the patches of one image together
    agree, differ = projections(1, 6, 8).expand(4, 6, 8), projections(4, 6, 8)
    assert emp_ssl_loss(agree, 200.0).invariance > emp_ssl_loss(differ, 200.0).invariance
    assert emp_ssl_loss(agree).loss < emp_ssl_loss(differ).loss


@pytest.mark.parametrize(
    ("name", "z"),
    [
        ("all patches equal", torch.ones(5, 4, 8) / math.sqrt(8)),
        ("one image", projections(5, 1, 8, torch.float32)),
        ("one patch", projections(1, 5, 8, torch.float32)),
        ("rank 1", F.normalize(torch.randn(3, 6, 1) * torch.randn(8), dim=-1)),
        ("zeros", torch.zeros(2, 3, 4)),
        ("bfloat16", projections(20, 10, 32, torch.bfloat16)),
        ("opposite patches", torch.stack([torch.ones(3, 4) / 2, -torch.ones(3, 4) / 2])),
        ("wide", projections(2, 4, 4096, torch.float32)),
    ],
)
def test_extreme_inputs_stay_finite(name, z):
    z = z.clone().requires_grad_()
    out = emp_ssl_loss(z)
    out.loss.backward()
    assert all(torch.isfinite(x) for x in out)
    assert torch.isfinite(z.grad).all()
    assert out.coding_rate.dtype == torch.float32


@pytest.mark.parametrize(("b", "d"), [(1, 1024), (2, 8), (100, 512), (512, 128)])
def test_float32_is_used_as_far_as_it_carries(b, d):
    """Parallel rows are the hardest: the rate is 1/2 log(1 + d / eps)."""
    z = projections(1, 1, d).expand(1, b, d)
    within, beyond = d / 0.99e5, d / 1.01e5
    for rows in (z, F.normalize(z + 1e-3 * projections(1, b, d, seed=1), dim=-1)):
        exact = total_coding_rate(rows, within)
        torch.testing.assert_close(
            total_coding_rate(rows.float(), within).double(), exact, rtol=1e-2, atol=0
        )
    expected = torch.tensor([0.5 * math.log1p(d / beyond)], dtype=torch.float64)
    torch.testing.assert_close(total_coding_rate(z, beyond), expected)
    for lower in (z.float(), z.bfloat16()):
        with pytest.raises(ValueError, match="needs d / eps of at most 100000 in float32"):
            total_coding_rate(lower, beyond)


def test_not_a_number_is_not_hidden():
    z = projections(2, 3, 4, torch.float32)
    z[1, 2, 3] = float("nan")
    assert torch.isnan(total_coding_rate(z)[1])
    assert torch.isnan(emp_ssl_loss(z).loss)


def test_autocast_does_not_lower_the_precision():
    z = projections(4, 16, 64, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = emp_ssl_loss(z)
    assert inside.loss == emp_ssl_loss(z).loss
    assert inside.loss.dtype == torch.float32


def test_leading_shapes_and_both_gram_forms():
    z = projections(6, 5, 9)
    folded = total_coding_rate(z.reshape(2, 3, 5, 9))
    torch.testing.assert_close(folded, total_coding_rate(z).reshape(2, 3))
    wide = total_coding_rate(z[0])
    tall = 0.5 * torch.logdet(torch.eye(9, dtype=z.dtype) + 9 / (5 * 0.2) * z[0].T @ z[0])
    torch.testing.assert_close(wide, tall)


@pytest.mark.parametrize(
    "call",
    [
        lambda: total_coding_rate(torch.zeros(3)),
        lambda: total_coding_rate(torch.zeros(0, 3)),
        lambda: total_coding_rate(torch.zeros(2, 3), eps=0),
        lambda: patch_invariance(torch.zeros(2, 3)),
        lambda: patch_invariance(torch.zeros(0, 2, 3)),
    ],
)
def test_impossible_input_is_named(call):
    with pytest.raises(ValueError, match="needs"):
        call()

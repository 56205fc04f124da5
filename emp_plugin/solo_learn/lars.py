"""A step of LARS (arXiv 1708.03888) in a few calls for all weights together.

solo-learn takes one weight after the other and asks for each whether a norm is zero. The host waits
for every answer, and a GPU stands idle. On a CPU the bits here are the same as there.
"""

from typing import Any

import torch
from solo.utils import lars
from torch import Tensor
from torch.optim.sgd import sgd

from emp_plugin.solo_learn import API

LARS = lars.LARS if API == "1.0.6" else lars.LARSWrapper
Weight = tuple[Tensor, Tensor, dict[str, Any]]  # the weight, its gradient, its parameter group


@torch.no_grad()
def step_of_1_0_2(self, closure=None):
    """Of LARSWrapper: scales the gradients in place, and leaves the rest to its SGD's settings.

    As published it scales before it calls the closure in which Lightning computes the gradients. So
    it scales those of the step before (none, after zero_grad) and uses the new ones raw, without
    weight decay.
    """
    loss = _loss_of(closure)
    weights = _with_gradients(self.param_groups)
    scaled = [one for one in weights if one[0].ndim != 1 or not self.exclude_bias_n_norm]
    if scaled:
        params, gradients, groups = map(list, zip(*scaled))
        p_norm, g_norm, decayed = _norms(scaled)
        rates = (self.eta * p_norm) / (g_norm + decayed + self.eps)
        decays = [group["weight_decay"] for group in groups]
        torch._foreach_add_(gradients, torch._foreach_mul(params, decays))
        torch._foreach_mul_(gradients, _trusted(rates, p_norm, g_norm, groups, self.clip))
    _sgd(weights, self.state)
    return loss


@torch.no_grad()
def step_of_1_0_6(self, closure=None):
    """Of LARS, an optimiser of its own; the gradients stay as they are."""
    loss = _loss_of(closure)
    weights = _with_gradients(self.param_groups)
    updates = {p: gradient for p, gradient, _ in weights}
    scaled = [one for one in weights if one[0].ndim != 1 or not one[2]["exclude_bias_n_norm"]]
    for (eta, eps, clip), members in _alike(scaled, "eta", "eps", "clip_lr").items():
        p_norm, g_norm, decayed = _norms(members)
        rates = p_norm / (g_norm + decayed + eps) * eta
        rates = _trusted(rates, p_norm, g_norm, [group for *_, group in members], clip)
        for (decay,), some in _alike(members, "weight_decay").items():
            params, gradients, _ = map(list, zip(*some))
            updates.update(zip(params, torch._foreach_add(gradients, params, alpha=decay)))
        torch._foreach_mul_([updates[p] for p, *_ in members], rates)
    _sgd([(p, updates[p], group) for p, _, group in weights], self.state)
    return loss


class LARSAtOnce(LARS):
    """solo-learn's LARS but for its step."""

    step = step_of_1_0_6 if API == "1.0.6" else step_of_1_0_2


def at_once(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Of a new LARS of solo-learn ours with the same weights and settings; any other as it is."""
    if not isinstance(optimizer, LARS):
        return optimizer
    if API == "1.0.6":
        return LARSAtOnce(optimizer.param_groups, **optimizer.defaults)
    names = "optim", "eta", "clip", "eps", "exclude_bias_n_norm"
    return LARSAtOnce(*(getattr(optimizer, name) for name in names))


def _loss_of(closure):
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _with_gradients(groups: list[dict[str, Any]]) -> list[Weight]:
    return [(p, p.grad, group) for group in groups for p in group["params"] if p.grad is not None]


def _alike(weights: list[Weight], *settings: str) -> dict[tuple, list[Weight]]:
    """The weights by these settings of their groups."""
    alike: dict[tuple, list[Weight]] = {}
    for one in weights:
        alike.setdefault(tuple(one[2].get(name) for name in settings), []).append(one)
    return alike


def _norms(weights: list[Weight]) -> tuple[Tensor, Tensor, Tensor]:
    """Norms of the weights and of their gradients, and the former times the weight decays."""
    params, gradients, groups = map(list, zip(*weights))
    p_norms = torch._foreach_norm(params)
    decayed = torch._foreach_mul(p_norms, [group["weight_decay"] for group in groups])
    g_norms = torch._foreach_norm(gradients)
    return torch.stack(p_norms), torch.stack(g_norms), torch.stack(decayed)


def _trusted(
    rates: Tensor, p_norm: Tensor, g_norm: Tensor, groups: list[dict[str, Any]], clip: bool
) -> list[Tensor]:
    """The rates, at most 1 in units of the learning rates if clipped.

    A gradient of zeros stays one, and that of a weight of zeros as it is.
    """
    if clip:
        torch._foreach_div_(list(rates.unbind()), [group["lr"] for group in groups])
        rates.clamp_(max=1)
    return list(rates.masked_fill_(p_norm == 0, 1.0).masked_fill_(g_norm == 0, 0.0).unbind())


def _sgd(weights: list[Weight], state: dict[Tensor, dict[str, Any]]) -> None:
    """SGD of gradients that hold the weight decay already, groups of the same settings at once."""
    names = "lr", "momentum", "dampening", "nesterov", "maximize"
    for values, members in _alike(weights, *names).items():
        params, gradients, _ = map(list, zip(*members))
        buffers = [state[p].get("momentum_buffer") for p in params]
        settings: dict[str, Any] = dict(zip(names, values), weight_decay=0.0)
        settings["maximize"] = bool(settings["maximize"])  # 1.0.6 has no such setting
        sgd(params, gradients, buffers, **settings)
        if settings["momentum"]:
            for p, buffer in zip(params, buffers):
                state[p]["momentum_buffer"] = buffer

"""A loss over all patches of a step with the activations of one chunk in memory.

Gradient caching (Gao, Zhang, Han and Callan, "Scaling Deep Contrastive Learning Batch Size under
Memory Limited Setup", arXiv 2101.06983).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

Project = Callable[[Tensor], tuple[Tensor, Tensor]]


def project_in_chunks(
    project: Project, networks: nn.ModuleList, patches: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """What ``project`` makes of all patches, ``chunk`` at a time.

    A chunk is a BatchNorm group, counted once in the running statistics.

    Args:
        project: patches (m, b, 3, s, s) -> features h (m, b, f) and projections z (m, b, d).
        networks: what it consists of.
        patches: (n, b, 3, s, s).
        chunk: patches per image at a time.

    Returns:
        h (n, b, f) without a gradient, and z (n, b, d) with one.
    """
    weights = [weight for weight in networks.parameters() if weight.requires_grad]
    return _InChunks.apply(project, networks, patches, chunk, *weights)


class _InChunks(torch.autograd.Function):
    """The first pass keeps no graph. The second, when dloss/dz is known, gives the gradients.

    The weights are arguments, so that their gradients come by once, however many chunks there are:
    DDP synchronises then. Why not ``torch.utils.checkpoint``: on a CPU its graphs lie in memory
    between the large tensors and keep their space from being used again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        project: Project,
        networks: nn.ModuleList,
        patches: Tensor,
        chunk: int,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        device = patches.device.type
        ctx.project, ctx.networks, ctx.chunk, ctx.weights = project, networks, chunk, weights
        ctx.random = []
        # no cached casts of the weights: those made here have no graph
        ctx.autocast = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
            "cache_enabled": False,
        }
        ctx.save_for_backward(patches)
        out: tuple[Tensor, ...] = ()
        with torch.autocast(**ctx.autocast):
            for first in range(0, len(patches), chunk):
                ctx.random.append(_random_state(patches.device))
                made = project(patches[first : first + chunk])
                out = out or tuple(part.new_empty(len(patches), *part.shape[1:]) for part in made)
                for whole, part in zip(out, made):
                    whole[first : first + len(part)] = part
        h, z = out
        ctx.mark_non_differentiable(h)
        return h, z

    @staticmethod
    def backward(ctx: Any, _: Tensor, upstream: Tensor) -> tuple[Tensor | None, ...]:
        [patches] = ctx.saved_tensors
        chunks = patches.split(ctx.chunk), upstream.split(ctx.chunk), ctx.random
        totals: list[Any] = [None] * len(ctx.weights)
        now = _random_state(patches.device)
        with torch.enable_grad(), frozen_batch_statistics(ctx.networks):
            for part, dz, state in zip(*chunks):
                _set_random_state(patches.device, state)  # dropout falls as in the first pass
                # not for the gradients, whose types are those of the pass
                with torch.autocast(**ctx.autocast):
                    z = ctx.project(part)[1]
                # no name for all gradients: they would stay until the next chunk's
                for i, gradient in enumerate(
                    torch.autograd.grad(z, ctx.weights, dz, allow_unused=True)
                ):
                    if gradient is not None:  # the loss depends on this weight
                        total = totals[i]
                        totals[i] = gradient.clone() if total is None else total.add_(gradient)
        _set_random_state(patches.device, now)
        return None, None, None, None, *totals


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    of_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), of_device


def _set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    of_cpu, of_device = state
    torch.set_rng_state(of_cpu)
    if of_device is not None:
        torch.cuda.set_rng_state(of_device, device)


@contextmanager
def frozen_batch_statistics(networks: nn.Module) -> Iterator[None]:
    """BatchNorm normalises by the batch, as in training, and keeps its statistics and counters."""
    norms = [m for m in networks.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    layers = [norm for norm in norms if norm.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True

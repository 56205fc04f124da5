"""EMP-SSL (Tong, Chen, Ma and LeCun, arXiv 2304.03977) as a solo-learn method."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.nn.functional import all_gather

from emp_plugin.losses import at_least_float32, effective_rank, emp_ssl_loss
from emp_plugin.solo_learn import BaseMethod, backbone_of, split_settings

PRESETS = {  # the two columns of the paper: its published code and its text
    "code": {"embedding_dim": 4096, "proj_hidden_dim": 4096, "proj_output_dim": 1024},
    "paper": {"embedding_dim": 0, "proj_hidden_dim": 4096, "proj_output_dim": 512},
}


@dataclass
class EMPSettings:
    """``method_kwargs`` of EMP. A size left at None takes the preset's value.

    Raises:
        ValueError: for an unknown preset or a size, weight or eps that cannot work.
    """

    preset: str = "code"
    embedding_dim: int | None = (
        None  # width of the layer between backbone and projector; 0: none, the backbone's features are it
    )
    proj_hidden_dim: int | None = None
    proj_output_dim: int | None = None
    invariance_weight: float = 200.0  # lambda
    eps: float = 0.2  # the paper's eps^2
    patch_chunk: int | None = (
        None  # patches per image in memory at a time; a chunk is a BatchNorm group; None: all n
    )

    def __post_init__(self):
        for name, value in asdict(self).items():
            kinds = {"preset": str, "invariance_weight": (int, float), "eps": (int, float)}.get(
                name, (int, type(None))
            )
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise ValueError(f"method_kwargs.{name} has the wrong type: {value!r}")
        if self.preset not in PRESETS:
            raise ValueError(
                f"method_kwargs.preset must be one of {', '.join(PRESETS)}, got '{self.preset}'"
            )
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.embedding_dim < 0 or self.proj_hidden_dim < 1 or self.proj_output_dim < 1:
            raise ValueError(
                "method_kwargs: proj_hidden_dim and proj_output_dim must be positive, embedding_dim not negative"
            )
        if not self.invariance_weight >= 0:
            raise ValueError(
                f"method_kwargs.invariance_weight must not be negative, got {self.invariance_weight}"
            )
        if not self.eps > 0:
            raise ValueError(f"method_kwargs.eps must be positive, got {self.eps}")
        if self.patch_chunk is not None and self.patch_chunk < 1:
            raise ValueError(
                f"method_kwargs.patch_chunk must be at least 1, or null for all patches at once, got {self.patch_chunk}"
            )


class EMP(BaseMethod):
    """EMP-SSL: many patches of each image, one embedding each, drawn to their mean while the batch spreads out.

    Takes the arguments of the installed solo-learn's BaseMethod; the fields of :class:`EMPSettings` go where that generation puts
    a method's own settings (keywords on the wheel, ``cfg.method_kwargs`` on the repository's head).

    Raises:
        ValueError: see :class:`EMPSettings`.
    """

    lr_scaled_by_batch_size = False  # the published learning rate of 0.3 is used as it is

    def __init__(self, *args: Any, **kwargs: Any):
        settings, args, kwargs = split_settings(EMPSettings, args, kwargs)
        super().__init__(*args, **kwargs)
        self.settings = settings
        self.extra_args = asdict(settings)
        width = settings.embedding_dim or self.features_dim
        self.embedder = (
            _dense(self.features_dim, width) if settings.embedding_dim else nn.Identity()
        )
        self.projector = nn.Sequential(
            *_dense(width, settings.proj_hidden_dim),
            nn.Linear(settings.proj_hidden_dim, settings.proj_output_dim),
        )

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        """The parent's parameter groups, the embedding layer and the projector."""
        own = [
            {"name": "embedder", "params": list(self.embedder.parameters())},
            {"name": "projector", "params": list(self.projector.parameters())},
        ]
        return super().learnable_params + [group for group in own if group["params"]]

    def features(self, x: Tensor) -> dict[str, Tensor]:
        """Features to probe, of images or patches x (b, 3, s, s): ``backbone`` (b, f) and, where there is one, ``embedding`` (b, e)."""
        h = backbone_of(self)(x.contiguous(memory_format=torch.channels_last))
        return (
            {"backbone": h, "embedding": self.embedder(h)}
            if self.settings.embedding_dim
            else {"backbone": h}
        )

    def project(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Backbone features (n, b, f) and unit projections z (n, b, d) of patches (n, b, 3, s, s), passed as one batch of n x b."""
        n, b = patches.shape[:2]
        out = self.features(patches.flatten(0, 1))
        z = self.projector(out.get("embedding", out["backbone"]))
        return out["backbone"].unflatten(0, (n, b)), F.normalize(
            at_least_float32(z), dim=-1
        ).unflatten(0, (n, b))

    def project_chunks(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`project`, ``patch_chunk`` patches at a time and without keeping their activations; h has no gradient."""
        parts = backbone_of(self), self.embedder, self.projector
        return _InChunks.apply(
            self, patches, *(p for part in parts for p in part.parameters() if p.requires_grad)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One step on solo-learn's ``[indices, X, targets]``; X is (n, b, 3, s, s) or a list of n tensors (b, 3, s, s)."""
        _, x, targets = batch
        x = x if isinstance(x, Tensor) else torch.stack(x)
        h, z = self.project_chunks(x) if self.settings.patch_chunk else self.project(x)
        everybody = gather_images(z)
        out = emp_ssl_loss(z, self.settings.invariance_weight, self.settings.eps, everybody)

        # the online classifier sees the bag of the image's patches; its gradient stops at the features
        logits = self.classifier(at_least_float32(h).mean(0).detach())
        labelled = targets >= 0
        class_loss = F.cross_entropy(
            logits.float(), targets, ignore_index=-1, reduction="sum"
        ) / labelled.sum().clamp_min(1)
        accuracy = 100 * (logits.argmax(-1) == targets).sum() / labelled.sum().clamp_min(1)

        if self.knn_eval:  # solo-learn's online k-NN, which validation queries
            self.knn(train_features=h.mean(0).detach()[labelled], train_targets=targets[labelled])

        logged = {
            "train_loss": out.loss,
            "train_coding_rate": out.coding_rate,
            "train_invariance": out.invariance,
            "train_effective_rank": effective_rank(everybody.detach().mean(0)),
            "train_class_loss": class_loss,
            "train_acc1": accuracy,
        }
        # in one go; Lightning's sync_dist reduces each by itself, behind a barrier that the host waits at
        self.log_dict(
            dict(
                zip(
                    logged,
                    mean_over_processes(torch.stack([value.detach() for value in logged.values()])),
                )
            )
        )
        return out.loss + class_loss


def gather_images(z: Tensor) -> Tensor:
    """z (n, b, d) of this process's images -> (n, w b, d) of those of all w processes, in the order of the global batch.

    Gradients flow back to every process: each receives the sum over all processes, of whose parameter gradients DDP takes the mean.
    """
    return torch.cat(all_gather(z), dim=1) if dist.is_available() and dist.is_initialized() else z


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of these values over all processes, each of which calls this; of a single one, the values."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
        values = values / dist.get_world_size()
    return values


class _InChunks(torch.autograd.Function):
    """Projects patches a chunk at a time: once without a graph for all h and z, and once more, when the gradient of the loss with respect to z is
    known, for the gradients of the weights.

    So the objective is taken once over all patches, and only one chunk's activations exist at a time. The weights are arguments, so that their
    gradients come by once, however many chunks there are (DDP synchronises then). The graphs of ``torch.utils.checkpoint``
    lie between a CPU's large tensors and keep their room from being used again.
    """

    @staticmethod
    def forward(ctx: Any, method: EMP, patches: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        device = patches.device.type
        ctx.method, ctx.random, ctx.weights = method, [], weights
        # casts of the weights must not be kept: these have no graph
        ctx.autocast = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
            "cache_enabled": False,
        }
        ctx.save_for_backward(patches)
        out: tuple[Tensor, ...] = ()
        with torch.autocast(**ctx.autocast):
            for first in range(0, len(patches), method.settings.patch_chunk):
                ctx.random.append(_random_state(patches.device))
                made = method.project(patches[first : first + method.settings.patch_chunk])
                out = out or tuple(part.new_empty(len(patches), *part.shape[1:]) for part in made)
                for whole, part in zip(out, made):
                    whole[first : first + len(part)] = part
        ctx.mark_non_differentiable(out[0])
        return out

    @staticmethod
    def backward(ctx: Any, _: Tensor, upstream: Tensor) -> tuple[Tensor | None, ...]:
        [patches] = ctx.saved_tensors
        chunk = ctx.method.settings.patch_chunk
        gradients = [torch.zeros_like(weight) for weight in ctx.weights]
        now = _random_state(patches.device)
        with torch.enable_grad(), frozen_batch_statistics(ctx.method):
            for part, dz, state in zip(patches.split(chunk), upstream.split(chunk), ctx.random):
                _set_random_state(patches.device, state)  # dropout falls as in the first pass
                with torch.autocast(
                    **ctx.autocast
                ):  # not the gradients, whose types are those of the pass
                    z = ctx.method.project(part)[1]
                for total, gradient in zip(gradients, torch.autograd.grad(z, ctx.weights, dz)):
                    total += gradient
        _set_random_state(patches.device, now)
        return None, None, *gradients


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(
        device
    ) if device.type == "cuda" else None


def _set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


@contextmanager
def frozen_batch_statistics(module: nn.Module) -> Iterator[None]:
    """Within it, BatchNorm normalises by the batch as in training but leaves its running statistics and counters as they are."""
    layers = [
        layer
        for layer in module.modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.track_running_stats
    ]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


def _dense(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU())

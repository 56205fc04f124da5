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

from emp_plugin.losses import at_least_float32, emp_ssl_loss
from emp_plugin.solo_learn import Corrected, backbone_of, split_settings
from emp_plugin.solo_learn.schedules import is_logged

PRESETS = {  # the two columns of the paper: its published code and its text
    "code": {"embedding_dim": 4096, "proj_hidden_dim": 4096, "proj_output_dim": 1024},
    "paper": {"embedding_dim": 0, "proj_hidden_dim": 4096, "proj_output_dim": 512},
}


@dataclass
class EMPSettings:
    """``method_kwargs`` of EMP.

    Args:
        preset: "code" or "paper", which decides the three sizes that are None.
        embedding_dim: width of the layer between backbone and projector; 0: there is none, and the
            projector takes the backbone's features.
        proj_hidden_dim: width of the projector's hidden layer.
        proj_output_dim: width of the projections.
        invariance_weight: lambda.
        eps: the paper's eps^2.
        patch_chunk: patches per image in memory at a time; a chunk is a BatchNorm group.
            ``None``: all n.

    Raises:
        ValueError: for an unknown preset or a size, weight or eps that cannot work.
    """

    preset: str = "code"
    embedding_dim: int | None = None
    proj_hidden_dim: int | None = None
    proj_output_dim: int | None = None
    invariance_weight: float = 200.0
    eps: float = 0.2
    patch_chunk: int | None = None

    def __post_init__(self):
        kinds = {"preset": str, "invariance_weight": (int, float), "eps": (int, float)}
        for name, value in asdict(self).items():
            kind = kinds.get(name, (int, type(None)))
            if not isinstance(value, kind) or isinstance(value, bool):
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
                "method_kwargs: proj_hidden_dim and proj_output_dim must be positive, "
                "embedding_dim not negative"
            )
        if not self.invariance_weight >= 0:
            raise ValueError(
                "method_kwargs.invariance_weight must not be negative, "
                f"got {self.invariance_weight}"
            )
        if not self.eps > 0:
            raise ValueError(f"method_kwargs.eps must be positive, got {self.eps}")
        if self.patch_chunk is not None and self.patch_chunk < 1:
            raise ValueError(
                "method_kwargs.patch_chunk must be at least 1, or null for all patches at once, "
                f"got {self.patch_chunk}"
            )


class EMP(Corrected):
    """EMP-SSL: projections of an image's patches are drawn to their mean, while images spread out.

    Takes the arguments of the installed solo-learn's BaseMethod. The fields of :class:`EMPSettings`
    go where that version puts a method's own settings: keywords in 1.0.2, ``cfg.method_kwargs`` in
    1.0.6.

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
        hidden = settings.proj_hidden_dim
        has_embedding = bool(settings.embedding_dim)
        self.embedder = _dense(self.features_dim, width) if has_embedding else nn.Identity()
        self.projector = nn.Sequential(
            *_dense(width, hidden), nn.Linear(hidden, settings.proj_output_dim)
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
        """Features to probe, of images or patches x (b, 3, s, s).

        ``backbone`` (b, f) and, where there is such a layer, ``embedding`` (b, e).
        """
        h = backbone_of(self)(x.contiguous(memory_format=torch.channels_last))
        if not self.settings.embedding_dim:
            return {"backbone": h}
        return {"backbone": h, "embedding": self.embedder(h)}

    def project(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Backbone features h (n, b, f) and unit projections z (n, b, d).

        The patches (n, b, 3, s, s) are passed as one batch of n x b.
        """
        images = patches.shape[:2]
        out = self.features(patches.flatten(0, 1))
        z = self.projector(out.get("embedding", out["backbone"]))
        z = F.normalize(at_least_float32(z), dim=-1)
        return out["backbone"].unflatten(0, images), z.unflatten(0, images)

    def project_chunks(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`project`, ``patch_chunk`` patches at a time, without keeping their activations.

        h has no gradient.
        """
        parts = backbone_of(self), self.embedder, self.projector
        weights = [p for part in parts for p in part.parameters() if p.requires_grad]
        return _InChunks.apply(self, patches, *weights)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One step on solo-learn's ``[indices, X, targets]``; a target of -1 means no label.

        X is (n, b, 3, s, s) or a list of n tensors (b, 3, s, s).
        """
        _, x, targets = batch
        x = x if isinstance(x, Tensor) else torch.stack(x)
        h, z = self.project_chunks(x) if self.settings.patch_chunk else self.project(x)
        gathered = gather_images(z)
        out = emp_ssl_loss(z, self.settings.invariance_weight, self.settings.eps, gathered)

        # the online classifier sees the mean over the patches; its gradient stops at the features
        logits = self.classifier(at_least_float32(h).mean(0).detach())
        labelled = targets >= 0
        count = labelled.sum()
        entropies = F.cross_entropy(logits.float(), targets, ignore_index=-1, reduction="sum")
        class_loss = entropies / count.clamp_min(1)

        if self.knn_eval:  # solo-learn's online k-NN, which validation queries
            self.knn(train_features=h.mean(0).detach()[labelled], train_targets=targets[labelled])

        trainer = self._trainer  # None: not in Lightning's hands
        if trainer is None or is_logged(trainer, trainer.global_step + 1):
            accuracy = 100 * (logits.argmax(-1) == targets).sum() / count  # NaN without any label
            logged = {
                "train_loss": out.loss,
                "train_coding_rate": out.coding_rate,
                "train_invariance": out.invariance,
                "train_class_loss": class_loss,
                "train_acc1": accuracy,
            }
            # One reduction for all. Lightning's sync_dist reduces each by itself, behind a barrier
            # that the host waits at.
            values = [value.detach() for value in logged.values()]
            self.log_dict(dict(zip(logged, mean_over_processes(torch.stack(values)))))
        return out.loss + class_loss


def gather_images(z: Tensor) -> Tensor:
    """z (n, b, d) of this process's images -> (n, w b, d) of those of all w processes.

    They are in the order of the global batch. Gradients flow back to every process: each receives
    the sum over all processes, of whose parameter gradients DDP takes the mean.
    """
    if not _distributed():
        return z
    return torch.cat(all_gather(z), dim=1)


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean over all processes, each of which calls this; with a single one, the values."""
    if not _distributed():
        return values
    dist.all_reduce(values)
    return values / dist.get_world_size()


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


class _InChunks(torch.autograd.Function):
    """Projects patches a chunk at a time, twice.

    The first pass keeps no graph and gives all h and z. The second one, when the gradient of the
    loss with respect to z is known, gives the gradients of the weights. So the objective is taken
    once over all patches, and only one chunk's activations exist at a time.

    The weights are arguments, so that their gradients come by once, however many chunks there are:
    DDP synchronises then. Why not ``torch.utils.checkpoint``: on a CPU its graphs lie in memory
    between the large tensors and keep their space from being used again.
    """

    @staticmethod
    def forward(ctx: Any, method: EMP, patches: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        device, chunk = patches.device.type, method.settings.patch_chunk
        ctx.method, ctx.random, ctx.weights = method, [], weights
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
                made = method.project(patches[first : first + chunk])
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
                # not for the gradients, whose types are those of the pass
                with torch.autocast(**ctx.autocast):
                    z = ctx.method.project(part)[1]
                for total, gradient in zip(gradients, torch.autograd.grad(z, ctx.weights, dz)):
                    total += gradient
        _set_random_state(patches.device, now)
        return None, None, *gradients


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    of_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), of_device


def _set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    of_cpu, of_device = state
    torch.set_rng_state(of_cpu)
    if of_device is not None:
        torch.cuda.set_rng_state(of_device, device)


@contextmanager
def frozen_batch_statistics(module: nn.Module) -> Iterator[None]:
    """BatchNorm normalises by the batch, as in training, and keeps its statistics and counters."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    layers = [norm for norm in norms if norm.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


def _dense(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU())

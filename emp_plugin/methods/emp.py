"""EMP-SSL (Tong, Chen, Ma and LeCun, arXiv 2304.03977) as a solo-learn method."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from emp_plugin.heads import EMPHead, HeadSettings, unit
from emp_plugin.losses import (
    MOST_IN_FLOAT32,
    at_least_float32,
    emp_ssl_loss,
    gather_images,
    is_distributed,
)
from emp_plugin.methods.gradient_cache import project_in_chunks
from emp_plugin.solo_learn import Corrected, backbone_of, split_settings
from emp_plugin.solo_learn.schedules import is_logged


@dataclass
class EMPSettings(HeadSettings):
    """``method_kwargs`` of EMP: those of its head, and these.

    Args:
        invariance_weight: lambda.
        eps: the paper's eps^2.
        patch_chunk: patches per image in memory at a time; a chunk is a BatchNorm group.
            ``None``: all n.

    Raises:
        ValueError: for an unknown preset or a size, weight or eps that cannot work.
    """

    invariance_weight: int | float = 200.0
    eps: int | float = 0.2
    patch_chunk: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.invariance_weight >= 0:
            raise ValueError(
                f"invariance_weight must not be negative, got {self.invariance_weight}"
            )
        if not self.eps > 0:
            raise ValueError(f"eps must be positive, got {self.eps}")
        if self.eps < (least := self.sizes[2] / MOST_IN_FLOAT32):
            raise ValueError(
                f"eps must be at least {least:g}, which float32 carries, got {self.eps}"
            )
        if self.patch_chunk is not None and self.patch_chunk < 1:
            raise ValueError(
                "patch_chunk must be at least 1, or null for all patches at once, "
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
        head = EMPHead(self.features_dim, settings.preset, *settings.sizes)
        # the names that checkpoints have
        self.embedder, self.projector = head.embedder, head.projector

    @classmethod
    def load_from_checkpoint(
        cls, checkpoint_path: Any, map_location: Any = None, hparams_file: Any = None, **kwargs: Any
    ) -> "EMP":
        """The method of a checkpoint of ours, which holds its settings: `emp_plugin.load_method`.

        With arguments of the constructor as Lightning's, for checkpoints of other programs.
        """
        kwargs.pop("strict", None)  # ours are complete
        if kwargs or hparams_file:
            return super().load_from_checkpoint(
                checkpoint_path, map_location, hparams_file, **kwargs
            )
        from emp_plugin import load_method

        return load_method(checkpoint_path).to(map_location or "cpu")

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
        z = unit(self.projector(out.get("embedding", out["backbone"])))
        return out["backbone"].unflatten(0, images), z.unflatten(0, images)

    def project_chunks(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`project`, ``patch_chunk`` patches at a time, without keeping their activations.

        h has no gradient.
        """
        networks = nn.ModuleList([backbone_of(self), self.embedder, self.projector])
        chunk = self.settings.patch_chunk or len(patches)
        return project_in_chunks(self.project, networks, patches, chunk)

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


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean over all processes, each of which calls this; with a single one, the values."""
    if not is_distributed():
        return values
    dist.all_reduce(values)
    return values / dist.get_world_size()

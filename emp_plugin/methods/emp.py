"""EMP-SSL (Tong, Chen, Ma and LeCun, arXiv 2304.03977) as a solo-learn method."""
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from emp_plugin.losses import effective_rank, emp_ssl_loss
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
    embedding_dim: int | None = None  # width of the layer between backbone and projector; 0: none, the backbone's features are it
    proj_hidden_dim: int | None = None
    proj_output_dim: int | None = None
    invariance_weight: float = 200.0  # lambda
    eps: float = 0.2  # the paper's eps^2

    def __post_init__(self):
        if self.preset not in PRESETS:
            raise ValueError(f"method_kwargs.preset must be one of {', '.join(PRESETS)}, got '{self.preset}'")
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.embedding_dim < 0 or self.proj_hidden_dim < 1 or self.proj_output_dim < 1:
            raise ValueError("method_kwargs: proj_hidden_dim and proj_output_dim must be positive, embedding_dim not negative")
        if not self.invariance_weight >= 0:
            raise ValueError(f"method_kwargs.invariance_weight must not be negative, got {self.invariance_weight}")
        if not self.eps > 0:
            raise ValueError(f"method_kwargs.eps must be positive, got {self.eps}")


class EMP(BaseMethod):
    """EMP-SSL: many patches of each image, one embedding each, drawn to their mean while the batch spreads out.

    Takes the arguments of the installed solo-learn's BaseMethod; the fields of :class:`EMPSettings` go where that generation puts
    a method's own settings (keywords on the wheel, ``cfg.method_kwargs`` on the repository's head).

    Raises:
        ValueError: see :class:`EMPSettings`.
    """

    lr_scaled_by_batch_size = False  # the published learning rate of 0.3 is used as it is

    def __init__(self, *args: Any, **kwargs: Any):
        self_settings, args, kwargs = split_settings(EMPSettings, args, kwargs)
        super().__init__(*args, **kwargs)
        self.settings = self_settings
        self.extra_args = asdict(self_settings)
        width = self_settings.embedding_dim or self.features_dim
        self.embedder = _dense(self.features_dim, width) if self_settings.embedding_dim else nn.Identity()
        self.projector = nn.Sequential(*_dense(width, self_settings.proj_hidden_dim),
                                       nn.Linear(self_settings.proj_hidden_dim, self_settings.proj_output_dim))

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        """The parent's parameter groups, the embedding layer and the projector."""
        own = [{"name": "embedder", "params": list(self.embedder.parameters())}, {"name": "projector", "params": list(self.projector.parameters())}]
        return super().learnable_params + [group for group in own if group["params"]]

    def features(self, x: Tensor) -> dict[str, Tensor]:
        """Features to probe, of images or patches x (b, 3, s, s): ``backbone`` (b, f) and, where there is one, ``embedding`` (b, e)."""
        h = backbone_of(self)(x.contiguous(memory_format=torch.channels_last))
        return {"backbone": h, "embedding": self.embedder(h)} if self.settings.embedding_dim else {"backbone": h}

    def project(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Backbone features (n, b, f) and unit projections z (n, b, d) of patches (n, b, 3, s, s), passed as one batch of n x b."""
        n, b = patches.shape[:2]
        out = self.features(patches.flatten(0, 1))
        z = self.projector(out.get("embedding", out["backbone"]))
        return out["backbone"].unflatten(0, (n, b)), F.normalize(z.float(), dim=-1).unflatten(0, (n, b))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One step on solo-learn's ``[indices, X, targets]``; X is (n, b, 3, s, s) or a list of n tensors (b, 3, s, s)."""
        _, x, targets = batch
        h, z = self.project(x if isinstance(x, Tensor) else torch.stack(x))
        out = emp_ssl_loss(z, self.settings.invariance_weight, self.settings.eps)

        # the online classifier sees the bag of the image's patches; its gradient stops at the features
        logits = self.classifier(h.float().mean(0).detach())
        labelled = targets >= 0
        class_loss = F.cross_entropy(logits.float(), targets, ignore_index=-1, reduction="sum") / labelled.sum().clamp_min(1)
        accuracy = 100 * (logits.argmax(-1) == targets).sum() / labelled.sum().clamp_min(1)

        self.log_dict({"train_loss": out.loss, "train_coding_rate": out.coding_rate, "train_invariance": out.invariance,
                       "train_effective_rank": effective_rank(z.detach().mean(0)), "train_class_loss": class_loss, "train_acc1": accuracy},
                      sync_dist=True)
        return out.loss + class_loss


def _dense(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU())

"""The head of EMP-SSL, for any backbone: an embedding layer and a projector.

Tong, Chen, Ma and LeCun, "EMP-SSL: Towards Self-Supervised Learning in One Training Epoch", arXiv
2304.03977. The paper's text and its published code have different heads; each is a preset.
"""

from dataclasses import dataclass
from typing import get_type_hints

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from emp_plugin.losses import at_least_float32

__all__ = ["PRESETS", "EMPHead"]

PRESETS = {  # the two columns of the paper: its published code and its text
    "code": {"embedding_dim": 4096, "proj_hidden_dim": 4096, "proj_output_dim": 1024},
    "paper": {"embedding_dim": 0, "proj_hidden_dim": 4096, "proj_output_dim": 512},
}


@dataclass
class HeadSettings:
    """The sizes of a head. Those that are None are the preset's.

    Args:
        preset: "code" or "paper".
        embedding_dim: width e of the layer between backbone and projector; 0: there is none, and
            the projector takes the backbone's features.
        proj_hidden_dim: width of the projector's hidden layer.
        proj_output_dim: width d of the projections.

    Raises:
        ValueError: for an unknown preset or a size that cannot work.
    """

    preset: str = "code"
    embedding_dim: int | None = None
    proj_hidden_dim: int | None = None
    proj_output_dim: int | None = None

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(f"{name} has the wrong type: {value!r}")
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got '{self.preset}'")
        self.embedding_dim, self.proj_hidden_dim, self.proj_output_dim = self.sizes
        for name, size, least in zip(PRESETS[self.preset], self.sizes, (0, 1, 1)):
            if size < least:
                raise ValueError(f"{name} must be at least {least}, got {size}")

    @property
    def sizes(self) -> tuple[int, int, int]:
        """embedding_dim, proj_hidden_dim and proj_output_dim, the preset's in place of None."""
        given = self.embedding_dim, self.proj_hidden_dim, self.proj_output_dim
        usual = PRESETS[self.preset].values()
        embedding, hidden, output = (b if a is None else a for a, b in zip(given, usual))
        return embedding, hidden, output


class EMPHead(nn.Module):
    """Embedding layer and projector: backbone features h (m, f) -> unit projections z (m, d).

    The m rows are all n x b patches of a step, which are one BatchNorm group. z is float32, or
    float64 if h is.

    Args:
        in_features: width f of the backbone's features.
        preset, embedding_dim, proj_hidden_dim, proj_output_dim: see :class:`HeadSettings`.

    Raises:
        ValueError: see :class:`HeadSettings`.

    Source: the head of arXiv 2304.03977 ("paper") and of its published code ("code").

    >>> EMPHead(in_features=512)(torch.randn(6, 512)).shape
    torch.Size([6, 1024])
    """

    def __init__(
        self,
        in_features: int,
        preset: str = "code",
        embedding_dim: int | None = None,
        proj_hidden_dim: int | None = None,
        proj_output_dim: int | None = None,
    ) -> None:
        super().__init__()
        settings = HeadSettings(preset, embedding_dim, proj_hidden_dim, proj_output_dim)
        embedding, hidden, output = settings.sizes
        width = embedding or in_features
        self.embedder = _dense(in_features, width) if embedding else nn.Identity()
        self.projector = nn.Sequential(*_dense(width, hidden), nn.Linear(hidden, output))

    def embed(self, h: Tensor) -> Tensor:
        """The embedding (m, e) that the published code probes; without such a layer h itself."""
        embedding: Tensor = self.embedder(h)
        return embedding

    def forward(self, h: Tensor) -> Tensor:
        return unit(self.projector(self.embedder(h)))


def unit(z: Tensor) -> Tensor:
    """Rows of length 1, in float32 or better."""
    return F.normalize(at_least_float32(z), dim=-1)


def _dense(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU())

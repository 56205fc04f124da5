"""Pictures of a run: the patches of one image as the network sees them, and the curves of training."""
from pathlib import Path

import matplotlib
import pandas as pd
import torch
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (the backend has to be chosen first)

from emp_plugin.transforms import PatchRecipe  # noqa: E402

CURVES = {  # panel -> columns of metrics.csv, and what they are called in the legend
    "loss": {"train_loss": "training"},
    "coding rate (nats)": {"train_coding_rate": "training"},
    "invariance (cosine)": {"train_invariance": "training"},
    "effective rank": {"train_effective_rank": "training"},
    "online top-1 accuracy (%)": {"train_acc1": "training batches, bag of patches", "val_acc1": "evaluation set, whole images"},
}


def draw_patches(image: Tensor, patches: Tensor, recipe: PatchRecipe, path: Path, most: int = 40) -> None:
    """Draw a uint8 image (3, H, W) and its normalised patches (n, 3, s, s), at most ``most`` of them."""
    shown = patches[:most].float().cpu()
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (recipe.mean, recipe.std))
    columns = min(10, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(rows, columns + 2, figsize=(0.8 * (columns + 2), 0.8 * rows + 0.4), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    axes[0, 0].imshow(image.permute(1, 2, 0).cpu())
    axes[0, 0].set_title("image", fontsize=8)
    for i, patch in enumerate(shown):
        axes[i // columns, i % columns + 2].imshow((patch * std + mean).clamp(0, 1).permute(1, 2, 0))
    axes[0, 2].set_title(f"{len(shown)} of {len(patches)} patches, {patches.shape[-1]}x{patches.shape[-1]}", fontsize=8, loc="left")
    _save(figure, path)


def draw_curves(metrics: pd.DataFrame, path: Path) -> None:
    """Draw the curves of ``metrics.csv`` against optimiser steps; quantities that a method does not log are left out."""
    panels = {title: {column: label for column, label in columns.items() if column in metrics and metrics[column].notna().any()}
              for title, columns in CURVES.items()}
    panels = {title: columns for title, columns in panels.items() if columns}
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 2.8), squeeze=False)
    for axis, (title, columns) in zip(axes[0], panels.items()):
        for (column, label), style in zip(columns.items(), ({"color": "#0072B2"}, {"color": "#D55E00", "marker": "o"})):
            curve = metrics[["step", column]].dropna()
            axis.plot(curve["step"], curve[column], label=label, linewidth=1, **style)
        axis.set_xlabel("optimiser step")
        axis.set_ylabel(title)
        if len(columns) > 1:
            axis.legend(fontsize=7, loc="lower right")
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    temporary = path.with_suffix(".tmp.png")
    figure.tight_layout()
    figure.savefig(temporary, dpi=150)
    plt.close(figure)
    temporary.replace(path)

"""Pictures of a run: one image's patches as the network sees them, and the curves of training."""

from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from emp_plugin.transforms import PatchAugmentation

# panel: {column of metrics.csv: what the legend calls it}
CURVES = {
    "coding rate (nats)": {"train_coding_rate": "training"},
    "invariance (cosine)": {"train_invariance": "training"},
    "effective rank (centred)": {"train_rank": "training"},
    "spread (1: even)": {"train_std": "training"},
    "online top-1 accuracy (%)": {
        "train_acc1": "training batches, from their views",
        "val_acc1": "evaluation set, whole images",
    },
}


def draw_patches(
    image: Tensor, patches: Tensor, augmentation: PatchAugmentation, path: Path, most: int = 40
) -> None:
    """Draw a uint8 image (3, H, W) and at most ``most`` of its normalised patches (n, 3, s, s)."""
    shown = patches[:most].float().cpu()
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (augmentation.mean, augmentation.std))
    columns = min(10, len(shown))
    rows = -(-len(shown) // columns)
    side = max(2, rows)  # cells that the image takes
    figure = Figure(figsize=(0.8 * (columns + side + 0.5), 0.8 * side + 0.3))
    grid = figure.add_gridspec(
        side,
        columns + side + 1,
        width_ratios=[1] * side + [0.5] + [1] * columns,
        wspace=0.06,
        hspace=0.06,
        left=0.01,
        right=0.99,
        bottom=0.02,
        top=1 - 0.3 / figure.get_figheight(),
    )
    whole = figure.add_subplot(grid[:, :side])
    whole.imshow(image.permute(1, 2, 0).cpu())
    whole.set_title(f"an image, {image.shape[-1]}x{image.shape[-2]}", fontsize=8)
    whole.axis("off")
    for i, patch in enumerate(shown):
        axis = figure.add_subplot(grid[i // columns, i % columns + side + 1])
        axis.imshow((patch * std + mean).clamp(0, 1).permute(1, 2, 0))
        axis.axis("off")
        if i == 0:
            size = patches.shape[-1]
            title = f"{len(shown)} of its {len(patches)} patches, {size}x{size}"
            axis.set_title(title, fontsize=8, loc="left")
    save_figure(figure, path)


def draw_curves(metrics: pd.DataFrame, path: Path) -> None:
    """Draw the curves of ``metrics.csv`` against optimiser steps.

    They are the objective, which every method logs under a name of its own, and CURVES, as far as
    the method logs them.
    """
    metrics = metrics.rename(columns=lambda name: name.removesuffix("_step"))
    objective = {
        name: name.removeprefix("train_")
        for name in metrics
        if name.endswith(("_loss", "_cos_sim"))
        and not name.startswith("val_")
        and "class_loss" not in name
    }
    logged = set(metrics.columns[metrics.notna().any()])
    panels = {}
    for title, columns in ({"loss": objective} | CURVES).items():
        present = {column: label for column, label in columns.items() if column in logged}
        if present:
            panels[title] = present
    if not panels:
        return
    figure = Figure(figsize=(3.4 * len(panels), 2.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)
    styles = {"color": "#0072B2"}, {"color": "#D55E00", "marker": "o"}
    for axis, (title, columns) in zip(axes[0], panels.items()):
        for (column, label), style in zip(columns.items(), styles):
            curve = metrics[["step", column]].dropna()
            axis.plot(curve["step"], curve[column], label=label, linewidth=1, **style)
        axis.set_xlabel("optimiser step")
        axis.set_ylabel(title)
        if len(columns) > 1:
            axis.legend(fontsize=7, loc="lower right")
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=150)
    temporary.replace(path)

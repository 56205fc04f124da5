"""t-SNE of test images' features under several trained methods, side by side.

As figures 5 and 8 of arXiv 2304.03977.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from emp_plugin.config import augmentations, check_whole_images
from emp_plugin.config.models import Data
from emp_plugin.data import ImageData, ImageFiles
from emp_plugin.data.files import make_output_folder
from emp_plugin.errors import UserError
from emp_plugin.evaluation import extract_features
from emp_plugin.studies.titles import dataset_title, method_title
from emp_plugin.training.folder import write_text
from emp_plugin.training.lightning import epochs_begun
from emp_plugin.training.pictures import save_figure
from emp_plugin.training.probing import encoder, load_data, load_method

FEATURES = ("backbone", "embedding", "projection")
# Paul Tol's muted scheme, which the colour-blind can tell apart; its tenth, a pale grey, is darker
# here; markers help
COLOURS = (
    "#CC6677",
    "#332288",
    "#DDCC77",
    "#117733",
    "#88CCEE",
    "#882255",
    "#44AA99",
    "#999933",
    "#AA4499",
    "#AAAAAA",
)
MARKERS = "os^Dv"
SEED = 0  # of the choice of images and of t-SNE


class WithProjection(nn.Module):
    """All of :data:`FEATURES` of a method.

    Without an embedding layer (all but EMP) the backbone's output stands in its place; without a
    projector (DINO) there is no projection.
    """

    def __init__(self, method: nn.Module):
        super().__init__()
        self.method = method

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        out = dict(encoder(self.method)(x))
        embedding = out.setdefault("embedding", out["backbone"])
        projector = getattr(self.method, "projector", None)
        if projector is not None:
            out["projection"] = projector(embedding)
        return out


def write_tsne(
    checkpoints: list[Path],
    features: str,
    images: int,
    classes: int,
    train_path: str | None,
    out: Path,
) -> None:
    """Write ``<out>.csv`` and ``<out>.png``, which has a panel per checkpoint.

    The CSV has a row per checkpoint and image: ``panel, image, class, x, y``.

    Args:
        checkpoints: of runs here, of any method, on one dataset.
        features: one of :data:`FEATURES`, of whole images.
        images: how many of the test images, the same for all, as many of each class.
        classes: the first so many, up to ten.
        train_path: where the dataset is; None: where the checkpoint's run had it.
        out: path without ending.

    Raises:
        UserError: for a checkpoint or data that cannot be read, checkpoints of different datasets,
            or numbers that cannot work.
    """
    if not 2 <= classes <= len(COLOURS):
        raise UserError(f"--classes must be 2 to {len(COLOURS)}, got {classes}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    panels, dataset, chosen = {}, "", None
    for path in checkpoints:
        method, cfg, contents = load_method(path)
        if chosen is None:
            dataset = cfg.data.dataset
            chosen = choose_images(_test_images(cfg.data, train_path), images, classes)
        if cfg.data.dataset != dataset:
            raise UserError(
                f"{path} was trained on {cfg.data.dataset}, the first checkpoint on {dataset}: "
                "give those of one dataset"
            )
        data, places = chosen
        check_whole_images(cfg, data.fetch(torch.tensor([0])).shape[-1])
        views = augmentations(cfg)[0]
        made = extract_features(
            WithProjection(method).to(device),
            data,
            mean=views.mean,
            std=views.std,
            description=str(path),
            num_workers=cfg.data.num_workers,
        )
        if features not in made.features:
            raise UserError(f"{path}: {cfg.method} has no projector; choose --features backbone")
        panel = (
            f"{method_title(cfg.method)}: {cfg.name}, epoch {epochs_begun(contents)}, "
            f"step {contents['global_step']}, seed {cfg.seed}"
        )
        if panel in panels:
            panel += f"\n{path}"
        part = pd.DataFrame(embed(made.features[features]), columns=["x", "y"]).round(4)
        part.insert(0, "panel", panel)
        part.insert(1, "image", places)
        part.insert(2, "class", [data.classes[label] for label in data.targets])
        panels[panel] = part
        print(f"{path}: {len(data)} images", flush=True)
    rows = pd.concat(panels.values())
    make_output_folder(out.parent)
    write_text(out.with_name(f"{out.name}.csv"), rows.to_csv(index=False))
    title = f"t-SNE of {len(data)} test images of {dataset_title(dataset)}: {features}"
    draw_tsne(rows, title, out.with_name(f"{out.name}.png"))


def _test_images(data: Data, train_path: str | None) -> ImageData | ImageFiles:
    if train_path:
        data = replace(data, train_path=train_path)
    test = load_data(data)[1]
    if test is None:
        raise UserError(
            f"{data.train_path} holds images without labels: there are no classes to colour"
        )
    return test


def choose_images(
    data: ImageData | ImageFiles, images: int, classes: int
) -> tuple[ImageData | ImageFiles, list[int]]:
    """A fixed subset of ``images`` images of the first ``classes`` classes, and their places.

    Every class is there in proportion.

    Raises:
        UserError: for fewer images than a t-SNE can have of so many classes.
    """
    places = torch.nonzero(data.targets < classes).flatten()
    if images < len(places):
        labels = data.targets[places]
        try:
            chosen, _ = train_test_split(
                places, train_size=images, stratify=labels, random_state=SEED
            )
        except ValueError as error:
            raise UserError(
                f"--images={images} cannot be chosen from {len(places)} images: {error}"
            ) from error
        places = chosen.sort().values
    return data.subset(places), places.tolist()


def embed(features: Tensor) -> np.ndarray:
    """Coordinates (N, 2) of features (N, f) by t-SNE; the same settings for every method."""
    tsne = TSNE(
        perplexity=min(30.0, (len(features) - 1) / 3),
        metric="cosine",
        init="pca",
        learning_rate="auto",
        random_state=SEED,
    )
    return tsne.fit_transform(features.float().numpy())


def draw_tsne(rows: pd.DataFrame, title: str, path: Path) -> None:
    """Draw the rows of :func:`write_tsne`'s CSV; classes have the same colours in all panels."""
    panels = list(rows.panel.unique())
    classes = sorted(rows["class"].unique(), key=str)
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4 * columns, 4 * lines + 0.8), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes.flat, panels):
        axis.set(title=panel, xticks=[], yticks=[])
        axis.title.set_fontsize(9)
        for number, name in enumerate(classes):
            points = rows[(rows.panel == panel) & (rows["class"] == name)]
            axis.scatter(
                points.x,
                points.y,
                s=9,
                color=COLOURS[number],
                marker=MARKERS[number % len(MARKERS)],
                linewidths=0,
                alpha=0.8,
                label=name,
            )
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles,
        names,
        loc="outside lower center",
        ncols=min(5, 3 * columns),
        fontsize=8,
        markerscale=2,
        frameon=False,
    )
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)

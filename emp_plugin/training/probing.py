"""The evaluation of one run or checkpoint: which models to probe, and the table of what came out."""

import glob
import hashlib
import os
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from emp_plugin.config import augmentations, check_whole_images, uses_gpu
from emp_plugin.data import ImageData, ImageFiles, load_dataset
from emp_plugin.errors import UserError
from emp_plugin.evaluation import evaluate
from emp_plugin.solo_learn import build_method, pl
from emp_plugin.training.callbacks import CONFIG_KEY
from emp_plugin.training.folder import write_rows


def load_data(data: DictConfig) -> tuple[ImageData | ImageFiles, ImageData | ImageFiles | None]:
    """The images of a configuration's ``data``; see :func:`load_dataset`."""
    return load_dataset(
        data.dataset,
        data.train_path,
        data.holdout,
        data.fraction,
        data.get("val_path"),
        data.get("image_size"),
    )


def fresh_method(cfg: DictConfig) -> pl.LightningModule:
    """The method with the initial weights of the run's seed (its untrained row uses the same).

    Raises:
        UserError: for settings that the method refuses.
    """
    pl.seed_everything(cfg.seed, verbose=False)
    try:
        model = build_method(cfg)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error
    return model


def load_method(
    path: str | Path, like: DictConfig | None = None
) -> tuple[pl.LightningModule, DictConfig, dict[str, Any]]:
    """The trained method of a checkpoint, the configuration it was trained with (it travels in the file), and the checkpoint.

    Args:
        path: the file.
        like: a configuration whose method and network the checkpoint must have.

    Raises:
        UserError: for a file that is missing, broken, no checkpoint of this project, or of another method or network.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"checkpoint {path} is not a file")
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()  # torch does not look at the checksums
        if broken:
            raise zipfile.BadZipFile(f"{broken} is damaged")
        checkpoint = torch.load(
            path, map_location="cpu", weights_only=True
        )  # runs no code from the file
    except (
        zipfile.BadZipFile,
        zlib.error,
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        NotImplementedError,
    ) as error:
        raise UserError(
            f"{path} is not a readable checkpoint ({str(error).splitlines()[0]})"
        ) from error
    if (
        not isinstance(checkpoint, dict)
        or CONFIG_KEY not in checkpoint
        or "state_dict" not in checkpoint
    ):
        raise UserError(
            f"{path} was not written by emp_plugin: it holds no configuration to rebuild the method from"
        )
    cfg = OmegaConf.create(checkpoint[CONFIG_KEY])
    for key in ("method", "backbone", "method_kwargs", "data.num_classes"):
        if like is not None and OmegaConf.select(cfg, key) != OmegaConf.select(like, key):
            raise UserError(
                f"{path} is of another run: its {key} is {OmegaConf.select(cfg, key)}, this one's {OmegaConf.select(like, key)}"
            )
    method = fresh_method(cfg)
    try:
        method.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise UserError(
            f"{path}: its weights do not fit its configuration ({str(error).splitlines()[1].strip()})"
        ) from error
    return method, cfg, checkpoint


def probe_checkpoint(probe: DictConfig) -> list[dict[str, Any]]:
    """Evaluate a checkpoint of any method; leaves ``<probes>-<dataset>-<checkpoint>-<bag>.csv`` beside it and returns its rows.

    Raises:
        UserError: for a checkpoint or data that cannot be read.
    """
    path = Path(probe.pretrained_feature_extractor).expanduser()
    method, cfg, _ = load_method(path)
    data = probed_data(cfg, probe)
    dataset = data.dataset
    train, test = load_data(data)
    if test is None:
        raise UserError(f"{data.train_path} holds images without labels: there is nothing to probe")
    side, patch = train.fetch(torch.tensor([0])).shape[-1], augmentations(cfg)[0].patch_size
    if "whole" in probe.evaluation.views:
        check_whole_images(cfg, side)
    if "bag" in probe.evaluation.views and patch and patch > side:
        raise UserError(
            f"patches of {patch}x{patch} pixels, as {path} was trained on, do not fit into images of {side}x{side}: set evaluation.views=[whole]"
        )
    device = torch.device("cuda" if uses_gpu(probe) else "cpu")
    cfg.precision = probe.precision or cfg.get("precision")
    bag = (
        f"bag{probe.evaluation.bag_patches}{'-augmented' if probe.evaluation.bag_augmented else ''}"
    )
    out = path.with_name(f"{'-'.join(probe.evaluation.probes)}-{dataset}-{path.stem}-{bag}.csv")
    # a classifier trained online knows the classes it was trained on; those of a folder have no names to compare
    same_labels = dataset == cfg.data.dataset and (dataset != "custom" or not probe.data.train_path)
    rows = evaluate_run(cfg, probe.evaluation, method, train, test, device, out, same_labels)
    print_table(rows, f"{path} on {dataset}")
    print(f"results: {out}")
    return rows


def probed_data(cfg: DictConfig, probe: DictConfig) -> DictConfig:
    """The data settings that a checkpoint of a run ``cfg`` is probed with. What is not given is the run's, its hold-out included; but a val_path goes with
    its train_path, a hold-out without one, and an image_size with its dataset."""
    given = {key: value for key, value in probe.data.items() if value is not None}
    if "val_path" in given:
        dropped = {"holdout": 0.0}
    else:
        dropped = {"val_path": None} if "train_path" in given else {}
    if given.get("dataset", cfg.data.dataset) != cfg.data.dataset:
        dropped["image_size"] = None
    return OmegaConf.merge(cfg.data, dropped, given)


def evaluate_run(
    cfg: DictConfig,
    settings: DictConfig,
    model: pl.LightningModule,
    train: ImageData | ImageFiles,
    test: ImageData | ImageFiles,
    device: torch.device,
    out: Path,
    same_labels: bool = True,
) -> list[dict[str, Any]]:
    """The rows of :func:`emp_plugin.evaluation.evaluate` for a trained method, with the untrained one rebuilt from the seed.

    ``out`` is their CSV file. Until all are there they stand in ``<out>.<fingerprint>.part``, where an evaluation cut short is continued, if weights, data
    and settings are the same. ``same_labels`` says that the method was trained on these classes, so that its online classifier can be scored.
    """
    bf16 = "bf16" in str(cfg.get("precision", "32"))
    part = out.with_name(
        f"{out.name}.{_fingerprint(model, train, test, settings, bf16, same_labels)[:12]}.part"
    )
    for other in set(out.parent.glob(f"{glob.escape(out.name)}.*.part")) - {part}:
        other.unlink()
    rows = _complete_rows(part)
    done = {(row["model"], row["view"]): None for row in rows}
    if done:
        print(
            f"continued after {'; '.join(map(', '.join, done))}, which are in {part.name}",
            flush=True,
        )
    for row in evaluate(
        model.to(device),
        fresh_method(cfg).to(device),
        cfg.method,
        train,
        test,
        augmentations(cfg)[0],
        settings,
        cfg.seed,
        bf16=bf16,
        num_workers=cfg.data.num_workers,
        online=model.classifier if same_labels else None,
        done=done,
    ):
        rows.append(row)
        write_rows(part, row, rows)
        labels = f", {100 * row['labels']:g} % of the labels" if row["labels"] < 1 else ""
        print(
            f"{row['model']}, {row['features']}, {row['view']}, {row['probe']}{labels}: {row['top1']:.2f}",
            flush=True,
        )
    os.replace(part, out)
    return rows


def _fingerprint(
    model: pl.LightningModule,
    train: ImageData | ImageFiles,
    test: ImageData | ImageFiles,
    settings: DictConfig,
    *others: bool,
) -> str:
    """Of what the rows of an evaluation depend on; one image stands for all of its set."""
    about = OmegaConf.to_container(settings), others, train.classes
    digest = hashlib.sha256(repr(about).encode())
    first = torch.tensor([0])
    for tensor in (
        *model.parameters(),
        *model.buffers(),
        train.targets,
        test.targets,
        train.fetch(first),
        test.fetch(first),
    ):
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _complete_rows(part: Path) -> list[dict[str, Any]]:
    """Rows of an evaluation cut short, without those of the model and view that it was at."""
    rows = pd.read_csv(part).to_dict("records") if part.exists() else []
    return [
        row for row in rows if (row["model"], row["view"]) != (rows[-1]["model"], rows[-1]["view"])
    ]


def print_table(rows: list[dict[str, Any]], title: str) -> None:
    """Print evaluation rows as a table."""
    table = Table(title=title)
    for column in ("model", "features", "view", "probe"):
        table.add_column(column)
    for column in ("labels %", "top-1 %", "top-5 %"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["model"],
            row["features"],
            row["view"],
            row["probe"],
            f"{100 * row['labels']:g}",
            f"{row['top1']:.2f}",
            f"{row['top5']:.2f}",
        )
    Console().print(table)

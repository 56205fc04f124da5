"""The evaluation of one run or checkpoint: what is probed, and the table of what came out."""

import glob
import hashlib
import json
import os
import pickle
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from emp_plugin.config import Probe, Run, augmentations, check_whole_images, from_dict, uses_gpu
from emp_plugin.config.models import Data
from emp_plugin.data import ImageData, ImageFiles, load_dataset
from emp_plugin.errors import UserError
from emp_plugin.evaluation import PROTOCOLS, Evaluation, Network, evaluate
from emp_plugin.evaluation.protocol import UNTRAINED
from emp_plugin.evaluation.views import Encode, find_pool
from emp_plugin.solo_learn import backbone_of, build_method, pl
from emp_plugin.training.callbacks import CONFIG_KEY
from emp_plugin.training.flops import flops_of_batches
from emp_plugin.training.folder import identity, versions, write_rows
from emp_plugin.training.lightning import batches_of


def load_data(data: Data) -> tuple[ImageData | ImageFiles, ImageData | ImageFiles | None]:
    """The images of a configuration's ``data``; see :func:`load_dataset`."""
    return load_dataset(
        data.dataset,
        data.train_path,
        data.holdout,
        data.fraction,
        data.val_path,
        data.image_size,
        (data.window[0], data.window[1]) if data.window else None,
        data.no_labels,
    )


def fresh_method(cfg: Run) -> pl.LightningModule:
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
    path: str | Path, like: Run | None = None
) -> tuple[pl.LightningModule, Run, dict[str, Any]]:
    """The trained method of a checkpoint, its configuration, which is in the file, and the file.

    Args:
        path: the file.
        like: a configuration whose method and network the checkpoint must have.

    Raises:
        UserError: for a file that is missing, broken, no checkpoint of this project, or of another
            method or network.
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
            f"{path} was not written by emp_plugin: it holds no configuration to rebuild the "
            "method from"
        )
    cfg = from_dict(checkpoint[CONFIG_KEY])
    for key in ("method", "backbone", "method_kwargs", "data.num_classes"):
        there = attrgetter(key)(cfg)
        wanted = there if like is None else attrgetter(key)(like)
        if there != wanted:
            raise UserError(f"{path} is of another run: its {key} is {there}, this one's {wanted}")
    method = fresh_method(cfg)
    try:
        method.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(f"{path}: its weights do not fit its configuration ({reason})") from error
    return method, cfg, checkpoint


def encoder(method: nn.Module) -> Encode:
    """What is probed of a method: its ``features`` (EMP's), else the output of its backbone."""
    if hasattr(method, "features"):
        return cast(Encode, method.features)
    return _Backbone(backbone_of(method))


class _Backbone(nn.Module):
    """A backbone whose output has a name."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.train(backbone.training)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"backbone": self.backbone(x.contiguous(memory_format=torch.channels_last))}


def probe_checkpoint(probe: Probe) -> list[dict[str, Any]]:
    """Evaluate a checkpoint of any method; returns its rows, and leaves them beside it.

    The file is ``<protocol>-<dataset>-<checkpoint>.csv``; its name has views and probes where they
    are not a protocol's, and a hash of what else is not.

    Raises:
        UserError: for a checkpoint or data that cannot be read, or views that do not fit them.
    """
    path = Path(probe.pretrained_feature_extractor).expanduser()
    method, cfg, saved = load_method(path)
    data, settings = probed_data(cfg, probe), probe.evaluation
    train, test = load_data(data)
    if test is None:
        raise UserError(f"{data.train_path} holds images without labels: there is nothing to probe")
    side = train.fetch(torch.tensor([0])).shape[-1]
    if "whole" in settings.views:
        check_whole_images(cfg, side)
    patch = augmentations(cfg)[0].patch_size
    if patch and patch > side and set(settings.views) != {"whole"}:
        raise UserError(
            f"patches of {patch}x{patch} pixels, as {path} was trained on, do not fit into images "
            f"of {side}x{side}: set evaluation.views=[whole]"
        )
    device = torch.device("cuda" if uses_gpu(probe) else "cpu")
    out = path.with_name(f"{_evaluation_name(settings)}-{data.dataset}-{path.stem}.csv")
    # A classifier trained online knows the classes it was trained on. Those of a folder have no
    # names to compare.
    same_data = data.dataset == cfg.data.dataset
    same_labels = same_data and (data.dataset != "custom" or not probe.data.train_path)
    flops = flops_of_batches(cfg, batches_of(saved))
    rows = evaluate_run(
        cfg, settings, method, train, test, device, out, same_labels, flops, probe.precision
    )
    print_table(rows, f"{path} on {data.dataset}")
    print(f"results: {out}")
    return rows


def _evaluation_name(settings: Evaluation) -> str:
    names = [settings.protocol]
    if settings.protocol not in PROTOCOLS:
        names = [*settings.probes, *settings.views]
        if "bag" in settings.views:
            kind = "augmented" if settings.bag_augmented else "plain"
            names.append(f"{settings.bag_patches}{kind}")
    usual, given = asdict(Evaluation()), asdict(settings)
    others = ("linear", "mlp", "dense_scale", "label_fractions")
    changed = {name: given[name] for name in others if given[name] != usual[name]}
    if changed:
        names.append(hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:8])
    return "-".join(names)


def probed_data(cfg: Run, probe: Probe) -> Data:
    """The data settings that a checkpoint of a run ``cfg`` is probed with.

    What is not given is the run's, its hold-out included. But a val_path goes with its train_path,
    a hold-out without one, and an image_size with its dataset.
    """
    given = {key: value for key, value in vars(probe.data).items() if value is not None}
    dropped: dict[str, Any]
    if "val_path" in given:
        dropped = {"holdout": 0.0}
    else:
        dropped = {"val_path": None} if "train_path" in given else {}
    if given.get("dataset", cfg.data.dataset) != cfg.data.dataset:
        dropped["image_size"] = None
    return replace(cfg.data, **(dropped | given))


def evaluate_run(
    cfg: Run,
    settings: Evaluation,
    model: pl.LightningModule,
    train: ImageData | ImageFiles,
    test: ImageData | ImageFiles,
    device: torch.device,
    out: Path,
    same_labels: bool = True,
    flops: int | None = None,
    precision: str | None = None,
) -> list[dict[str, Any]]:
    """The rows of :func:`emp_plugin.evaluation.evaluate` for a trained method.

    If ``settings.references``, raw pixels and the untrained method, rebuilt from the seed, stand
    beside it.

    Args:
        cfg: of the run.
        settings: of the evaluation.
        model: the trained method.
        train, test: the probes learn on the first and are scored on the second.
        device: to evaluate on.
        out: CSV file of the rows. Until all are there they stand in ``<out>.<fingerprint>.part``.
            An evaluation cut short is continued there, if weights, data and settings are the same.
        same_labels: the method was trained on these classes, so that its online classifier can be
            scored.
        flops: of the training, for its rows.
        precision: of the networks; None: the training's.
    """
    ran = versions()
    about = {"flops": flops, "identity": identity(cfg), "commit": ran["commit"]}
    about |= {"machine": ran["hardware"], "torch": ran["torch"]}
    bf16 = "bf16" in str(precision or cfg.precision)
    fingerprint = _fingerprint(model, train, test, settings, bf16, same_labels)[:12]
    part = out.with_name(f"{out.name}.{fingerprint}.part")
    for other in set(out.parent.glob(f"{glob.escape(out.name)}.*.part")) - {part}:
        other.unlink()
    rows = _complete_rows(part)
    done = list(dict.fromkeys(row["model"] for row in rows))
    if done:
        print(f"continued after {', '.join(done)}, which are in {part.name}", flush=True)
    online: Any = model.classifier if same_labels else None
    networks = [_network(cfg.method, model.to(device), online)]
    if settings.references:
        networks.append(_network(UNTRAINED, fresh_method(cfg).to(device)))
    for row in evaluate(
        networks,
        train,
        test,
        augmentations(cfg),
        settings,
        seed=cfg.seed,
        bf16=bf16,
        device=device,
        num_workers=cfg.data.num_workers,
        done=done,
    ):
        row |= about
        rows.append(row)
        write_rows(part, row, rows)
        labels = f", {100 * row['labels']:g} % of the labels" if row["labels"] < 1 else ""
        what = ", ".join((row["model"], row["features"], describe_view(row), row["probe"]))
        print(f"{what}{labels}: {row['top1']:.2f}", flush=True)
    os.replace(part, out)
    return rows


def _network(name: str, method: pl.LightningModule, online: nn.Module | None = None) -> Network:
    return Network(name, encoder(method), find_pool(backbone_of(method)), online)


def describe_view(row: Mapping[str, Any]) -> str:
    """The view of a row in words: "whole", "dense at 2", "bag of 16 plain"."""
    if row["view"] == "bag":
        return f"bag of {row['view_patches']:g} {'augmented' if row['augmented'] else 'plain'}"
    return row["view"] if row["scale"] == 1 else f"{row['view']} at {row['scale']:g}"


def _fingerprint(
    model: pl.LightningModule,
    train: ImageData | ImageFiles,
    test: ImageData | ImageFiles,
    settings: Evaluation,
    *others: bool,
) -> str:
    """Of what the rows of an evaluation depend on; one image stands for all of its set."""
    about = asdict(settings), others, train.classes
    digest = hashlib.sha256(repr(about).encode())
    first = torch.tensor([0])
    images = train.fetch(first), test.fetch(first)
    for tensor in (*model.parameters(), *model.buffers(), train.targets, test.targets, *images):
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _complete_rows(part: Path) -> list[dict[str, Any]]:
    """Rows of an evaluation cut short, without those of the model that it was at."""
    if not part.exists():
        return []
    texts = ("precision", "identity", "commit", "torch")
    table = pd.read_csv(part, dtype=dict.fromkeys(texts, str))
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    return [row for row in rows if row["model"] != rows[-1]["model"]]


def print_table(rows: list[dict[str, Any]], title: str) -> None:
    """Print evaluation rows as a table."""
    table = Table(title=title)
    for column in ("model", "features", "view", "probe"):
        table.add_column(column)
    for column in ("labels %", "top-1 %", "top-5 %"):
        table.add_column(column, justify="right")
    for row in rows:
        figures = (f"{100 * row['labels']:g}", f"{row['top1']:.2f}", f"{row['top5']:.2f}")
        table.add_row(row["model"], row["features"], describe_view(row), row["probe"], *figures)
    Console().print(table)

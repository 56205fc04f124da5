"""Checkpoints of one CIFAR on both; the networks are untrained and the images few."""

import os
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest
import torch

from emp_plugin import cli
from emp_plugin.config import Probe, read_config, recipes_root, to_dict
from emp_plugin.data import ImageData
from emp_plugin.solo_learn import backbone_of
from emp_plugin.studies.rows import read_table
from emp_plugin.studies.tables import transfer_table
from emp_plugin.studies.transfer import COLUMNS
from emp_plugin.training.callbacks import CONFIG_KEY
from emp_plugin.training.folder import identity, versions
from emp_plugin.training.probing import fresh_method

CLASSES = {"cifar10": 10, "cifar100": 100}


def images(dataset, count, seed):
    draws = torch.Generator().manual_seed(seed)
    return ImageData(
        torch.randint(256, (count, 3, 32, 32), generator=draws, dtype=torch.uint8),
        torch.arange(count) % CLASSES[dataset],
        [str(c) for c in range(CLASSES[dataset])],
    )


@pytest.fixture
def data(monkeypatch):
    made = {
        name: (images(name, max(CLASSES[name], 20), 1 + number), images(name, 10, 11 + number))
        for number, name in enumerate(CLASSES)
    }
    monkeypatch.setattr("emp_plugin.training.probing.load_dataset", lambda name, *_: made[name])
    return made


@pytest.fixture
def checkpoint(config, tmp_path):
    def make(recipe, *overrides):
        cfg = config(recipe, *overrides)
        path = tmp_path / f"{cfg.name}=1.ckpt"  # as in epoch=1.ckpt
        method = fresh_method(cfg)
        progress = {"epoch_loop.batch_progress": {"total": {"processed": 7}}}
        contents = {CONFIG_KEY: to_dict(cfg), "global_step": 7, "loops": {"fit_loop": progress}}
        torch.save(contents | {"state_dict": method.state_dict()}, path)
        return path, method, cfg

    return make


def run(results, *items):
    """Exit status of the command line."""
    return cli.main(
        [
            "transfer",
            f"results_dir={results}",
            "accelerator=cpu",
            "evaluation.views=[whole]",
            "evaluation.linear.epochs=1",
            *map(str, items),
        ]
    )


def test_both_ways_with_the_normalisation_of_the_checkpoint(
    data, checkpoint, tmp_path, monkeypatch
):
    tiny = ("precision=32", "method_kwargs.proj_hidden_dim=16")
    simclr, method, cfg = checkpoint("cifar/simclr", "data.dataset=cifar100", *tiny)
    emp, _, _ = checkpoint("cifar/emp", "precision=32", "method_kwargs.embedding_dim=16")
    probed, protocol = [], import_module("emp_plugin.evaluation.protocol")
    original = protocol.nearest
    monkeypatch.setattr(
        protocol, "nearest", lambda x, *rest: probed.append(x) or original(x, *rest)
    )
    assert run(tmp_path / "out", simclr, emp, emp) == 0  # each once

    rows = read_table(tmp_path / "out" / "transfer.csv")
    assert list(rows.columns) == COLUMNS
    assert set(rows.probe) == {"linear", "online linear", "knn", "knn10"}
    assert set(rows["view"]) == {"whole"}
    assert set(rows.steps) == {7}
    assert set(rows[rows.name == "simclr-cifar100"].identity) == {identity(cfg)}
    about = versions()
    assert set(rows.commit) == {about["commit"]}
    assert set(rows.machine) == {about["hardware"]}
    reference = rows.method.isin(["raw pixels", "untrained"])
    ways = rows[~reference].drop_duplicates(["checkpoint", "dataset"])
    assert [tuple(row) for row in ways[["name", "trained_on", "dataset"]].values] == [
        ("simclr-cifar100", "cifar100", "cifar10"),
        ("simclr-cifar100", "cifar100", "cifar100"),
        ("emp-cifar10", "cifar10", "cifar10"),
        ("emp-cifar10", "cifar10", "cifar100"),
    ]
    online = rows[rows.probe == "online linear"]
    assert len(online)
    assert (online.trained_on == online.dataset).all()  # it knows no other classes
    assert set(rows[reference].name) == {"simclr-cifar100"}
    assert set(rows[reference].dataset) == {"cifar10", "cifar100"}

    # CIFAR-10's images as the network of CIFAR-100 was trained; raw pixels are probed before them
    statistics = cfg.data.normalisation["cifar100"]
    mean, std = (torch.tensor(statistics[key]).view(3, 1, 1) for key in ("mean", "std"))
    images = (data["cifar10"][0].images / 255 - mean) / std
    with torch.inference_mode():
        expected = backbone_of(method.eval())(images)
    torch.testing.assert_close(probed[1], expected, atol=1e-4, rtol=1e-4)

    knn = rows[(rows.name == "emp-cifar10") & (rows.dataset == "cifar100") & (rows.probe == "knn")]
    top1 = knn[knn.features == "embedding"].top1.iloc[0]
    _, cifar10, cifar100 = (tmp_path / "out" / "transfer.md").read_text().split("## ")
    assert cifar10.startswith("CIFAR-10\n")
    assert cifar100.startswith("CIFAR-100\n")
    start = "| emp-cifar10 | CIFAR-10 | 5 | embedding |"
    (line,) = [line for line in cifar100.splitlines() if line.startswith(start)]
    header = next(line for line in cifar100.splitlines() if line.startswith("| model"))
    figures = dict(zip(header.split(" | "), line.split(" | ")))
    assert figures["k-NN, whole"] == f"{top1:.2f}"
    assert "| raw pixels |  |  | pixels |" in cifar10


def test_what_was_probed_is_not_probed_again(data, checkpoint, tmp_path, monkeypatch):
    first, second = (
        checkpoint("cifar/emp", "precision=32", "method_kwargs.embedding_dim=16", f"name={name}")[0]
        for name in "ab"
    )
    out, probed, module = tmp_path / "out", [], import_module("emp_plugin.studies.transfer")
    original = module.probe_checkpoint

    def probe(settings):
        if len(probed) == 3:
            raise KeyboardInterrupt
        probed.append((Path(settings.pretrained_feature_extractor), settings.data.dataset))
        return original(settings)

    monkeypatch.setattr(module, "probe_checkpoint", probe)
    assert run(out, first, second)  # interrupted
    assert probed.pop(0) == (first, "cifar10")
    assert run(out, first, second) == 0
    assert probed == [(first, "cifar100"), (second, "cifar10"), (second, "cifar100")]
    rows = pd.read_csv(out / "transfer.csv")
    assert not rows.duplicated(
        ["checkpoint", "dataset", "method", "features", "view", "probe"]
    ).any()
    lines = (out / "transfer.md").read_text().splitlines()
    assert sum("| b |" in line for line in lines) == 4

    probed.clear()
    assert run(out, second) == 0
    assert [name for _, name in probed] == ["cifar10", "cifar100"]
    assert not any("| a |" in line for line in (out / "transfer.md").read_text().splitlines())

    probed.clear()
    os.utime(second, (0, 0))  # written again
    assert run(out, second) == 0
    assert len(probed) == 2

    probed[:] = 3 * [None]
    other = "evaluation.linear.lr=0.1"
    assert run(out, second, other)  # interrupted before any row of the new settings
    probed.clear()
    assert run(out, second, other) == 0
    assert len(probed) == 2


def test_checkpoints_of_the_same_name_are_told_apart():
    """As those of EMP-SSL with 20 and with 200 patches in the paper's tables 5 and 6."""
    row = {
        "name": "emp-cifar10",
        "trained_on": "cifar10",
        "seed": 0,
        "dataset": "cifar100",
        "method": "emp",
        "features": "backbone",
        "view": "whole",
        "view_patches": None,
        "augmented": False,
        "scale": 1.0,
        "probe": "knn",
        "labels": 1.0,
        "holdout": 0.0,
        "fraction": 0.2,
    }
    rows = [
        row | {"checkpoint": "a/last.ckpt", "top1": 1.0},
        row | {"checkpoint": "b/last.ckpt", "top1": 2.0},
        row | {"checkpoint": "c/last.ckpt", "seed": 1, "top1": 3.0},
    ]
    lines = transfer_table(pd.DataFrame(rows)).splitlines()
    assert lines[4] == "## CIFAR-100, 20 % of the training images"
    assert lines[-3:] == [
        "| emp-cifar10, a/last.ckpt | CIFAR-10 | 0 | backbone | 1.00 |",
        "| emp-cifar10, b/last.ckpt | CIFAR-10 | 0 | backbone | 2.00 |",
        "| emp-cifar10 | CIFAR-10 | 1 | backbone | 3.00 |",
    ]


def test_the_protocol_is_the_standard_one():
    """Of `emp probe`; scripts/knn has k-NN alone, of the same views."""

    def evaluation(*overrides):
        items = ["pretrained_feature_extractor=a.ckpt", *overrides]
        return read_config(recipes_root(), None, items, Probe).evaluation

    linear, knn = evaluation(), evaluation("evaluation.probes=[knn,knn10]")
    assert (linear.protocol, knn.protocol) == ("standard", "custom")
    assert list(linear.views) == list(knn.views) == ["whole", "dense"]
    assert list(linear.probes) == ["linear", "knn", "knn10"]
    assert list(knn.probes) == ["knn", "knn10"]
    published = evaluation("evaluation.protocol=published")
    assert (published.protocol, list(published.probes)) == ("published", ["published"])


def test_scales_of_dense_views_stand_with_the_checkpoints():
    about = {"trained_on": "cifar10", "seed": 0, "features": "backbone", "view": "dense"}
    about |= {"view_patches": None, "augmented": False, "probe": "linear", "labels": 1.0}
    about |= {"dataset": "cifar100", "holdout": 0.0, "fraction": -1}
    rows = [
        about | {"name": name, "checkpoint": name, "method": name, "scale": scale, "top1": top1}
        for name, scale, top1 in (("emp", 2.0, 40.0), ("byol", 1.5, 30.0))
    ]
    several = transfer_table(pd.DataFrame(rows)).splitlines()[-4:]
    assert several[0] == "| model | trained on | seed | features | scale | linear, dense |"
    assert several[2:] == [
        "| emp | CIFAR-10 | 0 | backbone | 2 | 40.00 |",
        "| byol | CIFAR-10 | 0 | backbone | 1.5 | 30.00 |",
    ]
    one = transfer_table(pd.DataFrame(rows[:1])).splitlines()[-3:]
    assert one[0] == "| model | trained on | seed | features | linear, dense at 2 |"
    assert one[2] == "| emp | CIFAR-10 | 0 | backbone | 40.00 |"


def test_mistakes_are_named_before_anything_is_probed(data, checkpoint, tmp_path, capsys):
    good = checkpoint("cifar/emp", "method_kwargs.embedding_dim=16")[0]
    assert run(tmp_path / "out") == 1
    assert "name the checkpoints" in capsys.readouterr().err
    assert run(tmp_path / "out", good, tmp_path / "none.ckpt") == 1
    assert "none.ckpt is not a file" in capsys.readouterr().err
    assert run(tmp_path / "out", good, "evaluation.prob=1") == 1
    assert "unknown setting" in capsys.readouterr().err
    assert not (tmp_path / "out" / "transfer.csv").exists()

"""Checkpoints of one CIFAR on both; the networks are untrained and the images few."""

import os
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf

from emp_plugin import main_transfer
from emp_plugin.data import ImageData
from emp_plugin.solo_learn import backbone_of
from emp_plugin.studies.report import transfer_table
from emp_plugin.training.callbacks import CONFIG_KEY
from emp_plugin.training.probing import fresh_method
from support import SCRIPTS

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
        torch.save(
            {"state_dict": method.state_dict(), CONFIG_KEY: OmegaConf.to_container(cfg)}, path
        )
        return path, method, cfg

    return make


def run(results, *items):
    return main_transfer.main(
        [
            "--config-path",
            str(SCRIPTS / "linear" / "cifar"),
            "--config-name",
            "emp",
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
    simclr, method, cfg = checkpoint(
        "cifar/simclr", "precision=32", "data.dataset=cifar100", "method_kwargs.proj_hidden_dim=16"
    )
    emp, _, _ = checkpoint("cifar/emp", "precision=32", "method_kwargs.embedding_dim=16")
    probed, evaluation = [], import_module("emp_plugin.evaluation.evaluate")
    original = evaluation.knn_probe
    monkeypatch.setattr(
        evaluation,
        "knn_probe",
        lambda x, *rest, **more: probed.append(x) or original(x, *rest, **more),
    )
    assert run(tmp_path / "out", simclr, emp, emp) == 0  # each once

    rows = pd.read_csv(tmp_path / "out" / "transfer.csv")
    ways = rows[~rows.model.isin(["raw pixels", "untrained"])].drop_duplicates(
        ["checkpoint", "dataset"]
    )
    assert [tuple(row) for row in ways[["name", "trained_on", "dataset"]].values] == [
        ("simclr-cifar100", "cifar100", "cifar10"),
        ("simclr-cifar100", "cifar100", "cifar100"),
        ("emp-cifar10", "cifar10", "cifar10"),
        ("emp-cifar10", "cifar10", "cifar100"),
    ]
    assert set(
        rows[rows.probe == "online linear"].apply(lambda row: row.trained_on == row.dataset, axis=1)
    ) == {True}  # it knows no other classes
    references = rows[rows.model.isin(["raw pixels", "untrained"])]
    assert set(references.name) == {"simclr-cifar100"}
    assert set(references.dataset) == {
        "cifar10",
        "cifar100",
    }

    # features of CIFAR-10's images as the network of CIFAR-100 was trained: raw pixels come first, then the trained method
    mean, std = (
        torch.tensor(cfg.data.normalisation.cifar100[key]).view(3, 1, 1) for key in ("mean", "std")
    )
    with torch.inference_mode():
        expected = backbone_of(method.eval())((data["cifar10"][0].images / 255 - mean) / std)
    torch.testing.assert_close(probed[1], expected, atol=1e-4, rtol=1e-4)

    text = (tmp_path / "out" / "transfer.md").read_text()
    cell = rows[
        (rows.name == "emp-cifar10")
        & (rows.dataset == "cifar100")
        & (rows.features == "embedding")
        & (rows.probe == "knn")
    ].top1.iloc[0]
    tables = text.split("## ")
    assert tables[1].startswith("CIFAR-10\n")
    assert tables[2].startswith("CIFAR-100\n")
    (line,) = [
        line
        for line in tables[2].splitlines()
        if line.startswith("| emp-cifar10 | CIFAR-10 | 5 | embedding |")
    ]
    assert line.endswith(f"| {cell:.2f} |")
    assert "| raw pixels |  |  | pixels |" in tables[1]


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
    rows, lines = pd.read_csv(out / "transfer.csv"), (out / "transfer.md").read_text().splitlines()
    assert len(rows) == len(
        rows.drop_duplicates(["checkpoint", "dataset", "model", "features", "view", "probe"])
    )
    assert sum("| b |" in line for line in lines) == 4

    probed.clear()
    assert run(out, second) == 0
    assert [name for _, name in probed] == [
        "cifar10",
        "cifar100",
    ]
    assert not any("| a |" in line for line in (out / "transfer.md").read_text().splitlines())
    probed.clear()
    os.utime(second, (0, 0))  # written again
    assert run(out, second) == 0
    assert len(probed) == 2
    probed.clear()
    probed += 3 * [None]
    assert run(
        out, second, "evaluation.linear.lr=0.1"
    )  # interrupted before any row of the new settings
    probed.clear()
    assert run(out, second, "evaluation.linear.lr=0.1") == 0
    assert len(probed) == 2


def test_checkpoints_of_the_same_name_are_told_apart():
    """As those of EMP-SSL with 20 and with 200 patches in the paper's tables 5 and 6."""
    row = {
        "name": "emp-cifar10",
        "trained_on": "cifar10",
        "seed": 0,
        "dataset": "cifar100",
        "model": "emp",
        "features": "backbone",
        "view": "whole",
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


def test_mistakes_are_named_before_anything_is_probed(data, checkpoint, tmp_path, capsys):
    good = checkpoint("cifar/emp", "method_kwargs.embedding_dim=16")[0]
    assert run(tmp_path / "out") == 1
    assert "name the checkpoints" in capsys.readouterr().err
    assert run(tmp_path / "out", good, tmp_path / "none.ckpt") == 1
    assert "none.ckpt is not a file" in capsys.readouterr().err
    assert run(tmp_path / "out", good, "evaluation.prob=1") == 1
    assert "unknown setting" in capsys.readouterr().err
    assert not (tmp_path / "out" / "transfer.csv").exists()

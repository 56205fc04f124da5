"""Features on images they were not trained on: checkpoints of one CIFAR, probed on both.

These are tables 5 and 6 of arXiv 2304.03977.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from emp_plugin.config import Probe, Run, read_config, recipes_root
from emp_plugin.data.files import make_output_folder
from emp_plugin.errors import UserError
from emp_plugin.studies.rows import (
    ACCURACIES,
    OF_PROBE,
    OF_VERSIONS,
    REFERENCES,
    read_table,
    version_columns,
)
from emp_plugin.studies.tables import transfer_table
from emp_plugin.training.folder import identity, versions, write_settings, write_text
from emp_plugin.training.probing import load_method, probe_checkpoint, probed_data

DATASETS = ("cifar10", "cifar100")
# with the names that they have in results.csv, where that has them
COLUMNS = [
    "name",
    "trained_on",
    "checkpoint",
    "modified",
    "dataset",
    "holdout",
    "fraction",
    "method",
    "seed",
    "steps",
    *OF_PROBE,
    *ACCURACIES,
    "identity",
    *OF_VERSIONS,
]
SETTINGS, ROWS, TABLE = "transfer.yaml", "transfer.csv", "transfer.md"


def transfer(checkpoints: list[str], results: Path, overrides: list[str]) -> None:
    """Probe every checkpoint on both CIFARs, as ``emp probe`` does.

    ``transfer.csv`` and ``transfer.md`` are written after each. Images are normalised, and patches
    cut, as the checkpoint was trained. Raw pixels and the untrained network come with the first
    checkpoint.

    Called again with the same settings, it probes what has not been or was written since.
    Checkpoints that are not named any more leave the table.

    Args:
        checkpoints: paths.
        results: folder of the table.
        overrides: as of ``emp probe``.

    Raises:
        UserError: for no checkpoint, one that cannot be read (before anything is probed), or
            settings and data as ``emp probe``.
    """
    if not checkpoints:
        raise UserError("name the checkpoints to probe: outputs/emp/RUN/last.ckpt ...")
    probes = []
    for path in checkpoints:
        _, run, saved = load_method(path)
        for dataset in DATASETS:
            given = [
                f"pretrained_feature_extractor={path}",
                f"data.dataset={dataset}",
                f"evaluation.references={path == checkpoints[0]}",
            ]
            probe = read_config(recipes_root(), None, [*given, *overrides], Probe)
            probes.append((probe, _about(path, run, saved, probe)))
    settings = asdict(probes[0][0])  # as resolved on this machine
    del settings["pretrained_feature_extractor"], settings["data"]["dataset"]
    before = _rows_before(results, settings)
    parts = [_done(before, about, probe.evaluation.references) for probe, about in probes]

    make_output_folder(results)
    if not before:
        for name in (ROWS, TABLE):  # of other settings
            (results / name).unlink(missing_ok=True)
    used = {"command": " ".join(sys.argv), "probe": settings}
    write_settings(results / SETTINGS, used)
    for number, (probe, about) in enumerate(probes):
        done = ": done" if parts[number] else ""
        what = f"{about['checkpoint']} on {about['dataset']}"
        print(f"\n[{number + 1}/{len(probes)}] {what}{done}", flush=True)
        if not done:
            common = about | version_columns(versions())
            made = probe_checkpoint(probe)
            parts[number] = [common | row | {"method": row["model"]} for row in made]
        table = pd.DataFrame([row for part in parts for row in part], columns=COLUMNS)
        write_text(results / ROWS, table.to_csv(index=False))
        write_text(results / TABLE, transfer_table(read_table(results / ROWS)))
    print(f"results: {results}")


def _about(path: str, run: Run, saved: dict[str, Any], probe: Probe) -> dict[str, Any]:
    """What all rows of a checkpoint on a dataset have in common, whatever evaluates it."""
    data = probed_data(run, probe)
    return {
        "name": run.name,
        "seed": run.seed,
        "steps": saved["global_step"],
        "identity": identity(run),
        "trained_on": run.data.dataset,
        "dataset": data.dataset,
        "checkpoint": path,
        "modified": int(Path(path).expanduser().stat().st_mtime),
        "holdout": data.holdout,
        "fraction": data.fraction,
    }


def _rows_before(results: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Of an earlier call with the same settings."""
    if not (results / SETTINGS).exists() or not (results / ROWS).exists():
        return []
    if yaml.safe_load((results / SETTINGS).read_text()).get("probe") != settings:
        return []
    return read_table(results / ROWS).to_dict("records")


def _done(
    rows: list[dict[str, Any]], about: dict[str, Any], references: bool
) -> list[dict[str, Any]]:
    """The rows of one checkpoint on one dataset, or none if some are missing.

    Those of the references are among them only where wanted.
    """
    there = [row for row in rows if row.items() >= about.items()]
    methods = [row for row in there if row["method"] not in REFERENCES]
    if not references:
        return methods
    return there if len(there) > len(methods) else []

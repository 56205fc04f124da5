"""Features on images they were not trained on: checkpoints of one CIFAR probed on the other, and on their own (arXiv 2304.03977, tables 5 and 6)."""
from pathlib import Path

import pandas as pd

from emp_plugin.comparison.report import transfer_table
from emp_plugin.configuration import Probe, read_config
from emp_plugin.errors import UserError
from emp_plugin.runs.folder import write_text
from emp_plugin.runs.probing import load_method, probe_checkpoint

DATASETS = ("cifar10", "cifar100")
PROBES = "evaluation.probes=[linear,knn]"


def transfer(checkpoints: list[str], results: Path, config_path: str, config_name: str, overrides: list[str]) -> None:
    """Probe every checkpoint on both CIFARs, as ``main_linear`` and ``main_knn`` do, and write ``transfer.csv`` and ``transfer.md`` after each.

    Images are normalised, and patches cut, as the checkpoint was trained. Raw pixels and the untrained network come with the first checkpoint.

    Args:
        checkpoints: paths.
        results: folder of the table.
        config_path, config_name, overrides: as of ``main_linear``.

    Raises:
        UserError: for no checkpoint, one that cannot be read (before anything is probed), or settings and data as ``main_linear``.
    """
    if not checkpoints:
        raise UserError("name the checkpoints to probe: trained_models/emp/RUN/last.ckpt ...")
    trained = [load_method(path)[1] for path in checkpoints]
    results.mkdir(parents=True, exist_ok=True)
    rows = []
    for path, run in zip(checkpoints, trained):
        for dataset in DATASETS:
            given = [f"pretrained_feature_extractor={path}", f"data.dataset={dataset}", PROBES, f"evaluation.references={path == checkpoints[0]}"]
            probe = read_config(config_path, config_name, [*given, *overrides], Probe)
            about = {"name": run.name, "method": run.method, "seed": run.seed, "trained_on": run.data.dataset, "dataset": dataset, "checkpoint": path}
            rows += [about | row for row in probe_checkpoint(probe)]
            write_text(results / "transfer.csv", pd.DataFrame(rows).to_csv(index=False))
            write_text(results / "transfer.md", transfer_table(pd.DataFrame(rows)))
    print(f"results: {results}")

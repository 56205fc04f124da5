"""Draw docs/is-it-learning.png: the two gauges of runs that learn, and of runs that collapse.

    python benchmarks/collapse.py            from docs/is-it-learning.csv
    python benchmarks/collapse.py FOLDER     from runs, whose rows go into that file first

FOLDER holds a folder of one run for each name that is to be drawn: METHOD or METHOD-collapsed.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (the backend has to be chosen first)
import pandas as pd  # noqa: E402

PAGE = Path(__file__).parent.parent / "docs" / "is-it-learning"
METHODS = {  # Okabe and Ito's colours
    "emp": "#000000",
    "simclr": "#E69F00",
    "byol": "#56B4E9",
    "vicreg": "#009E73",
    "swav": "#D55E00",
    "ressl": "#CC79A7",
}
GAUGES = {"train_rank": "effective rank", "train_std": "spread"}


def collect(folder: Path) -> pd.DataFrame:
    """Rows (run, step, both gauges) of the metrics.csv below ``folder``."""
    tables = []
    for path in sorted(folder.glob("*/*/*/metrics.csv")):
        rows = pd.read_csv(path)[["step", *GAUGES]].dropna()
        rows.insert(0, "run", path.relative_to(folder).parts[0])
        tables.append(rows)
    return pd.concat(tables).round(4)


def draw(rows: pd.DataFrame, path: Path) -> None:
    """Two rows of panels, the gauges, and two columns: what learns, and what collapses."""
    figure, axes = plt.subplots(
        2, 2, figsize=(8, 5), sharex=True, sharey="row", layout="constrained"
    )
    for column, (title, suffix) in enumerate([("learning", ""), ("collapsing", "-collapsed")]):
        axes[0, column].set_title(title, fontsize=11)
        axes[1, column].set_xlabel("optimiser step")
        for axis, (gauge, label) in zip(axes[:, column], GAUGES.items()):
            for method, colour in METHODS.items():
                run = rows[rows.run == method + suffix]
                axis.plot(run.step, run[gauge], color=colour, linewidth=1.6, label=method)
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
            if column == 0:
                axis.set_ylabel(label)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    table = PAGE.with_suffix(".csv")
    if sys.argv[1:]:
        collect(Path(sys.argv[1])).to_csv(table, index=False)
    draw(pd.read_csv(table), PAGE.with_suffix(".png"))


if __name__ == "__main__":
    main()

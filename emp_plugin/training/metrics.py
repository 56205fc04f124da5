"""metrics.csv: what training logs, kept exact through kills."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emp_plugin.solo_learn import pl
from emp_plugin.training.folder import write_rows


class MetricsCSV(pl.loggers.Logger):
    """One row for each of Lightning's calls, on disk at once.

    A new column rewrites the file under a temporary name. Lightning's own CSVLogger does it in
    place, where a kill loses all rows, and deletes the file of a run that it continues.

    Args:
        path: of the file. Of an earlier process's rows those of steps before ``step`` stay, to the
            letter.
        step: optimiser steps that the run has behind it.
    """

    def __init__(self, path: Path, step: int):
        super().__init__()
        self.path = path
        self.columns: list[str] = []
        rows = [row for row in self._rows() if int(row["step"]) < step]
        if rows:
            write_rows(path, self.columns, rows)
        else:
            path.unlink(missing_ok=True)
            self.columns = []

    def _rows(self) -> list[dict[str, str]]:
        """The rows on disk, without a last one that was cut off; notes the columns."""
        text = self.path.read_text() if self.path.exists() else ""
        reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
        self.columns = list(reader.fieldnames or [])
        return list(reader)

    @pl.utilities.rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {"step": step, **metrics}
        new = [name for name in row if name not in self.columns]
        if new:
            rows = self._rows()
            self.columns += new
            write_rows(self.path, self.columns, [*rows, row])
        else:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(row)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """config.yaml has them."""

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

"""From results.csv to its tables and figures; nothing else is needed."""

from pathlib import Path

from emp_plugin.errors import UserError
from emp_plugin.studies.figures import draw_ablation, draw_convergence
from emp_plugin.studies.rows import read_rows
from emp_plugin.studies.tables import table, time_to_accuracy
from emp_plugin.training.folder import write_text


def write_report(results: Path, folder: Path, thresholds: list[float]) -> None:
    """Write table.md, time_to_accuracy.md and convergence.png, of an ablation ablation.png.

    Args:
        results: CSV with the columns of :data:`emp_plugin.studies.rows.COLUMNS`.
        folder: of the study.
        thresholds: top-1 accuracies in percent for time_to_accuracy.md.

    Raises:
        UserError: there is no such CSV.
    """
    if not results.is_file():
        raise UserError(f"{results} is not there: run the study without report_only first")
    rows = read_rows(results)
    write_text(folder / "table.md", table(rows))
    write_text(folder / "time_to_accuracy.md", time_to_accuracy(rows, thresholds))
    if rows.setting.any():
        draw_ablation(rows, folder / "ablation.png")
    else:
        draw_convergence(rows, folder / "convergence.png")

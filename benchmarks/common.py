"""Side-by-side timing, and the table and JSON that every benchmark leaves."""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from emp_plugin.training.folder import versions, write_text

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def arguments(description: str, trials: int) -> argparse.Namespace:
    """``--json FILE --trials N``, and ``--small``, whose figures mean nothing."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--trials", type=int, default=trials)
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs")
    return parser.parse_args()


def seconds(function: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call, the device's work included."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def side_by_side(
    ours: Callable[[], Any], reference: Callable[[], Any], trials: int
) -> dict[str, Any]:
    """Times both ``trials`` times after one warm-up each, in turn: a slow machine slows both.

    Returns what :func:`case` does.
    """
    ours(), reference()
    pairs = [(seconds(ours), seconds(reference)) for _ in range(trials)]
    return case(*map(list, zip(*pairs)))


def case(ours: list[float], reference: list[float] | None) -> dict[str, Any]:
    """Seconds of paired trials -> median, min and max of each, and the median of their ratios.

    Without a reference only ours.
    """
    if reference is None:
        return {"ours": _spread(ours), "reference": None, "ratio": None}
    ratio = statistics.median(b / a for a, b in zip(ours, reference))
    return {"ours": _spread(ours), "reference": _spread(reference), "ratio": ratio}


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def report(title: str, cases: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    """Prints the cases and writes them as one JSON object.

    A case holds at least ours, reference and ratio (reference / ours), and perhaps peak_mb.
    """
    hardware = versions()["hardware"]
    table = Table(title=f"{title} ({args.trials} trials, {hardware}, torch {torch.__version__})")
    columns = "case", "ours: median s (min to max)", "reference", "reference / ours", "peak MB"
    for column in columns:
        table.add_column(column)
    for name, measured in cases.items():
        times = [
            f"{t['median']:.4g} ({t['min']:.4g} to {t['max']:.4g})" if t else ""
            for t in (measured["ours"], measured["reference"])
        ]
        ratio = f"{measured['ratio']:.2f}" if measured["ratio"] else ""
        table.add_row(name, *times, ratio, str(measured.get("peak_mb", "")))
    Console(width=150).print(table)
    if args.json:
        written = {
            "benchmark": title,
            "hardware": f"{hardware}, {torch.get_num_threads()} threads",
            "versions": versions(),
            "trials": args.trials,
            "small": args.small,
            "cases": cases,
        }
        write_text(args.json, json.dumps(written, indent=2) + "\n")

"""The figures in `results/*.json` as README.md's Markdown table: `python benchmarks/table.py`."""

import json
from pathlib import Path

RESULTS = Path(__file__).with_name("results")
COLUMNS = (
    "benchmark",
    "case",
    "ours, s (min to max)",
    "reference, s (min to max)",
    "reference / ours",
    "trials",
)


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    print(row(*COLUMNS))
    print("|---" * len(COLUMNS) + "|")
    # long_run.json has no times
    for path in sorted(set(RESULTS.glob("*.json")) - {RESULTS / "long_run.json"}):
        data = json.loads(path.read_text())
        for name, case in data["cases"].items():
            times = [
                f"{t['median']:.3g} ({t['min']:.3g} to {t['max']:.3g})" if t else ""
                for t in (case["ours"], case["reference"])
            ]
            ratio = f"{case['ratio']:.2f}" if case["ratio"] else ""
            peak = f"; peak {case['peak_mb']} MB" if "peak_mb" in case else ""
            trials = case.get("trials", data["trials"])
            print(row(f"`{path.stem}`", name + peak, *times, ratio, trials))


if __name__ == "__main__":
    main()

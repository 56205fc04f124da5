"""The figures in `results/*.json` as the Markdown table of README.md: `python benchmarks/table.py`."""

import json
from pathlib import Path


def main() -> None:
    print(
        "| benchmark | case | ours, s (min to max) | reference, s (min to max) | reference / ours | trials |\n|---|---|---|---|---|---|"
    )
    for path in sorted(
        set(Path(__file__).with_name("results").glob("*.json"))
        - {Path(__file__).with_name("results") / "long_run.json"}
    ):  # no times
        data = json.loads(path.read_text())
        for name, case in data["cases"].items():
            times = [
                f"{t['median']:.3g} ({t['min']:.3g} to {t['max']:.3g})" if t else ""
                for t in (case["ours"], case["reference"])
            ]
            ratio = f"{case['ratio']:.2f}" if case["ratio"] else ""
            peak = f"; peak {case['peak_mb']} MB" if "peak_mb" in case else ""
            print(
                f"| `{path.stem}` | {name}{peak} | {times[0]} | {times[1]} | {ratio} | {case.get('trials', data['trials'])} |"
            )


if __name__ == "__main__":
    main()

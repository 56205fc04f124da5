"""The study that waits for a GPU, in parts; each is useful alone, and goes on where it was cut off.

    bash benchmarks/gpu_study.sh --parts speed,two --out outputs/gpu --data datasets

Parts, in the order in which they are worth their time:

- speed: steps a second of every method, beside its bare network; three of them compiled, too.
- two: EMP-SSL for one and for two epochs, by the protocols standard and published.
- ten: EMP-SSL for ten epochs, by standard at the end and by quick on the way.
- rates: six methods at the training FLOPs of one epoch of emp_native, with their learning rate as
  published, a third and a tenth of it, on held-out images.
- equal: the same methods, each with the best of these rates, at these FLOPs and at a quarter of
  them, three seeds, all images.
- minutes: six methods, one minute of training each.
- native: emp_native for one minute and for three.
- cifar100: EMP-SSL for ten epochs of CIFAR-100, whose folder --data is then.

Runs of rates and equal train side by side, as small steps leave a large GPU idle: their
minutes say nothing. Every part leaves results.csv in its folder; --small only shows that it runs.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd

from emp_plugin.config import read_config
from emp_plugin.studies.rows import read_table
from emp_plugin.studies.run import RESULTS
from emp_plugin.training.folder import write_text

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "scripts" / "pretrain"
PARTS = ("speed", "two", "ten", "rates", "equal", "minutes", "native", "cifar100")
METHODS = ("emp_native", "simclr", "byol", "vicreg", "swav", "ressl")
EQUAL = (f"methods=[{','.join(METHODS)}]", "budget=flops")  # those of emp_native's epochs
SMALL = (
    "data.dataset=digits",
    "++data.normalisation.digits={mean:[0.5,0.5,0.5],std:[0.5,0.5,0.5]}",
    "optimizer.batch_size=16",
)
HELD_OUT = ("data.holdout=0.1", "data.fraction=0.2", "evaluation.protocol=quick")
FACTORS = (1, 1 / 3, 0.1)  # of the published learning rates


class Parts:
    """The parts by name.

    Args:
        out: folder of the study.
        overrides: of every run.
        at_once: runs that train side by side.
        small: tiny runs.
    """

    def __init__(self, out: Path, overrides: list[str], at_once: int, small: bool):
        self.out, self.overrides, self.at_once, self.small = out, overrides, at_once, small

    def speed(self) -> None:
        options = ["--small"] if self.small else ["--trials", "3"]
        script = ROOT / "benchmarks" / "throughput.py"
        self._run("speed", [str(script), *options, "--json", str(self.out / "speed.json")])

    def ten(self) -> None:
        epochs, every = (2, 1) if self.small else (10, 2)
        self._compare("ten", "methods=[emp]", f"epochs=[{epochs}]", f"evaluate_every={every}")

    def two(self) -> None:
        self._compare("two", "methods=[emp]", "epochs=[1,2]")
        for run in sorted(path.parent for path in self.out.glob("two/runs/*/*/summary.json")):
            if (run / "published-cifar10-last.csv").exists():
                continue
            probe = ["-m", "emp_plugin", "probe", str(run / "last.ckpt")]
            protocol = "quick" if self.small else "published"  # whose bags take a CPU minutes
            probe += [f"evaluation.protocol={protocol}", "evaluation.references=False"]
            data = [item for item in self.overrides if item.startswith("data.train_path")]
            self._run(f"published-{run.name}", [*probe, *data])

    def rates(self) -> None:
        settings = {factor: self._rates(dict.fromkeys(METHODS, factor)) for factor in FACTORS}

        def compare(factor: float) -> None:
            at_once = f"at_once={max(1, self.at_once // len(FACTORS))}"
            rates = settings[factor]
            self._compare(f"rates/{factor:.2g}", *EQUAL, "epochs=[1]", at_once, *rates, *HELD_OUT)

        with ThreadPoolExecutor(len(FACTORS)) as pool:
            list(pool.map(compare, FACTORS))

    def equal(self) -> None:
        tried = {factor: self.out / "rates" / f"{factor:.2g}" / RESULTS for factor in FACTORS}
        best = best_factors({of: read_table(path) for of, path in tried.items() if path.exists()})
        if missing := set(METHODS) - set(best):
            raise SystemExit(f"run part rates first: there are no rates of {', '.join(missing)}")
        lengths = ["epochs=[0.25,1]", "seeds=[0,1,2]", f"at_once={self.at_once}"]
        self._compare("equal", *EQUAL, *lengths, *self._rates(best))

    def _rates(self, factors: dict[str, float]) -> list[str]:
        """Overrides of a comparison: these factors of the recipes' learning rates, by method."""
        published = {name: read_config(str(RECIPES), f"cifar/{name}", []) for name in factors}
        return [
            f"{name}.optimizer.lr={factor * published[name].optimizer.lr:.4g}"
            for name, factor in factors.items()
        ]

    def minutes(self) -> None:
        self._compare("minutes", "budget=minutes", f"minutes=[{0.02 if self.small else 1}]")

    def native(self) -> None:
        minutes = "[0.02]" if self.small else "[1,3]"
        self._compare("native", "methods=[emp_native]", "budget=minutes", f"minutes={minutes}")

    def cifar100(self) -> None:
        epochs = f"epochs=[{1 if self.small else 10}]"
        self._compare("cifar100", "methods=[emp]", epochs, dataset="cifar100")

    def _compare(self, name: str, *settings: str, dataset: str = "cifar10") -> None:
        """A comparison in the folder of this name."""
        emp = "emp_native" if "emp_native" in " ".join(settings) else "emp"
        small = ["data.fraction=0.05", f"{emp}.data.num_patches=2"] if self.small else []
        command = ["-m", "emp_plugin", "compare", dataset, *self.overrides, *settings, *small]
        self._run(name, [*command, f"results_dir={self.out / name}"])

    def _run(self, name: str, command: list[str]) -> None:
        """Run Python with the command; what it says is in ``<name>.log``."""
        log = self.out / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            status = subprocess.run([sys.executable, *command], stdout=file, stderr=file).returncode
        print(f"{name}: {'done' if status == 0 else f'failed, see {log}'}", flush=True)


def best_factors(tried: dict[float, pd.DataFrame]) -> dict[str, float]:
    """By method, the factor of its learning rate with the best linear probe of the backbone.

    Of whole and dense the better one counts.

    Args:
        tried: rows by factor.
    """
    if not tried:
        return {}
    tables = [table.assign(factor=factor) for factor, table in tried.items()]
    rows = pd.concat(tables, ignore_index=True)
    linear = (rows.probe == "linear") & (rows.features == "backbone") & rows.method.isin(METHODS)
    best = rows.loc[rows[linear].groupby("method").top1.idxmax()]
    return dict(zip(best.method, best.factor))


def parts_of(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(PARTS):
        raise argparse.ArgumentTypeError(f"no part {', '.join(unknown)}; {', '.join(PARTS)}")
    return names


def write_page(out: Path) -> None:
    """page.md, of whatever rows there are."""
    lines = ["# What the GPU study has so far", ""]
    if (out / "speed.json").exists():
        speed = json.loads((out / "speed.json").read_text())
        lines += [f"## Speed ({speed['hardware']}, torch {speed['versions']['torch']})", ""]
        header = ("case", "a step, ms", "bare, ms", "step / bare", "views a second")
        lines += _markdown(header, [_speed(*item) for item in speed["cases"].items()])
    for table in sorted(out.glob("**/table.md")):
        text = [line for line in table.read_text().splitlines() if not line.startswith("# ")]
        lines += [f"## {table.parent.relative_to(out)}", *text, ""]
    header = ("run", "features", "published probe, bag of 128 augmented")
    found = sorted(out.glob("two/runs/*/*/published-*.csv"))
    rows = [(path.parent.name, row) for path in found for row in pd.read_csv(path).itertuples()]
    lines += _markdown(header, [(run, row.features, f"{row.top1:.2f}") for run, row in rows])
    write_text(out / "page.md", "\n".join(lines) + "\n")


def _speed(name: str, case: dict) -> tuple[str, ...]:
    ours, bare = (1000 * case[key]["median"] for key in ("ours", "reference"))
    views = f"{case['views_per_second']:,}"
    return name, f"{ours:.1f}", f"{bare:.1f}", f"{1 / case['ratio']:.2f}", views


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows)] + [""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", type=parts_of, required=True, help=",".join(PARTS))
    parser.add_argument("--out", type=Path, required=True, help="folder of the study")
    parser.add_argument("--data", default="./datasets", help="folder of CIFAR-10")
    parser.add_argument("--at-once", type=int, default=12, help="runs that train side by side")
    parser.add_argument("--small", action="store_true", help="tiny runs on digits, to see it work")
    args = parser.parse_args()
    overrides = [f"data.train_path={args.data}", "enable_progress_bar=False"]
    if args.small:
        overrides = [*SMALL, "enable_progress_bar=False"]
    parts = Parts(args.out, overrides, args.at_once, args.small)
    for name in args.parts:
        getattr(parts, name)()
        write_page(args.out)
    print(f"results: {args.out}")


if __name__ == "__main__":
    main()

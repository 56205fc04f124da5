"""Memory and open files over 2,000 steps of a tiny run, and the cost of reading a large folder.

The run is without and with worker processes. The folder has 100,000 images.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from common import arguments
from PIL import Image
from rich.console import Console
from rich.table import Table

from emp_plugin.training.folder import versions, write_text

TINY = [
    "precision=32",
    "backbone.name=vit_tiny",
    "backbone.kwargs={patch_size: 16}",
    "backbone.stem_padding=null",
    "data.num_patches=1",
    "data.image_size=32",
    "data.output_size=32",
    "method_kwargs.embedding_dim=8",
    "method_kwargs.proj_hidden_dim=8",
    "method_kwargs.proj_output_dim=8",
    "optimizer.batch_size=4",
    "limit_val_batches=1",
    "evaluation.enabled=False",
    "accelerator=cpu",
    "enable_progress_bar=False",
    "auto_resume.enabled=False",
    "knn_eval.enabled=True",
    "log_every_n_steps=10",
]
# Prints images, seconds, and the peak memory in KB before and after reading them.
START_UP = """
import resource, sys, time
from emp_plugin.data import load_dataset

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before, began = peak(), time.perf_counter()
images = len(load_dataset("cifar10", sys.argv[1])[0])
print(images, time.perf_counter() - began, before, peak())
"""


def family(pid: int) -> list[int]:
    """A process and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(int(child) for child in children)]


def usage(pid: int) -> tuple[float, int]:
    """Resident memory of a process in MB, and open files of it and its children.

    Memory is of the process alone, because workers share its pages.
    """
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    files = sum(len(os.listdir(f"/proc/{one}/fd")) for one in family(pid))
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, files


def long_run(epochs: int, batches: int, workers: int) -> dict[str, Any]:
    """Seconds, memory and open files of a run, sampled four times a second."""
    samples = []  # (step, MB, open files)
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            *("-m", "emp_plugin", "pretrain", "digits/emp"),
            *TINY,
            f"checkpoint.dir={folder}",
            f"max_epochs={epochs}",
            f"limit_train_batches={batches}",
            f"data.num_workers={workers}",
        ]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        began = time.perf_counter()
        while process.poll() is None:
            time.sleep(0.25)
            for metrics in Path(folder).glob("emp/*/metrics.csv"):
                # it may just have ended, or be writing a line
                with suppress(OSError, IndexError, ValueError):
                    last = metrics.read_text().splitlines()[-1]
                    samples.append((int(last.split(",")[0]), *usage(process.pid)))
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} failed")
    steps = epochs * batches
    marks = {}
    # not at the very end, which holds the last checkpoint and pictures
    for part in (0.1, 0.25, 0.5, 0.75, 0.95):
        step, memory, files = min(samples, key=lambda sample: abs(sample[0] - part * steps))
        marks[f"step {step}"] = {"MB": round(memory, 1), "open files": files}
    return {
        "steps": steps,
        "workers": workers,
        "seconds": round(time.perf_counter() - began, 1),
        "at": marks,
        "most open files": max(files for _, _, files in samples),
        "peak MB": round(max(memory for _, memory, _ in samples), 1),
    }


def start_up(images: int) -> dict[str, Any]:
    """Seconds and memory of reading a folder of 32x32 PNG files."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as root:
        for split, count in (("train", images), ("test", 10)):
            for label in range(10):
                folder = Path(root, split, str(label))
                folder.mkdir(parents=True)
                for i in range(count // 10):
                    pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{i}.png", compress_level=0)
        command = [sys.executable, "-c", START_UP, root]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    count, seconds, before, after = (float(value) for value in answer.stdout.split())
    return {
        "images": int(count),
        "seconds": round(seconds, 1),
        "images per second": round(count / seconds),
        "MB before": round(before / 1024),
        "peak MB": round(after / 1024),
    }


def main() -> None:
    args = arguments(__doc__.splitlines()[0], trials=1)
    epochs, batches, images = (2, 20, 1000) if args.small else (6, 334, 100_000)
    cases = {
        "no workers": long_run(epochs, batches, 0),
        "2 workers": long_run(epochs, batches, 2),
        "start-up": start_up(images),
    }
    hardware = versions()["hardware"]
    table = Table("case", "figures", title=f"a long run and a large folder ({hardware})")
    for name, case in cases.items():
        table.add_row(name, json.dumps(case))
    Console().print(table)
    if args.json:
        written = {
            "benchmark": "long run",
            "hardware": hardware,
            "versions": versions(),
            "small": args.small,
            "cases": cases,
        }
        write_text(args.json, json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()

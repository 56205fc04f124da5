"""Peak memory and time of training steps against the number of patches and `method_kwargs.patch_chunk`.

Every line is a process of its own, which trains through Lightning on digits and measures its own peak: resident memory on a CPU, allocated memory on a GPU.
The reference of a line is the same number of patches without chunks, where that was run.
"""
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch
from common import DEVICE, arguments, report
from step import SCRIPTS, train

from emp_plugin.configuration import read_config


def measure(patches: int, chunk: int | None, steps: int, extra: list[str]) -> dict:
    """Seconds of the steps and peak memory in MB, in this process."""
    cfg = read_config(SCRIPTS, "cifar/emp", ["data.dataset=digits", f"data.num_patches={patches}", f"method_kwargs.patch_chunk={chunk or 'null'}",
                                             f"limit_train_batches={steps + 1}", "enable_progress_bar=False", "enable_model_summary=False", *extra])
    times = train(cfg, {}, steps)["ours"]
    peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": times, "peak_mb": peak / 1e6}


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        patches, chunk, steps, *extra = sys.argv[2:]
        print(json.dumps(measure(int(patches), int(chunk), int(steps), extra)))
        return
    args = arguments(__doc__.splitlines()[0], trials=2)
    lines = [(2, 0), (2, 1)] if args.small else [(20, 0), (20, 2), (20, 5), (20, 10), (50, 5), (200, 2), (200, 5)]
    extra = ["optimizer.batch_size=4"] if args.small else []
    measured = {}
    for patches, chunk in lines:
        answer = subprocess.run([sys.executable, Path(__file__), "--one", str(patches), str(chunk), str(args.trials), *extra], stdout=subprocess.PIPE,
                                check=True, text=True)
        measured[patches, chunk] = json.loads(answer.stdout.splitlines()[-1])

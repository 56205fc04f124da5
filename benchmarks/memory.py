"""Peak memory and time of training steps by number of patches and `method_kwargs.patch_chunk`.

Every line is a process of its own, which trains through Lightning on digits and measures its own
peak: resident memory on a CPU, what torch has reserved on a GPU. The reference of a line is the
same number of patches without chunks, where that was run.
"""

import json
import resource
import subprocess
import sys
from typing import Any

import torch
from common import DEVICE, arguments, case, report
from step import SCRIPTS, train

from emp_plugin.config import read_config


def measure(patches: int, chunk: int, steps: int, batch: int) -> dict[str, Any]:
    """Seconds of the steps and peak memory in MB, in this process."""
    overrides = [
        "data.dataset=digits",
        f"data.num_patches={patches}",
        f"method_kwargs.patch_chunk={chunk or 'null'}",
        f"optimizer.batch_size={batch}",
        f"limit_train_batches={steps}",
        "enable_progress_bar=False",
        "enable_model_summary=False",
    ]
    times = train(read_config(SCRIPTS, "cifar/emp", overrides), {})["ours"]
    if DEVICE.type == "cuda":
        peak = torch.cuda.max_memory_reserved()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": times, "peak_mb": round(peak / 1e6)}


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(*map(int, sys.argv[2:]))))
        return
    args = arguments(__doc__.splitlines()[0], trials=2)
    lines = [(2, 0), (2, 1)] if args.small else [(20, 0), (20, 2), (20, 5), (50, 5), (200, 5)]
    batch = 4 if args.small else 100
    cases, unchunked = {}, {}
    for patches, chunk in lines:
        # Where a step takes minutes the first one, whose start is a small part of it, is measured.
        long = patches > 20 and DEVICE.type == "cpu"
        numbers = (patches, chunk, 1 if long else 1 + args.trials, batch)
        command = [sys.executable, __file__, "--one", *map(str, numbers)]
        answer = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        measured = json.loads(answer.stdout.splitlines()[-1])
        times = measured["seconds"] if long else measured["seconds"][1:]
        if not chunk:
            unchunked[patches] = times
        name = f"{patches} patches of 32x32, batch {batch}, patch_chunk {chunk or 'off'}"
        figures = {"peak_mb": measured["peak_mb"], "trials": len(times)}
        cases[name] = case(times, unchunked.get(patches)) | figures
        print(name, cases[name], flush=True)
    report("memory-bounded step", cases, args)


if __name__ == "__main__":
    main()

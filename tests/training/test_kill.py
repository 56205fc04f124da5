"""A process killed with SIGKILL at random moments and started again ends as one that never was."""

import json
import multiprocessing
import os
import random
import signal
import time

import pandas as pd
import pytest
import torch

from emp_plugin import cli
from support.runs import TINY, TINY_EMP, the_run

SETTINGS = [
    *TINY,
    "optimizer.batch_size=8",
    "data.holdout=0.02",
    "data.fraction=0.045",
    "max_epochs=2",
    "checkpoint.every_n_steps=3",
    "checkpoint.min_seconds=0",
    "evaluation.views=[bag]",
    "evaluation.bag_patches=1",
    "evaluation.probes=[knn]",
    "auto_resume.enabled=True",
    "knn_eval.enabled=True",
    "log_every_n_steps=1",
    "optimizer.lr=0.1",
]
TWO_VIEWS = ["~method_kwargs", "augmentations=[{crop_size: 8, num_crops: 2, patch_size: 8}]"]
METHODS = {
    "emp": [*TINY_EMP, "data.patch_size=8", "data.output_size=8"],
    "byol": [
        *TWO_VIEWS,
        "+method_kwargs={proj_hidden_dim: 16, proj_output_dim: 8, pred_hidden_dim: 16}",
        "momentum.base_tau=0.5",
    ],
    "swav": [
        *TWO_VIEWS,
        "+method_kwargs={proj_hidden_dim: 16, proj_output_dim: 8, num_prototypes: 6,"
        " queue_size: 32, epoch_queue_starts: 1, temperature: 0.1}",
    ],
}


@pytest.fixture(scope="module")
def processes():
    """Starts a command line in a process forked from one that has imported everything."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["emp_plugin.training.run"])

    def start(arguments):
        process = context.Process(target=cli.main, args=(arguments,))
        process.start()
        return process

    start(["--help"]).join()
    yield start
    os.environ.pop("OMP_NUM_THREADS")
    if before is not None:
        os.environ["OMP_NUM_THREADS"] = before


def training(method, folder):
    own = [f"method={method}", *METHODS[method], f"checkpoint.dir={folder}"]
    return ["pretrain", "digits/emp", *SETTINGS, *own]


def same(left, right, where=""):
    """Whether two structures of containers and tensors are equal to the bit."""
    if isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for i, pair in enumerate(zip(left, right)):
            same(*pair, f"{where}.{i}")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    else:
        assert left == right, where


def compare(run, reference):
    ours, theirs = (
        torch.load(folder / "last.ckpt", weights_only=True) for folder in (run, reference)
    )
    for key in ("global_step", "epoch", "state_dict", "optimizer_states", "lr_schedulers"):
        same(ours[key], theirs[key], key)
    assert (run / "metrics.csv").read_bytes() == (reference / "metrics.csv").read_bytes()
    rows = [
        pd.read_csv(folder / "evaluation.csv").drop(columns="seconds")
        for folder in (run, reference)
    ]
    pd.testing.assert_frame_equal(*rows, check_exact=True)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (run, reference)]
    assert all(
        summaries[0][key] == summaries[1][key] for key in ("epochs", "steps", "images", "patches")
    )
    assert {path.name for path in run.iterdir()} == {path.name for path in reference.iterdir()}


def kill_and_compare(processes, method, folder, kills):
    """Train to the end again and again, killed ``kills`` times in all at random moments."""
    began = time.perf_counter()
    reference = processes(training(method, folder / "reference"))
    reference.join()
    length = time.perf_counter() - began
    assert reference.exitcode == 0
    draw = random.Random(f"{method}{kills}")
    runs = 0
    while kills:
        runs += 1
        chain = folder / f"chain{runs}"
        # a run killed after its summary is finished: the next start would be another run
        while not list(chain.glob("*/*/summary.json")):
            process = processes(training(method, chain))
            process.join(draw.uniform(0.1, 1) * length if kills else None)
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                kills -= 1
            else:
                assert process.exitcode == 0
        compare(the_run(chain), the_run(folder / "reference"))


def test_killed_three_times(processes, tmp_path):
    kill_and_compare(processes, "emp", tmp_path, 3)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_twenty_times(processes, tmp_path, method):
    kill_and_compare(processes, method, tmp_path, 20)

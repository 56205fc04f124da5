"""Several processes (gloo, on the CPU) against one with the whole batch.

Run as a script, this file is those processes.
"""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from emp_plugin import cli, heads
from emp_plugin.config import read_config
from emp_plugin.losses import EMPSSLLoss, emp_ssl_loss
from emp_plugin.solo_learn import backbone_of
from emp_plugin.training.callbacks import Checkpoints
from emp_plugin.training.probing import fresh_method
from support import ROOT, SCRIPTS
from support.runs import TINY, TINY_EMP, the_run

N, B, SIDE = 3, 8, 4  # patches, images of the global batch, side of a patch
# A ViT has no BatchNorm, whose statistics would be those of a process's own images
RUN = [
    *TINY,
    *TINY_EMP,
    "backbone.name=vit_tiny",
    "backbone.kwargs={patch_size: 16}",
    "backbone.stem_padding=null",
    "data.image_size=32",
    "data.output_size=32",
    "data.holdout=0.035",
    "data.fraction=0.05",
    "max_epochs=2",
    "checkpoint.keep_prev=True",
    "auto_resume.enabled=False",
    "evaluation.views=[whole]",
    "evaluation.probes=[knn]",
    "knn_eval.enabled=True",
    "limit_train_batches=6",
    "checkpoint.every_n_steps=2",
    "checkpoint.min_seconds=0",
]


def without_batchnorm(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU())


def small_method(chunk):
    """EMP with a network of a few linear layers."""
    heads._dense = without_batchnorm
    width = "method_kwargs.proj_output_dim=6"
    settings = [*TINY_EMP, width, f"method_kwargs.patch_chunk={chunk}"]
    model = fresh_method(read_config(str(SCRIPTS / "pretrain"), "digits/emp", settings))
    name = next(name for name, child in model.named_children() if child is backbone_of(model))
    setattr(model, name, nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE**2, 512), nn.Tanh()))
    model.logged = {}
    # means over the processes already: Lightning's own way would wait for each by itself
    model.log_dict = model.logged.update
    return model


def batch():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, B, 3, SIDE, SIDE, generator=generator)
    return x, torch.randint(0, 10, (B,), generator=generator)


def one_step(rank, size, chunk):
    """Loss, gradients (synchronised once) and logged values of this process's step under DDP."""
    model = small_method(chunk)
    model.forward = lambda batch: model.training_step(batch, 0)  # DDP counts on forward
    wrapped = nn.parallel.DistributedDataParallel(model)
    buckets = []

    def count(state, bucket):
        buckets.append(bucket.index())
        work = dist.all_reduce(bucket.buffer().div_(size), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    wrapped.register_comm_hook(None, count)
    x, y = batch()
    mine = slice(rank * B // size, (rank + 1) * B // size)
    loss = wrapped([torch.arange(B)[mine], x[:, mine], y[mine]])
    loss.backward()
    assert len(buckets) == len(set(buckets))
    dist.all_reduce(loss := loss.detach())
    return loss / size, {name: p.grad for name, p in model.named_parameters()}, model.logged


def unit_vectors():
    return F.normalize(torch.randn(N, B, 6, generator=torch.Generator().manual_seed(1)), dim=-1)


def loss_of_z(rank, size):
    """The loss on unit vectors z (N, B, 6), and their gradient as DDP's mean weighs it."""
    z = unit_vectors()
    mine = z[:, rank * B // size : (rank + 1) * B // size].clone().requires_grad_()
    out = EMPSSLLoss()(mine)
    out.backward()
    parts, loss = [torch.zeros_like(mine) for _ in range(size)], out.detach().clone()
    dist.all_gather(parts, mine.grad / size)
    dist.all_reduce(loss)
    return loss / size, torch.cat(parts, dim=1)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def stop_the_second(rank, step, note):
    """SIGTERM for process 1 in a step; notes the collectives before it that a host waits at."""
    waited, original = [], Checkpoints.on_train_batch_end

    def watched(name, collective):
        def call(*args, **kwargs):
            if not kwargs.get("async_op"):
                waited.append(name)
            return collective(*args, **kwargs)

        return call

    def on_train_batch_end(self, trainer, *args):
        original(self, trainer, *args)
        if trainer.global_step == 1:
            waited.clear()  # of the start
        if trainer.global_step == step:
            Path(f"{note}.{rank}").write_text(json.dumps(waited))
            if rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    for name in ("all_reduce", "broadcast", "barrier"):
        setattr(dist, name, watched(name, getattr(dist, name)))
    Checkpoints.on_train_batch_end = on_train_batch_end


def process(rank, size, port, job, out):
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
    }
    if job:
        heads._dense = without_batchnorm
        if out:
            stop_the_second(rank, 3, out)
        sys.exit(cli.main(job))
    dist.init_process_group("gloo", rank=rank, world_size=size)
    results = {
        "step": one_step(rank, size, "null"),
        "chunked": one_step(rank, size, 2),
        "z": loss_of_z(rank, size),
    }
    if rank == 0:
        torch.save(results, out)
    dist.destroy_process_group()


def start(size, job=None, out=None):
    port, context = free_port(), multiprocessing.get_context("fork")
    processes = [
        context.Process(target=process, args=(rank, size, port, job, out)) for rank in range(size)
    ]
    for one in processes:
        one.start()
    for one in processes:
        one.join()
    assert [one.exitcode for one in processes] == [1 if job and out else 0] * size


def main(folder):
    for size in (2, 4):
        start(size, out=f"{folder}/{size}.pt")
    for name, size, first in (
        ("one", 1, None),
        ("two", 2, None),
        ("two_after_one", 2, "one"),
        ("one_after_two", 1, "two"),
    ):
        settings = [
            *RUN,
            f"checkpoint.dir={folder}/{name}",
            f"devices={size}",
            f"optimizer.batch_size={B // size}",
        ]
        if first:
            checkpoint = the_run(Path(folder, first)) / "epoch\\=1.ckpt"
            settings.append(f"resume_from_checkpoint={checkpoint}")
        start(size, ["pretrain", "digits/emp", *settings])
    settings = [
        *RUN,
        f"checkpoint.dir={folder}/stopped",
        "devices=2",
        f"optimizer.batch_size={B // 2}",
        "checkpoint.every_n_steps=100",
        "log_every_n_steps=100",
    ]
    start(2, ["pretrain", "digits/emp", *settings], out=f"{folder}/waited")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    script = [sys.executable, __file__, str(folder)]
    answer = subprocess.run(script, capture_output=True, text=True, env=environment, timeout=300)
    assert answer.returncode == 0, answer.stderr[-3000:]
    return folder


@pytest.mark.parametrize("size", [2, 4])
def test_loss_and_its_gradient_for_z_are_those_of_one_process(folder, size):
    z = unit_vectors().double().requires_grad_()
    expected = emp_ssl_loss(z).loss
    expected.backward()
    loss, gradient = torch.load(folder / f"{size}.pt")["z"]
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), z.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["step", "chunked"])
@pytest.mark.parametrize("size", [2, 4])
def test_gradients_and_logged_values_are_those_of_one_process(folder, size, kind, monkeypatch):
    monkeypatch.setattr(heads, "_dense", without_batchnorm)
    model = small_method("null")
    x, y = batch()
    expected = model.training_step([torch.arange(B), x, y], 0)
    expected.backward()
    loss, gradients, logged = torch.load(folder / f"{size}.pt")[kind]
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logged, model.logged, rtol=1e-5, atol=1e-4)
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["two", "two_after_one", "one_after_two"])
def test_a_run_of_two_processes_is_that_of_one_and_either_continues_the_other(folder, name):
    """Also: each validation image counts once (25 in one process and 26 in the other)."""
    run, reference = the_run(folder / name), the_run(folder / "one")
    ours, theirs = (torch.load(path / "last.ckpt", weights_only=True) for path in (run, reference))
    assert ours["global_step"] == theirs["global_step"] == 12
    for key, value in theirs["state_dict"].items():
        torch.testing.assert_close(ours["state_dict"][key], value, rtol=1e-4, atol=1e-5)
    left, right = (pd.read_csv(path / "metrics.csv") for path in (run, reference))
    steps = left.step.unique()
    right = right[right.step.isin(steps)].reset_index(drop=True)
    assert set(steps) == set(range(0 if name == "two" else 6, 12))
    assert left.val_knn_acc1.notna().sum() == (2 if name == "two" else 1)
    # but k-NN: the votes are nearly equal this early, and several images may go either way; and the
    # gauges, which are of the first process's images
    others = ("knn", "train_rank", "train_std")
    rest = sorted(column for column in left if not any(name in column for name in others))
    pd.testing.assert_frame_equal(left[rest], right[rest], rtol=1e-3, atol=1e-4)
    summaries = [json.loads((path / "summary.json").read_text()) for path in (run, reference)]
    assert summaries[0]["images"] == summaries[1]["images"] == 96
    rows = [
        {(row["model"], row["features"]): row["top1"] for row in summary["evaluation"]}
        for summary in summaries
    ]
    assert rows[0].keys() == rows[1].keys()
    assert all(rows[0][key] == rows[1][key] for key in rows[0] if key[0] != "emp")
    assert len(list((folder / name / "emp").glob("*/"))) == 1


def test_a_signal_stops_all_processes_at_one_step_and_none_waits_to_agree(folder):
    """SIGTERM came in step 3 of one; the other knows in step 4."""
    assert [json.loads((folder / f"waited.{rank}").read_text()) for rank in (0, 1)] == [[], []]
    checkpoint = torch.load(the_run(folder / "stopped") / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 4


if __name__ == "__main__":
    main(sys.argv[1])

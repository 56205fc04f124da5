"""What a run survives besides SIGKILL.

Signals, broken and foreign checkpoints, full and read-only disks, a second process.
"""

import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from emp_plugin.errors import UserError
from emp_plugin.training.callbacks import CONFIG_KEY, AtomicCheckpointIO
from emp_plugin.training.folder import claim
from emp_plugin.training.metrics import MetricsCSV
from emp_plugin.training.probing import load_method
from support import runs
from support.runs import TINY_EMP, at_step, the_run

SETTINGS = [
    "optimizer.batch_size=8",
    "data.fraction=0.045",
    "data.holdout=0.02",
    "max_epochs=1",
    "checkpoint.every_n_steps=2",
    "checkpoint.min_seconds=0",
    "evaluation.enabled=False",
    "auto_resume.enabled=True",
]
EMP = [*TINY_EMP, "data.patch_size=8", "data.output_size=8"]
TWO_VIEWS = ["~method_kwargs", "augmentations=[{crop_size: 8, num_crops: 2, patch_size: 8}]"]


def pretrain(folder, *overrides, method=EMP):
    return runs.pretrain(folder, *SETTINGS, *method, *overrides)


def kill(trainer):
    raise SystemError("killed")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    assert pretrain(folder) == 0
    return the_run(folder)


def equal(run, reference):
    ours, theirs = (
        torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (run, reference)
    )
    for name in theirs:  # the online k-NN keeps its bank as a list
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)
    assert (run / "metrics.csv").read_bytes() == (reference / "metrics.csv").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_answered_with_a_checkpoint_and_a_line(
    finished, tmp_path, monkeypatch, capsys, number
):
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda trainer: os.kill(os.getpid(), number))
        assert pretrain(tmp_path) == 1
    run = the_run(tmp_path)
    assert capsys.readouterr().err == (
        f"error: stopped by {number.name} after step 3; "
        f"the same command continues from {run / 'last.ckpt'}\n"
    )
    assert torch.load(run / "last.ckpt", weights_only=True)["global_step"] == 3
    assert signal.getsignal(number) == handler
    assert pretrain(tmp_path) == 0
    equal(run, finished)


def test_a_run_that_max_time_ends_is_continued(finished, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda trainer: time.sleep(1.5))
        assert pretrain(tmp_path, "max_time=00:00:00:01") == 1
    assert "stopped by max_time after step" in capsys.readouterr().err
    assert not (the_run(tmp_path) / "summary.json").exists()
    assert pretrain(tmp_path) == 0
    equal(the_run(tmp_path), finished)
    assert pretrain(tmp_path, "max_time=an hour") == 1
    assert "max_time must be DD:HH:MM:SS, got an hour" in capsys.readouterr().err


def test_slurm_s_other_number_of_tasks_is_one_line(tmp_path, monkeypatch, capsys):
    for name, value in {"JOB_ID": "1", "JOB_NAME": "train", "NTASKS": "2", "PROCID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for name in ("LOCALID", "NODEID"):
        monkeypatch.setenv(f"SLURM_{name}", "0")
    monkeypatch.setenv("SLURM_NODELIST", "localhost")
    assert pretrain(tmp_path) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: Trainer: ")
    assert message.count("\n") <= 2


def test_a_file_system_without_locks(finished, tmp_path, monkeypatch, capsys):
    def no_locks(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    assert pretrain(tmp_path) == 0
    assert "no file locks here" in capsys.readouterr().out
    equal(the_run(tmp_path), finished)


def test_a_signal_in_the_last_step_comes_before_the_evaluation(
    finished, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        at_step(patch, 8, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
        assert pretrain(tmp_path) == 1
    assert "stopped by SIGTERM after step 8" in capsys.readouterr().err
    assert not (the_run(tmp_path) / "summary.json").exists()
    assert pretrain(tmp_path) == 0
    equal(the_run(tmp_path), finished)


def test_slurm_s_signal_also_requeues(finished, tmp_path, monkeypatch, capsys):
    """Lightning asks SLURM; here a stub `scontrol` writes down what it is asked."""
    stub = tmp_path / "scontrol"
    stub.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    stub.chmod(0o755)
    environment = {
        "SLURM_NTASKS": "1",
        "SLURM_JOB_NAME": "train",
        "SLURM_JOB_ID": "123",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_NTASKS_PER_NODE": "1",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    with monkeypatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        at_step(patch, 3, lambda trainer: os.kill(os.getpid(), signal.SIGUSR1))
        assert pretrain(tmp_path / "runs") == 1
    run = the_run(tmp_path / "runs")
    assert (tmp_path / "asked").read_text() == "requeue 123\n"
    assert "stopped by SIGUSR1 after step 3" in capsys.readouterr().err
    assert sorted(path.name for path in run.glob("*.ckpt")) == ["last.ckpt", "previous.ckpt"]
    assert pretrain(tmp_path / "runs") == 0
    equal(run, finished)


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("byol", "pred_hidden_dim: 16"),
        ("swav", "num_prototypes: 6, queue_size: 32, epoch_queue_starts: 0, temperature: 0.1"),
    ],
)
def test_baselines_continue_to_the_bit(tmp_path, monkeypatch, method, own):
    """The momentum's tau, SwAV's queue, the bank of the online k-NN and the means of the epoch."""
    settings = [
        *TWO_VIEWS,
        f"method={method}",
        f"+method_kwargs={{proj_hidden_dim: 16, proj_output_dim: 8, {own}}}",
        "knn_eval.enabled=True",
        "momentum.base_tau=0.5",
    ]
    assert pretrain(tmp_path / "reference", method=settings) == 0
    with monkeypatch.context() as patch:
        at_step(patch, 5, kill)
        with pytest.raises(SystemError):
            pretrain(tmp_path / "cut", method=settings)
    assert pretrain(tmp_path / "cut", method=settings) == 0
    run = the_run(tmp_path / "cut")
    equal(run, the_run(tmp_path / "reference"))
    assert {"train_acc1_epoch", "val_knn_acc1"} <= set(pd.read_csv(run / "metrics.csv"))


def damaged(path, kind):
    data = bytearray(path.read_bytes())
    if kind == "truncated":
        data = data[: len(data) // 2]
    elif kind == "a flipped bit":
        data[len(data) // 2] ^= 1
    elif kind == "text":
        data = b"not a checkpoint"
    path.write_bytes(data)


def test_a_broken_checkpoint_is_skipped_for_the_one_before(finished, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        at_step(patch, 5, kill)
        with pytest.raises(SystemError):
            pretrain(tmp_path)
    run = the_run(tmp_path)
    damaged(run / "last.ckpt", "a flipped bit")
    assert pretrain(tmp_path) == 0
    out = capsys.readouterr().out
    assert f"skipped: {run / 'last.ckpt'} is not a readable checkpoint" in out
    assert "previous.ckpt (step 2)" in out
    equal(run, finished)


def test_no_readable_checkpoint_is_an_error(finished, tmp_path, capsys):
    shutil.copytree(finished, run := tmp_path / "emp" / "broken")
    (run / "summary.json").unlink()
    for path in run.glob("*.ckpt"):
        damaged(path, "truncated")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(finished.parents[1]), str(tmp_path)))
    assert pretrain(tmp_path) == 1
    assert f"no checkpoint of {run} can be read" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["truncated", "a flipped bit", "text"])
def test_broken_checkpoints_are_refused(finished, tmp_path, capsys, kind):
    path = shutil.copy(finished / "last.ckpt", tmp_path)
    damaged(Path(path), kind)
    assert pretrain(tmp_path / "runs", f"resume_from_checkpoint={path}") == 1
    assert f"{path} is not a readable checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("method", "named"),
    [
        (["method=byol", *TWO_VIEWS], "its method is emp, this one's byol"),
        ([*EMP, "backbone.name=resnet50"], "its backbone is"),
        ([*EMP, "method_kwargs.proj_output_dim=9"], "its method_kwargs is"),
    ],
)
def test_foreign_checkpoints_are_refused(finished, tmp_path, capsys, method, named):
    checkpoint = f"resume_from_checkpoint={finished / 'last.ckpt'}"
    assert pretrain(tmp_path, checkpoint, method=method) == 1
    assert f"is of another run: {named}" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_checkpoint_of_other_classes_is_refused(finished, tmp_path, config):
    state = torch.load(finished / "last.ckpt", weights_only=True)
    state[CONFIG_KEY]["data"]["num_classes"] = 100
    torch.save(state, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="data.num_classes is 100, this one's 10"):
        load_method(tmp_path / "x.ckpt", like=config("digits/emp", *EMP))


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_no_code_of_a_checkpoint_is_run(finished, tmp_path, capsys):
    state = torch.load(finished / "last.ckpt", weights_only=True)
    state["hyper_parameters"] = Payload(str(tmp_path / "owned"))
    torch.save(state, path := tmp_path / "evil.ckpt")
    assert pretrain(tmp_path / "runs", f"resume_from_checkpoint={path}") == 1
    assert f"{path} is not a readable checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "owned").exists()
    pickle.loads(pickle.dumps(state["hyper_parameters"]))  # it would have worked
    assert (tmp_path / "owned").exists()


def test_one_process_at_a_time(tmp_path, config, monkeypatch, capsys):
    """Locks are between processes: a child holds the folder while this one asks for it."""

    def ask(trainer):
        run = the_run(tmp_path)
        child = os.fork()
        if not child:
            try:
                with claim(run, config("digits/emp"), 0, {}):
                    os._exit(0)
            except UserError as error:
                os._exit(7 if "another process is training in" in str(error) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7

    at_step(monkeypatch, 3, ask)
    assert pretrain(tmp_path) == 0


def test_a_dead_worker_is_named(tmp_path, monkeypatch, capsys):
    def kill_workers(trainer):
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)

    at_step(monkeypatch, 3, kill_workers)
    assert pretrain(tmp_path, "data.num_workers=1", "optimizer.batch_size=4") == 1
    message = capsys.readouterr().err
    assert "a data worker died after step" in message
    assert "data.num_workers=0" in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("error", "said"),
    [(EOFError(), "EOFError"), (ConnectionResetError("reset by peer"), "reset by peer")],
)
def test_a_worker_that_dies_as_it_hands_something_over_is_named(
    tmp_path, monkeypatch, capsys, error, said
):
    def fail(trainer):
        raise error

    at_step(monkeypatch, 1, fail)
    assert pretrain(tmp_path, "optimizer.batch_size=4") == 1
    message = f"a data worker died after step 1 ({said}): out of memory, perhaps"
    assert message in capsys.readouterr().err


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_named_at_the_start(small_disk, capsys):
    assert pretrain(small_disk) == 1
    message = capsys.readouterr().err
    assert "MB are free, the checkpoints of this run take" in message
    assert "checkpoint.dir=DIR" in message
    assert not any(small_disk.iterdir())


def test_a_disk_that_fills_up_keeps_the_last_good_checkpoint(small_disk):
    io, path = AtomicCheckpointIO(), small_disk / "last.ckpt"
    small = {"x": torch.arange(200_000)}
    io.save_checkpoint(small, path)
    with pytest.raises(UserError, match="cannot write .*last.ckpt.*is kept"):
        io.save_checkpoint({"x": torch.arange(400_000)}, path)
    assert [file.name for file in small_disk.iterdir()] == ["last.ckpt"]
    assert torch.equal(torch.load(path, weights_only=True)["x"], small["x"])


def test_a_read_only_folder_is_named_at_the_start(small_disk, capsys):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert pretrain(small_disk, "checkpoint.enabled=False") == 1
    assert "cannot write" in capsys.readouterr().err


def test_metrics_of_a_cut_file(tmp_path):
    path = tmp_path / "metrics.csv"
    log = MetricsCSV(path, 0)
    for step in range(4):
        log.log_metrics({"loss": step / 3}, step)
    log.log_metrics({"val": 0.1}, 3)
    whole = path.read_text()
    assert list(pd.read_csv(path).columns) == ["step", "loss", "val"]
    assert len(pd.read_csv(path)) == 5
    path.write_text(whole[:-5])  # killed within the last line
    log = MetricsCSV(path, 2)
    assert list(pd.read_csv(path).step) == [0, 1]
    for step in (2, 3):
        log.log_metrics({"loss": step / 3}, step)
    log.log_metrics({"val": 0.1}, 3)
    assert path.read_text() == whole

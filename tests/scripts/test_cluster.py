"""The SLURM example with a stub in place of srun."""

import os
import subprocess

from support import ROOT

BATCH = ROOT / "scripts" / "cluster" / "emp_cifar.sbatch"


def directives():
    lines = [
        line.removeprefix("#SBATCH --").split("=")
        for line in BATCH.read_text().splitlines()
        if line.startswith("#SBATCH --")
    ]
    return {line[0]: line[-1] for line in lines}


def run(tmp_path, srun, *arguments, **environment):
    """The batch file in a copy of the repository's scripts whose env.sh does nothing."""
    (tmp_path / "scripts" / "cluster").mkdir(parents=True)
    (tmp_path / "scripts" / "env.sh").write_text("")
    stub = tmp_path / "bin" / "srun"
    stub.parent.mkdir()
    stub.write_text(f"#!/bin/bash\n{srun}\n")
    stub.chmod(0o755)
    path = f"{stub.parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(BATCH), *arguments],
        env=os.environ | {"PATH": path} | environment,
        capture_output=True,
        text=True,
    )


def test_what_is_run(tmp_path):
    answer = run(
        tmp_path,
        'printf "%s\\n" "$PWD" "$@"',
        "max_epochs=10",
        "name=two words",
        SLURM_SUBMIT_DIR=str(tmp_path),
    )
    folder, *command = answer.stdout.splitlines()
    assert folder == str(tmp_path)
    assert answer.returncode == 0
    assert command == [
        "bash",
        "scripts/pretrain/cifar/emp.sh",
        "devices=2",
        "num_nodes=1",
        "optimizer.batch_size=50",
        "max_epochs=10",
        "name=two words",
    ]
    assert (ROOT / command[1]).exists()


def test_processes_and_settings_agree(config):
    """As many tasks as devices, the recipe's batch, and the signal that Lightning waits for.

    Lightning refuses any other number of tasks.
    """
    asked = directives()
    cfg = config("cifar/emp", "devices=2", "num_nodes=1", "optimizer.batch_size=50")
    assert int(asked["ntasks-per-node"]) == int(asked["gpus-per-node"]) == cfg.devices
    assert int(asked["nodes"]) == cfg.num_nodes
    assert cfg.optimizer.batch_size * cfg.devices == config("cifar/emp").optimizer.batch_size
    assert asked["signal"].startswith("SIGUSR1@")
    assert "requeue" in asked
    assert cfg.auto_resume.enabled


def test_failure_is_passed_on_and_it_is_no_script(tmp_path):
    assert run(tmp_path / "a", "exit 3", SLURM_SUBMIT_DIR=str(tmp_path / "a")).returncode == 3
    answer = run(tmp_path / "b", "exit 0", SLURM_SUBMIT_DIR="")
    assert answer.returncode != 0
    assert "sbatch scripts/cluster/emp_cifar.sbatch" in answer.stderr

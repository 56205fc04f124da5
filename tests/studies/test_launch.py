"""Commands that fail, and one that is interrupted."""

from types import SimpleNamespace

import pytest

from emp_plugin.errors import UserError
from emp_plugin.studies import launch


def test_an_interrupted_process_is_waited_for(tmp_path, monkeypatch):
    """SIGTERM, or Ctrl-C, of the study alone: the run has the time to write its checkpoint."""

    def pressed(part):
        raise KeyboardInterrupt

    stderr = SimpleNamespace(buffer=SimpleNamespace(write=pressed))
    monkeypatch.setattr(launch.sys, "stderr", stderr)
    script = (
        f'trap "sleep 1; touch {tmp_path}/saved; exit 1" TERM; echo ready >&2; '
        "for i in $(seq 300); do sleep 0.1; done"
    )
    with pytest.raises(UserError, match="the same command continues"):
        launch.run_process(["bash", "-c", script])
    assert (tmp_path / "saved").exists()


def test_processes_that_fail(capfd):
    def run(script):
        return launch.run_process(["bash", "-c", script])

    assert run("echo fine >&2") is None
    assert run("echo 'error: no room' >&2; exit 1") == "no room"
    assert run("kill -9 $$") == "killed by signal 9"
    assert "no room" in capfd.readouterr().err

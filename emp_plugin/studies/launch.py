"""The runs of a study: ordinary pretrainings in processes of their own."""

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from io import BufferedReader
from pathlib import Path
from typing import cast

from emp_plugin.config import Run, from_dict
from emp_plugin.errors import UserError
from emp_plugin.evaluation import Evaluation
from emp_plugin.studies.plan import TrialFailed
from emp_plugin.studies.recipes import Recipes
from emp_plugin.training.folder import (
    CONFIG,
    LAST,
    SUMMARY,
    identity,
    saved_settings,
    write_settings,
)

RUNS, SPEED_CHECKS = "runs", "speed_checks"  # folders of a study


class Runs:
    """The runs of a study, found again by their identities.

    Args:
        folder: of the study.
        recipes: that the runs train.
    """

    def __init__(self, folder: Path, recipes: Recipes):
        self.folder, self.recipes = folder, recipes
        self.started = 0  # processes

    def finished(self, recipe: Run, kept: Iterable[str] = (), place: str = RUNS) -> list[Path]:
        """Folders of the finished runs that train as this recipe does.

        Args:
            recipe: of the run.
            kept: checkpoints that must be there, or what came of them.
            place: folder of the study.
        """

        def is_kept(checkpoint: Path) -> bool:
            return checkpoint.exists() or checkpoint.with_suffix(".json").exists()

        wanted = identity(recipe)
        summaries = (self.folder / place / recipe.method).glob(f"*/{SUMMARY}")
        return [
            summary.parent
            for summary in summaries
            if json.loads(summary.read_text()).get("identity") == wanted
            and all(is_kept(summary.with_name(name)) for name in kept)
        ]

    def evaluated(self, recipe: Run, kept: Iterable[str] = (), again: bool = False) -> Path | None:
        """The folder of a finished run that was evaluated with the recipe's settings, or None.

        One that was evaluated with others, or is to be evaluated ``again``, loses its summary and
        takes the recipe's name: :meth:`train` then finds it unfinished, and only evaluates.
        """
        finished = self.finished(recipe, kept)
        for folder in () if again else finished:
            # a run from before a setting was evaluated with what is now its default
            if _evaluation(from_dict(saved_settings(folder))) == _evaluation(recipe):
                return folder
        for folder in finished:
            if (folder / LAST).exists():
                (folder / SUMMARY).unlink()
                renamed = saved_settings(folder) | {"name": recipe.name}
                write_settings(folder / CONFIG, renamed)
                break
        return None

    def train(
        self,
        method: str,
        recipe: Run,
        overrides: Iterable[str],
        kept: Iterable[str] = (),
        place: str = RUNS,
    ) -> Path:
        """Run the ordinary pretraining, or continue it, and return its folder.

        Args:
            method: name of the recipe.
            recipe: as it is with the overrides.
            overrides: of this run.
            kept: checkpoints that it has to leave.
            place: folder of the study.

        Raises:
            TrialFailed: with the reason.
            UserError: when interrupted.
        """
        self.started += 1
        reason = run_process(
            [
                *(sys.executable, "-m", "emp_plugin", "pretrain"),
                *("--config-path", str(self.recipes.root)),
                *("--config-name", f"{self.recipes.group}/{method}"),
                *self.recipes.overrides_of(method),
                *overrides,
                f"checkpoint.dir={self.folder / place}",
                "auto_resume.enabled=True",
                "auto_resume.max_hours=1e6",
            ]
        )
        if reason:
            raise TrialFailed(reason)
        folders = self.finished(recipe, kept, place)
        if folders:
            return folders[0]
        begun = self.finished(recipe, place=place)
        raise TrialFailed(
            f"{begun[0]} was begun without the checkpoints that evaluate_every or the snapshots "
            "ask for; the same command trains it anew"
            if begun
            else "it ended without a summary"
        )


RUNNING: set[subprocess.Popen] = set()  # by run_process; several where runs train at once


def run_process(command: list[str]) -> str | None:
    """Run a command with its output shown as it comes; None, or why it failed.

    Raises:
        UserError: after Ctrl-C or SIGTERM, when the command has ended too.
    """
    tail, interrupted = b"", False
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        RUNNING.add(process)
        errors = cast(BufferedReader, process.stderr)
        while True:
            try:
                if not (part := errors.read1(4096)):
                    break
                sys.stderr.buffer.write(part)
                sys.stderr.flush()
                tail = (tail + part)[-4000:]
            except KeyboardInterrupt:  # the command has to write its checkpoint first
                interrupted = True
                with suppress(subprocess.TimeoutExpired):
                    process.wait(1)
                process.terminate()  # if Ctrl-C came to us alone, or SIGTERM
    RUNNING.discard(process)
    if interrupted:
        raise UserError("interrupted; the same command continues")
    status = process.returncode
    if status == 0:
        return None
    if status < 0:
        return f"killed by signal {-status}"
    return last_line(tail.decode(errors="replace")) or f"exit status {status}"


def last_line(text: str) -> str:
    """The last line of a command's output or of an error, which says why it failed."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else ""


def _evaluation(cfg: Run) -> Evaluation:
    return replace(cfg.evaluation, references=True)  # whether they were is not compared

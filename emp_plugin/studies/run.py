"""The loop of a study: trial after trial is trained, evaluated and written down."""

import json
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from emp_plugin.config import Probe, Run
from emp_plugin.data.files import make_output_folder
from emp_plugin.errors import UserError
from emp_plugin.evaluation import Evaluation
from emp_plugin.studies.launch import RUNNING, Runs, last_line
from emp_plugin.studies.lengths import Lengths
from emp_plugin.studies.paper import paper_name
from emp_plugin.studies.plan import Trial, TrialFailed, plan
from emp_plugin.studies.recipes import (
    Recipes,
    global_batch,
    resolved,
    shared_inputs,
    views_per_image,
)
from emp_plugin.studies.report import write_report
from emp_plugin.studies.rows import (
    COURSE,
    evaluation_rows,
    make_table,
    references_in,
    trial_row,
    version_columns,
)
from emp_plugin.studies.settings import StudySettings
from emp_plugin.training.folder import SUMMARY, versions_of, write_settings, write_text
from emp_plugin.training.probing import probe_checkpoint

RESULTS = "results.csv"
# settings of a recipe that only the study may set
OURS = (
    "max_epochs",
    "seed",
    "limit_train_batches",
    "max_time",
    "overfit_batches",
    "fast_dev_run",
    "accumulate_grad_batches",
    "checkpoint.dir",
    "resume_from_checkpoint",
    "evaluation.enabled",
)


def compare(cfg: StudySettings, recipes: Path, overrides: list[str]) -> None:
    """Train and evaluate what is not done yet; write rows, tables and figures after every run.

    Args:
        cfg: settings of the study.
        recipes: folder of all recipes.
        overrides: of the recipes; ``<method>.key=value`` is of that method alone.

    Raises:
        UserError: for settings that a recipe refuses (before anything is trained), or when
            interrupted.
    """
    results = Path(cfg.results_dir).expanduser()
    if cfg.report_only:
        write_report(results / RESULTS, results, cfg.thresholds)
    else:
        Study(cfg, recipes, [*cfg.overrides, *overrides]).run()
    print(f"results: {results}")


class Study:
    """The trials of a study and their rows.

    Args:
        cfg: settings of the study.
        recipes: folder of all recipes.
        overrides: of the study's recipes.

    Raises:
        UserError: for settings that a recipe refuses, or that are not for the user to set.
    """

    def __init__(self, cfg: StudySettings, recipes: Path, overrides: list[str]):
        self.cfg, self.overrides = cfg, overrides
        self.results = Path(cfg.results_dir).expanduser()
        self.recipes = Recipes(recipes, cfg.recipes, overrides)
        self.runs = Runs(self.results, self.recipes)
        self.lengths = Lengths(cfg, self.recipes, self.runs)
        self.trials = plan(cfg)
        self.rows: dict[Trial, list[dict[str, Any]]] = {}
        # EMP's FLOPs may be what the others have to spend
        counted = {*cfg.methods, *(["emp"] if "flops" in cfg.budget else [])}
        for item in overrides:
            method = self.recipes.method_of(item)
            if method and method not in counted:
                raise UserError(f"{item} would do nothing: {method} is not among the methods")
        # this reads every recipe, so that a mistake in the settings is found before training
        self.inputs = shared_inputs(self.recipes, self.trials)
        for item in (*overrides, *(item for trial in self.trials for item in trial.override)):
            name = item.lstrip("+").partition("=")[0]
            if name in OURS or name.partition(".")[2] in OURS:  # of one method
                raise UserError(
                    f"{item} is the study's to set: use epochs, seeds, fractions of an epoch "
                    "(epochs=[0.1]) and results_dir; "
                    "a batch is a step, and every run is evaluated"
                )

    def run(self) -> None:
        """Bring all trials to their ends."""
        make_output_folder(self.results)
        settings = {
            "command": " ".join(sys.argv),
            "comparison": asdict(self.cfg),
            "recipe overrides": self.overrides,
        }
        write_settings(self.results / "comparison.yaml", settings)
        if self.cfg.at_once > 1:
            self.train_at_once()
        for number, trial in enumerate(self.trials, 1):
            print(f"\n[{number}/{len(self.trials)}] {trial}", flush=True)
            self.finish(trial, references=not self.has_references(trial))
        for trial in self.trials:
            failed = "error" in self.rows[trial][-1]
            if not failed and not self.has_references(trial):
                # the run was there, without its references
                self.finish(trial, references=True, again=True)
        self.write()

    def has_references(self, trial: Trial) -> bool:
        """Whether there are rows of raw pixels and the untrained network as this trial sees images.

        They are shared by trials that show them the same images: :attr:`inputs` names the first.
        """
        return self.inputs[trial] in references_in(chain(*self.rows.values()), trial.seed)

    def finish(self, trial: Trial, references: bool, again: bool = False) -> None:
        """Bring one trial to its end, and write the study's files if there was something to do.

        Args:
            trial: which one.
            references: evaluate raw pixels and the untrained network with it.
            again: evaluate it, too, if it is finished.
        """
        started = self.runs.started
        try:
            rows = self.trial_rows(trial, references, again)
            if not rows:
                raise TrialFailed("there is no evaluation: these images have no labels")
            self.rows[trial] = rows
        except TrialFailed as failure:
            print(f"failed: {failure}; going on", flush=True)
            if not again:
                self.rows[trial] = [
                    self.row(trial, length=point, error=str(failure)) for point in trial.points
                ]
        if self.runs.started > started:
            self.write()

    def train_at_once(self) -> None:
        """Train several trials at a time; what fails is tried again, and told, in its turn."""

        def train(trial: Trial) -> None:
            recipe, overrides, checkpoints, keep = settings[trial]
            overrides += (*keep, "evaluation.references=False", "enable_progress_bar=False")
            with suppress(TrialFailed):
                self.runs.train(trial.method, recipe, overrides, checkpoints)

        settings = {}
        for trial in self.trials:  # before: a configuration is not read in several threads
            with suppress(TrialFailed):
                recipe, overrides, checkpoints, keep = self.settings(trial)
                if self.runs.evaluated(recipe, checkpoints) is None:
                    settings[trial] = recipe, overrides, checkpoints, keep
        with ThreadPoolExecutor(self.cfg.at_once) as pool:
            try:
                list(pool.map(train, settings))
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(RUNNING):
                    process.terminate()  # they write their checkpoints first
                raise

    def settings(
        self, trial: Trial
    ) -> tuple[Run, tuple[str, ...], dict[str, dict[str, Any]], list[str]]:
        """A trial's recipe and the overrides that make it; and what :meth:`checkpoints` returns.

        Raises:
            TrialFailed: if its length cannot be known.
        """
        length = self.lengths.overrides(trial)
        overrides = (*trial.override, *length, f"seed={trial.seed}", "limit_val_batches=0")
        recipe = self.recipes.read(trial.method, overrides)
        return recipe, overrides, *self.checkpoints(trial, recipe)

    def trial_rows(self, trial: Trial, references: bool, again: bool) -> list[dict[str, Any]]:
        """The rows of a trial, which is trained and evaluated as far as that is not done.

        Raises:
            TrialFailed: with the reason.
        """
        recipe, overrides, checkpoints, keep = self.settings(trial)
        print(f"  {resolved(recipe)}", flush=True)
        folder = self.runs.evaluated(recipe, checkpoints, again)
        if folder:
            print(f"  done: {folder}")
        else:
            overrides += (*keep, f"evaluation.references={references}")
            folder = self.runs.train(trial.method, recipe, overrides, checkpoints)
        summary = json.loads((folder / SUMMARY).read_text())
        about = {
            "collapsed": summary.get("collapsed", False),
            "identity": summary["identity"],
            **version_columns(versions_of(folder)[-1]),
            "inputs": self.inputs[trial],
            "paper": paper_name(recipe, self.recipes.root / self.recipes.group),
            "run": str(folder.relative_to(self.results)),
        }
        flops = summary["flops"] // summary["images"]
        rows, untimed = [], {"train_seconds": None} if self.cfg.at_once > 1 else {}
        for name, point in checkpoints.items():
            try:
                settings = recipe.evaluation
                if point.get("schedule") == COURSE:
                    settings = Evaluation(protocol="quick", dense_scale=settings.dense_scale)
                on_the_way = evaluate_checkpoint(folder / name, recipe, settings, flops)
            except TrialFailed as failure:
                print(f"failed: {failure}; going on", flush=True)
                rows.append(self.row(trial, **point, error=str(failure)))
            else:
                rows += evaluation_rows(self.row(trial, **point, **about), on_the_way | untimed)
        row = self.row(trial, **about, epoch=round(self.lengths.epochs(trial, recipe), 4))
        return rows + evaluation_rows(row, summary | untimed)

    def checkpoints(self, trial: Trial, recipe: Run) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """The checkpoints before a run's end that are evaluated.

        Returns:
            What their rows say of them, by file name; and the overrides that keep them.
        """
        checkpoints: dict[str, dict[str, Any]] = {}
        keep: list[str] = []
        for epoch in trial.points[:-1]:
            checkpoints[f"epoch={epoch:g}.ckpt"] = {"length": epoch, "epoch": epoch}
        if checkpoints:
            between = math.gcd(*map(int, trial.points))
            keep += [f"checkpoint.frequency={between}", "checkpoint.keep_prev=True"]
        if self.cfg.evaluate_every:
            per_epoch = self.recipes.steps_per_epoch(trial)
            every = max(1, round(self.cfg.evaluate_every * per_epoch))
            keep.append(f"checkpoint.keep_every_n_steps={every}")
            for step in range(every, self.lengths.steps(trial, recipe), every):
                epoch = step / per_epoch
                if epoch not in trial.points[:-1]:
                    checkpoints[f"step={step}.ckpt"] = {
                        "schedule": COURSE,
                        "epoch": round(epoch, 4),
                    }
        return checkpoints, keep

    def row(self, trial: Trial, **values: Any) -> dict[str, Any]:
        return trial_row(trial, self.recipes.of(trial), **values)

    def write(self) -> None:
        """The CSV of all rows so far, and what is made from it."""
        table = make_table(chain(*self.rows.values()))
        write_text(self.results / RESULTS, table.to_csv(index=False))
        write_report(self.results / RESULTS, self.results, self.cfg.thresholds)


def evaluate_checkpoint(
    checkpoint: Path, recipe: Run, settings: Evaluation, flops: int
) -> dict[str, Any]:
    """What summary.json is to a run, of a checkpoint on its way; it is evaluated once.

    Args:
        checkpoint: of the run.
        recipe: of the run.
        settings: of the evaluation.
        flops: of training on one image.

    Raises:
        TrialFailed: with the reason.
    """
    probe = Probe(
        pretrained_feature_extractor=str(checkpoint),
        evaluation=replace(settings, references=False),
        accelerator=recipe.accelerator or "auto",
    )
    kept, given = checkpoint.with_suffix(".json"), asdict(probe.evaluation)
    if kept.exists():
        summary = json.loads(kept.read_text())
        if summary.get("settings") == given:
            return summary
    print(f"  evaluating {checkpoint}", flush=True)
    began = time.perf_counter()
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        evaluation = probe_checkpoint(probe)
    except Exception as error:  # whatever it is, the other runs can go on
        reason = last_line(str(error)) or type(error).__name__
        raise TrialFailed(f"evaluation of {checkpoint.name}: {reason}") from error
    images = state["global_step"] * global_batch(recipe)
    summary = {
        "steps": state["global_step"],
        "images": images,
        "patches": images * views_per_image(recipe),
        "flops": images * flops,
        "evaluation": evaluation,
        "train_seconds": round(state["callbacks"]["Timer"]["time_elapsed"]["train"], 1),
        "evaluation_seconds": round(time.perf_counter() - began, 1),
        "settings": given,
    }
    write_text(kept, json.dumps(summary, indent=2) + "\n")
    return summary

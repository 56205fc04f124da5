"""The loop of a comparison: every run is an ordinary pretraining in a process of its own, found again by its configuration."""

import json
import math
import re
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf

from emp_plugin.config import Evaluation, Probe, augmentations, check_config, read_config
from emp_plugin.data import load_dataset
from emp_plugin.errors import UserError
from emp_plugin.studies.plan import (
    Job,
    global_batch,
    plan,
    resolved,
    split_steps,
    steps_for_passes,
    views_per_image,
)
from emp_plugin.studies.report import COLUMNS, COURSE, LABELS, paper_figures, write_report
from emp_plugin.training.folder import CONFIG, LAST, NOT_COMPARED, SUMMARY, VERSIONS, write_text
from emp_plugin.training.probing import probe_checkpoint

RESULTS = "results.csv"
REFERENCES = ("raw pixels", "untrained")
VIEWS = ("whole", "bag")  # how the names of an evaluation's views begin
TRIAL_STEPS = 4  # of the first look at a method's speed; the last one takes
TRIAL_SHARE = 0.1  # of the minutes
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
PAPER_SETTINGS = (
    "backbone",
    "method_kwargs",
    "momentum",
    "augmentations",
    "optimizer",
    "scheduler",
    "accumulate_grad_batches",
)


def compare(cfg: DictConfig, config_path: str, overrides: list[str]) -> None:
    """Train and evaluate what is not done yet, and write rows, tables and plots after every run.

    Args:
        cfg: settings of the comparison.
        config_path: folder of its YAML; the recipes are in ``../pretrain``.
        overrides: of the recipes; ``<method>.key=value`` is of that method alone.

    Raises:
        UserError: for settings that a recipe refuses (before anything is trained), or when interrupted.
    """
    results = Path(cfg.results_dir).expanduser()
    if cfg.report_only:
        write_report(results / RESULTS, results, list(cfg.thresholds))
    else:
        Runs(
            cfg, Path(config_path).expanduser().parent / "pretrain", [*cfg.overrides, *overrides]
        ).train_all()
    print(f"results: {results}")


class Runs:
    """The runs of one comparison, in ``<results_dir>/runs``; trials of a method's speed in ``<results_dir>/trials``."""

    def __init__(self, cfg: DictConfig, recipes: Path, overrides: list[str]):
        self.cfg, self.recipes, self.overrides = cfg, recipes, overrides
        self.results = Path(cfg.results_dir).expanduser()
        self.jobs = plan(cfg)
        self.processes = 0  # started
        self.inputs: dict[
            tuple[Job, str], str
        ] = {}  # the first job whose raw pixels and untrained network are the same as this one's, by view
        for view in VIEWS:
            seen = [
                evaluated(self.recipe(job.method, job.override), view) for job in self.jobs
            ]  # a mistake in the settings is found before training
            for job, by_job in zip(self.jobs, seen):
                first = self.jobs[seen.index(by_job)]
                self.inputs[job, view] = " ".join((first.method, *first.override))
        for item in (*self.overrides, *(item for job in self.jobs for item in job.override)):
            name = item.lstrip("+").partition("=")[0]
            if name in OURS or name.partition(".")[2] in OURS:  # of one method
                raise UserError(
                    f"{item} is the comparison's to set: use epochs, seeds, fractions of an epoch (epochs=[0.1]) and results_dir; "
                    "a batch is a step, and every run is evaluated"
                )

    def train_all(self) -> None:
        rows: dict[Job, list[dict[str, Any]]] = {}
        self.results.mkdir(parents=True, exist_ok=True)
        settings = {
            "command": " ".join(sys.argv),
            "comparison": OmegaConf.to_container(self.cfg),
            "recipe overrides": self.overrides,
        }
        write_text(self.results / "comparison.yaml", OmegaConf.to_yaml(settings))
        for number, job in enumerate(self.jobs, 1):
            print(f"\n[{number}/{len(self.jobs)}] {job}", flush=True)
            self.do(job, rows, references=not self.has_references(job, rows), again=False)
        for job in self.jobs:
            if (
                not self.has_references(job, rows) and "error" not in rows[job][-1]
            ):  # the run was there, without its references
                self.do(job, rows, references=True, again=True)
        self.write(rows)

    def has_references(self, job: Job, rows: dict[Job, list[dict[str, Any]]]) -> bool:
        """Whether there are rows of raw pixels and the untrained network for what this job's evaluation sees."""
        there = {
            (row["view"].split()[0], row["inputs"])
            for done in rows.values()
            for row in done
            if row["method"] in REFERENCES and row["seed"] == job.seed
        }
        return there >= {
            (view, self.inputs[job, view])
            for view in self.recipe(job.method, job.override).evaluation.views
        }

    def do(
        self, job: Job, rows: dict[Job, list[dict[str, Any]]], references: bool, again: bool
    ) -> None:
        """Bring one job to its end, and the files of the comparison up to date if there was something to do."""
        before = self.processes
        try:
            rows[job] = self.rows_of(job, references, again)
            if not rows[job]:
                raise RunFailed("there is no evaluation: these images have no labels")
        except RunFailed as failure:
            print(f"failed: {failure}; going on", flush=True)
            if not again:
                rows[job] = [
                    self.row(job, length=point, error=str(failure)) for point in job.points
                ]
        if self.processes > before:
            self.write(rows)

    def write(self, rows: dict[Job, list[dict[str, Any]]]) -> None:
        """The CSV of all rows so far, and what is made from it."""
        table = pd.DataFrame([row for done in rows.values() for row in done], columns=COLUMNS)
        twice = table.method.isin(REFERENCES) & table.duplicated(
            ["method", "inputs", "seed", "features", "view", "probe", "labels"]
        )
        twice |= table.schedule.eq(COURSE) & table.duplicated(
            ["run", "schedule", "steps", "features", "view", "probe", "labels"]
        )  # a run of two jobs
        write_text(self.results / RESULTS, table[~twice].to_csv(index=False))
        write_text(self.results / VERSIONS, json.dumps(self.versions(table), indent=2) + "\n")
        write_report(self.results / RESULTS, self.results, list(self.cfg.thresholds))

    def versions(self, table: pd.DataFrame) -> list[dict[str, Any]]:
        """What the runs of the table were last worked on with: each set of versions and hardware once, with its runs."""
        runs: dict[str, list[str]] = {}
        for name in table.run.dropna().unique():
            runs.setdefault((self.results / name / VERSIONS).read_text(), []).append(name)
        return [json.loads(text) | {"runs": names} for text, names in runs.items()]

    # one job

    def rows_of(self, job: Job, references: bool, again: bool) -> list[dict[str, Any]]:
        """The rows of a job, which is trained and evaluated as far as that is not done. Raises RunFailed.

        Args:
            job: which one.
            references: evaluate raw pixels and the untrained network with it.
            again: also if it is finished.
        """
        overrides = (*job.override, *self.length_of(job), f"seed={job.seed}", "limit_val_batches=0")
        recipe = self.recipe(job.method, overrides)
        print(f"  {resolved(recipe)}", flush=True)
        kept = [f"epoch={point:g}.ckpt" for point in job.points[:-1]]
        every, course = self.course(job, recipe)
        if every:
            overrides += (f"checkpoint.keep_every_n_steps={every}",)
        if kept:
            overrides += (
                f"checkpoint.frequency={math.gcd(*map(int, job.points))}",
                "checkpoint.keep_prev=True",
            )
        kept += [f"step={step}.ckpt" for step in course]
        folder = self.finished(recipe, "runs", kept, again)
        if folder:
            print(f"  done: {folder}")
        else:
            folder = self.train(
                job.method,
                recipe,
                (*overrides, f"evaluation.references={references}"),
                "runs",
                kept,
            )
        rows = []
        for point in job.points[:-1]:
            rows += self.rows_on_the_way(job, point, recipe, folder / f"epoch={point:g}.ckpt")
        for step in course:
            point = {"schedule": COURSE, "epoch": round(step / self.steps_per_epoch(job), 4)}
            rows += self.rows_on_the_way(
                job, job.length, recipe, folder / f"step={step}.ckpt", **point
            )
        return rows + self.rows_of_evaluation(
            job, job.length, recipe, folder, json.loads((folder / SUMMARY).read_text())
        )

    def rows_on_the_way(
        self, job: Job, length: float, recipe: DictConfig, checkpoint: Path, **point: Any
    ) -> list[dict[str, Any]]:
        """The rows of a checkpoint before a run's end; if it cannot be evaluated, one that says why."""
        try:
            return self.rows_of_evaluation(
                job, length, recipe, checkpoint.parent, self.summary_of(checkpoint, recipe), **point
            )
        except RunFailed as failure:
            print(f"failed: {failure}; going on", flush=True)
            return [self.row(job, length=length, error=str(failure), **point)]

    def course(self, job: Job, recipe: DictConfig) -> tuple[int, list[int]]:
        """Steps between two points in the course of a run (0: there are none), and these points but for its end and the job's own."""
        if not self.cfg.evaluate_every:
            return 0, []
        per_epoch = self.steps_per_epoch(job)
        every = max(1, round(self.cfg.evaluate_every * per_epoch))
        return every, [
            step
            for step in range(every, self.steps(job, recipe), every)
            if step / per_epoch not in job.points[:-1]
        ]

    def summary_of(self, checkpoint: Path, recipe: DictConfig) -> dict[str, Any]:
        """What summary.json is to a run, of a checkpoint on its way; it is evaluated once. Raises RunFailed."""
        kept = checkpoint.with_suffix(".json")
        if not kept.exists():
            print(f"  evaluating {checkpoint}", flush=True)
            began = time.perf_counter()
            try:
                state = torch.load(checkpoint, map_location="cpu", weights_only=True)
                evaluation = OmegaConf.merge(recipe.evaluation, {"references": False})
                made = probe_checkpoint(
                    check_config(
                        OmegaConf.create(
                            {
                                "pretrained_feature_extractor": str(checkpoint),
                                "evaluation": evaluation,
                                "accelerator": recipe.get("accelerator", "auto"),
                            }
                        ),
                        Probe,
                    )
                )
            except Exception as error:  # whatever it is, the other runs can go on
                raise RunFailed(
                    f"evaluation of {checkpoint.name}: {_last_line(str(error)) or type(error).__name__}"
                ) from error
            images = state["global_step"] * global_batch(recipe)
            summary = {
                "steps": state["global_step"],
                "images": images,
                "patches": images * views_per_image(recipe),
                "evaluation": made,
                "train_seconds": round(state["callbacks"]["Timer"]["time_elapsed"]["train"], 1),
                "evaluation_seconds": round(time.perf_counter() - began, 1),
            }
            write_text(kept, json.dumps(summary, indent=2) + "\n")
        return json.loads(kept.read_text())

    def rows_of_evaluation(
        self,
        job: Job,
        length: float,
        recipe: DictConfig,
        folder: Path,
        summary: dict[str, Any],
        **point: Any,
    ) -> list[dict[str, Any]]:
        epoch = (
            length
            if job.budget == "epochs"
            else self.steps(job, recipe) / self.steps_per_epoch(job)
        )
        known = {
            "epoch": round(epoch, 4),
            "length": length,
            "run": str(folder.relative_to(self.results)),
            "paper": paper_name(recipe, self.recipes / self.cfg.recipes),
            **{
                key: summary[key]
                for key in ("steps", "images", "patches", "train_seconds", "evaluation_seconds")
            },
        } | point
        untrained = dict.fromkeys(
            ("length", "epoch", "steps", "images", "patches", "train_seconds"), 0
        )
        untrained |= dict.fromkeys(("paper", "schedule", "setting", "value"), "")
        rows = []
        for row in summary["evaluation"]:
            row = {"labels": 1.0} | row  # a run from before there were parts of the labels
            cell = {
                key: row[key] for key in ("features", "view", "probe", "labels", "top1", "top5")
            } | {"inputs": self.inputs[job, row["view"].split()[0]]}
            rows.append(
                self.row(job, **known, **cell)
                | ({"method": row["model"], **untrained} if row["model"] in REFERENCES else {})
            )
        return rows

    def row(self, job: Job, **values: Any) -> dict[str, Any]:
        recipe = self.recipe(job.method, job.override)
        setting = (
            dict(zip(("setting", "value"), "".join(job.override).split("=")))
            if job.override
            else {}
        )
        return {
            **{key: recipe.data[key] for key in ("dataset", "holdout", "fraction")},
            "method": job.method,
            **setting,
            "seed": job.seed,
            "schedule": job.schedule,
            "budget": job.budget,
            "length": job.length,
            **values,
        }

    # how long it trains

    def length_of(self, job: Job) -> tuple[str, ...]:
        """The overrides that make a run as long as its budget says. Raises RunFailed."""
        if job.budget == "epochs" and job.length == int(job.length):
            return (f"max_epochs={int(job.length)}",)
        per_epoch, recipe = self.steps_per_epoch(job), self.recipe(job.method, job.override)
        if job.budget == "epochs":
            steps = job.length * per_epoch
        elif job.budget == "passes":
            emp = self.recipe(self.emp())
            steps = steps_for_passes(job.length, emp, recipe, self.images(emp))
        else:
            rate = self.steps_per_second(job)
            steps = rate * 60 * job.length
            print(
                f"  {rate:.3g} steps a second on this machine: {steps:.0f} steps in {job.length:g} minutes",
                flush=True,
            )
        epochs, limit = split_steps(steps, per_epoch)
        return (
            f"max_epochs={epochs}",
            *([f"limit_train_batches={limit}"] if limit < per_epoch else []),
        )

    def steps(self, job: Job, recipe: DictConfig) -> int:
        """Of a run of this recipe."""
        return recipe.max_epochs * recipe.get("limit_train_batches", self.steps_per_epoch(job))

    def steps_per_second(self, job: Job) -> float:
        """Of training, measured before the first run and kept: the runs of all seeds are equally long. Raises RunFailed.

        Trials grow until one takes a tenth of the minutes, its start included: of a short one on a GPU the start is most, and it is not the same for all.
        """
        steps, wanted = 0, TRIAL_STEPS
        while wanted > 1.2 * steps:
            steps = wanted
            rate = self.trial(job, steps)
            wanted = round(rate * 60 * job.length * TRIAL_SHARE)
        return rate

    def trial(self, job: Job, steps: int) -> float:
        epochs, limit = split_steps(steps, self.steps_per_epoch(job))
        overrides = (
            *job.override,
            f"max_epochs={epochs}",
            f"limit_train_batches={limit}",
            f"seed={self.cfg.seeds[0]}",
            "limit_val_batches=0",
        )
        recipe = self.recipe(job.method, overrides)
        folder = self.finished(recipe, "trials") or self.train(
            job.method,
            recipe,
            (*overrides, "evaluation.enabled=False", "checkpoint.enabled=False"),
            "trials",
        )
        summary = json.loads((folder / SUMMARY).read_text())
        return summary["steps"] / max(summary["train_seconds"], 0.1)  # which is rounded to tenths

    def emp(self) -> str:
        """The recipe whose backbone passes are the budget: the first of EMP among the methods, or ``emp``."""
        return next(
            (job.method for job in self.jobs if self.recipe(job.method).method == "emp"), "emp"
        )

    def steps_per_epoch(self, job: Job) -> int:
        """Raises RunFailed if there is none."""
        recipe = self.recipe(job.method, job.override)
        images, batch = self.images(recipe), global_batch(recipe)
        if images < batch:
            raise RunFailed(
                f"a batch has {batch} images, but there are only {images} to train on; set {job.method}.optimizer.batch_size"
            )
        return images // batch

    def images(self, recipe: DictConfig) -> int:
        """Training images; they are counted once for all recipes that take the same ones."""
        data = recipe.data
        return self.count(
            data.dataset,
            data.train_path,
            data.holdout,
            data.fraction,
            data.val_path,
            data.image_size,
        )

    @cache
    def count(self, *data: Any) -> int:
        return len(load_dataset(*data)[0])

    # recipes and their runs

    @cache
    def recipe(self, method: str, overrides: tuple[str, ...] = ()) -> DictConfig:
        """A recipe as it is with the comparison's overrides and these."""
        return read_config(
            str(self.recipes),
            f"{self.cfg.recipes}/{method}",
            [*self.overrides_of(method), *overrides],
        )

    def overrides_of(self, method: str) -> list[str]:
        methods = tuple(
            f"{path.stem}." for path in (self.recipes / self.cfg.recipes).glob("*.yaml")
        )
        general = [item for item in self.overrides if not item.startswith(methods)]
        return general + [
            item.removeprefix(f"{method}.")
            for item in self.overrides
            if item.startswith(f"{method}.")
        ]

    def finished(
        self, recipe: DictConfig, place: str, kept: list[str] | None = None, again: bool = False
    ) -> Path | None:
        """The folder of a finished run of this recipe, with these checkpoints or what came of them. One that was evaluated with other settings, or is to
        be evaluated ``again``, loses its summary: the pretraining then finds it unfinished, only evaluates, and notes the settings."""
        for summary in (self.results / place / recipe.method).glob(f"*/{SUMMARY}"):
            folder = summary.parent
            before = OmegaConf.load(folder / CONFIG)
            there = all(
                (folder / name).exists() or (folder / name).with_suffix(".json").exists()
                for name in kept or []
            )
            if _training(before) != _training(recipe) or not there:
                continue
            if place == "trials" or not again and _evaluation(before) == _evaluation(recipe):
                return folder
            if (folder / LAST).exists():
                for done in (*folder.glob("*=*.json"), summary):
                    done.unlink()
        return None

    def train(
        self,
        method: str,
        recipe: DictConfig,
        overrides: tuple[str, ...],
        place: str,
        kept: list[str] | None = None,
    ) -> Path:
        """Run the ordinary pretraining and return its folder. Raises RunFailed with the reason."""
        self.processes += 1
        reason = run_process(
            [
                sys.executable,
                "-m",
                "emp_plugin.main_pretrain",
                "--config-path",
                str(self.recipes),
                "--config-name",
                f"{self.cfg.recipes}/{method}",
                *self.overrides_of(method),
                *overrides,
                f"checkpoint.dir={self.results / place}",
                "auto_resume.enabled=True",
                "auto_resume.max_hours=1e6",
            ]
        )
        if reason:
            raise RunFailed(reason)
        folder = self.finished(recipe, place, kept)
        if folder is None:
            begun = self.finished(recipe, place)
            raise RunFailed(
                f"{begun} was begun without the checkpoints that evaluate_every or the snapshots ask for; the same command trains it anew"
                if begun
                else "it ended without a summary"
            )
        return folder


class RunFailed(Exception):
    """One run failed; the message says why."""


def run_process(command: list[str]) -> str | None:
    """Run a command with its output shown as it comes; None, or why it failed.

    Raises:
        UserError: after Ctrl-C or SIGTERM, when the command has ended too.
    """
    tail, interrupted = b"", False
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        while True:
            try:
                if not (part := process.stderr.read1(4096)):
                    break
                sys.stderr.buffer.write(part)
                sys.stderr.flush()
                tail = (tail + part)[-4000:]
            except KeyboardInterrupt:  # the command has to write its checkpoint first
                interrupted = True
                with suppress(subprocess.TimeoutExpired):
                    process.wait(1)
                process.terminate()  # if Ctrl-C came to us alone, or SIGTERM
    if interrupted:
        raise UserError("interrupted; the same command continues")
    status = process.returncode
    if status == 0:
        return None
    if status < 0:
        return f"killed by signal {-status}"
    return _last_line(tail.decode(errors="replace")) or f"exit status {status}"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else ""


def paper_name(recipe: DictConfig, folder: Path) -> str:
    """The name in paper.csv of what a recipe trains; empty where the paper has no such run, on a part of the data, or with other settings (of the linear
    probe, too) than the recipe of its method in ``folder`` has for that dataset, number of patches and length."""
    data, shipped = recipe.data, folder / f"{recipe.method}.yaml"
    name = (
        f"EMP-SSL {data.num_patches} patches"
        if recipe.method == "emp"
        else LABELS.get(recipe.method, "")
    )
    if (
        data.fraction not in (-1, 1)
        or data.holdout
        or not len(paper_figures(data.dataset, name))
        or not shipped.is_file()
    ):
        return ""
    published = read_config(
        str(folder.parent),
        f"{folder.name}/{shipped.stem}",
        [
            f"data.dataset={data.dataset}",
            f"data.num_patches={data.num_patches}",
            f"max_epochs={recipe.max_epochs}",
        ],
    )
    return (
        name
        if (_published(recipe), recipe.evaluation.linear)
        == (_published(published), published.evaluation.linear)
        else ""
    )


def _published(cfg: DictConfig) -> dict[str, Any]:
    """What has to be the paper's. How many devices share a batch, and in how many chunks patches are projected, is the machine's concern."""
    settings = {
        key: value for key, value in OmegaConf.to_container(cfg).items() if key in PAPER_SETTINGS
    }
    settings["optimizer"]["batch_size"] = global_batch(cfg)
    settings["method_kwargs"].pop("patch_chunk", None)
    return settings


def evaluated(recipe: DictConfig, view: str) -> tuple[Any, ...]:
    """What the features of raw pixels and of an untrained network depend on, besides the seed."""
    patches = augmentations(recipe)[0].with_patches(1)
    bag = patches if recipe.evaluation.bag_augmented else patches.plain()
    return (
        bag if view == "bag" else (patches.mean, patches.std),
        recipe.backbone,
        *(recipe.data[key] for key in ("dataset", "holdout", "fraction")),
    )


def _training(cfg: DictConfig) -> dict[str, Any]:
    return {
        key: value for key, value in OmegaConf.to_container(cfg).items() if key not in NOT_COMPARED
    }


def _evaluation(cfg: DictConfig) -> dict[str, Any]:
    settings = OmegaConf.merge(
        OmegaConf.structured(Evaluation), cfg.evaluation
    )  # an older run had what is now the default
    return {
        key: value for key, value in OmegaConf.to_container(settings).items() if key != "references"
    }

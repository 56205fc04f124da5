"""A whole study, made tiny: two methods on a few digits, with the runs in this process."""

import contextlib
import io
import json
import sys
import time

import pandas as pd
import pytest
import torch
import yaml

from emp_plugin import cli
from emp_plugin.errors import UserError
from emp_plugin.studies import launch, lengths, run
from emp_plugin.studies.rows import COLUMNS, read_table
from emp_plugin.training.callbacks import StopOnBrokenLoss
from emp_plugin.training.folder import LAST, saved_settings

TINY = [
    "precision=32",
    "optimizer.batch_size=16",
    "data.fraction=0.05",
    "data.holdout=0.03",
    "evaluation.linear.epochs=1",
    "evaluation.views=[whole]",
    "evaluation.probes=[knn]",
    "emp.data.num_patches=2",
    "emp.method_kwargs.embedding_dim=16",
    "emp.method_kwargs.proj_hidden_dim=16",
    "emp.method_kwargs.proj_output_dim=8",
    "simclr.method_kwargs.proj_hidden_dim=16",
    "accelerator=cpu",
    "enable_progress_bar=False",
    "methods=[emp,simclr]",
    "epochs=1",
]


@pytest.fixture
def trained(monkeypatch):
    """Names of the recipes trained, in order, a speed check's with *; runs are in this process."""
    calls = []

    def in_process(command):
        arguments = command[3:]
        mark = "*" if "speed_checks" in " ".join(arguments) else ""
        calls.append(arguments[4].split("/")[-1] + mark)
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            status = cli.main(arguments)
        return launch.last_line(stderr.getvalue()) if status else None

    monkeypatch.setattr(launch, "run_process", in_process)
    return calls


@pytest.fixture
def no_report(monkeypatch):
    """Saves seconds of drawing; test_report.py has it."""
    monkeypatch.setattr(run, "write_report", lambda *_: None)


def command(folder, *overrides):
    """Exit status of the command line."""
    (*_, methods) = [item for item in (*TINY, *overrides) if item.startswith("methods=")]
    absent = tuple(f"{name}." for name in ("emp", "simclr") if name not in methods)
    tiny = [item for item in TINY if not item.startswith(absent)]
    return cli.main(["compare", "digits", *tiny, f"results_dir={folder}", *overrides])


def compare(folder, *overrides):
    """The rows of results.csv."""
    assert command(folder, *overrides) == 0
    rows = read_table(folder / "results.csv")
    assert list(rows.columns) == COLUMNS
    return rows


def of(rows, method, features="backbone"):
    return rows[(rows.method == method) & (rows.features == features)]


def test_what_is_done_is_skipped_and_what_is_missing_done(tmp_path, trained, capsys):
    rows = compare(tmp_path)
    assert trained == ["emp", "simclr"]
    assert {tuple(row) for row in rows[["method", "features"]].values} == {
        ("emp", "backbone"),
        ("emp", "embedding"),
        ("simclr", "backbone"),
        ("raw pixels", "pixels"),
        ("untrained", "backbone"),
        ("untrained", "embedding"),
    }
    emp, simclr = (rows[rows.method == name].iloc[0] for name in ("emp", "simclr"))
    assert (emp.epoch, emp.steps, emp.images, emp.patches, simclr.patches) == (1, 4, 64, 128, 128)
    assert emp.train_seconds > 0
    untrained = rows[rows.method == "untrained"]
    assert untrained[["epoch", "images", "train_seconds"]].eq(0).all().all()
    for row in (emp, simclr):
        summary = json.loads((tmp_path / row.run / "summary.json").read_text())
        assert row.identity == summary["identity"]
        assert row.flops == summary["flops"] > 0
        versions = summary["versions"]
        assert row.commit == versions["commit"]
        assert row.machine == versions["hardware"]
        assert row.solo_learn == versions["solo-learn"]
        assert row.torch == versions["torch"]
    assert set(rows.protocol) == {"custom"}
    assert set(rows["view"]) == {"whole"}
    assert set(rows.precision) == {"32"}
    assert rows.scale.eq(1).all()
    assert rows.view_patches.isna().all()
    assert not rows.augmented.any()
    assert not rows.collapsed.any()
    assert untrained.identity.isna().all()
    assert {
        "table.md",
        "time_to_accuracy.md",
        "results.csv",
        "comparison.yaml",
        "runs",
    } <= {path.name for path in tmp_path.iterdir()}
    assert "scheduler.warmup_epochs=0.1" in capsys.readouterr().out  # fitted: 1 of 10

    again = compare(tmp_path)
    assert trained == ["emp", "simclr"]
    pd.testing.assert_frame_equal(rows, again)

    (tmp_path / "table.md").unlink()
    compare(tmp_path, "report_only=True")
    assert (tmp_path / "table.md").exists()
    assert trained == ["emp", "simclr"]


def test_a_run_from_before_a_setting_of_the_evaluation_is_not_evaluated_again(
    tmp_path, trained, no_report
):
    rows = compare(tmp_path, "methods=[emp]")
    (folder,) = (tmp_path / "runs" / "emp").glob("*/")
    cfg = saved_settings(folder)
    for key in ("mlp", "label_fractions"):
        del cfg["evaluation"][key]
    (folder / "config.yaml").write_text(yaml.safe_dump(cfg))
    pd.testing.assert_frame_equal(compare(tmp_path, "methods=[emp]"), rows)
    assert trained == ["emp"]


def test_a_run_is_known_by_its_identity(tmp_path, trained, no_report):
    """What does not change the training may differ; a run of another version is made again."""
    rows = compare(tmp_path, "methods=[emp]")
    other = ("methods=[emp]", "name=other", "data.num_workers=1", "log_every_n_steps=7")
    pd.testing.assert_frame_equal(compare(tmp_path, *other), rows)
    assert trained == ["emp"]
    summary = tmp_path / rows.run[0] / "summary.json"
    contents = json.loads(summary.read_text())
    marked = contents | {"collapsed": True}
    summary.write_text(json.dumps(marked))
    collapsed = compare(tmp_path, "methods=[emp]").set_index("method").collapsed
    assert collapsed["emp"].all()
    assert not collapsed[["raw pixels", "untrained"]].any()
    summary.write_text(json.dumps(contents | {"identity": "of another version"}))
    again = compare(tmp_path, "methods=[emp]")
    assert trained == ["emp", "emp"]
    before, after = (of(table, "emp").iloc[0] for table in (rows, again))
    assert after.identity == before.identity
    assert after.run != before.run


def test_a_run_of_another_name_is_evaluated_again_from_its_checkpoint(
    tmp_path, trained, no_report, monkeypatch
):
    steps = []
    monkeypatch.setattr(StopOnBrokenLoss, "on_train_batch_start", lambda *_: steps.append("a step"))
    before = of(compare(tmp_path, "methods=[emp]"), "emp")
    assert len(steps) == 4
    other = ("methods=[emp]", "name=other", "evaluation.probes=[knn10]")
    after = of(compare(tmp_path, *other), "emp")
    assert len(steps) == 4
    assert after.probe.tolist() == ["knn10"]
    assert after.run.tolist() == before.run.tolist()
    (folder,) = (tmp_path / "runs" / "emp").glob("*/")
    assert saved_settings(folder)["name"] == "other"


@pytest.mark.slow
def test_more_seeds_and_other_probes(tmp_path, trained, no_report):
    simclr = compare(tmp_path).query("method == 'simclr'").iloc[0]
    other = compare(tmp_path, "seeds=[0,1]", "methods=[simclr]")
    # seed 0 is there again only to evaluate the references with it
    assert trained == ["emp", "simclr", "simclr", "simclr"]
    assert set(other.method) == {"simclr", "raw pixels", "untrained"}
    assert set(other[other.method == "untrained"].seed) == {0, 1}
    assert other[(other.method == "simclr") & (other.seed == 0)].top1.iloc[0] == simclr.top1

    # evaluated again, not trained again
    rows = compare(tmp_path, "evaluation.linear.epochs=2", "evaluation.probes=[knn,linear]")
    assert trained[-2:] == ["emp", "simclr"]
    assert set(rows.probe) == {"knn", "linear", "online linear"}
    knn = rows[(rows.method == "simclr") & (rows.probe == "knn")]
    assert knn.top1.iloc[0] == simclr.top1
    assert len(list((tmp_path / "runs").glob("*/*"))) == 3


def test_a_failed_run_says_why_and_the_others_go_on(tmp_path, trained):
    rows = compare(tmp_path, "methods=[simclr,emp]", "simclr.method_kwargs.temperature=nan")
    assert trained == ["simclr", "emp"]
    assert rows.method[0] == "simclr"
    assert "the loss is nan" in rows.error[0]
    assert rows.error.notna().sum() == 1
    assert set(rows[rows.error.isna()].method) == {"emp", "raw pixels", "untrained"}
    assert "SimCLR, seed 0: failed: the loss is nan" in (tmp_path / "table.md").read_text()


def test_a_run_cut_off_is_continued(tmp_path, trained, no_report, monkeypatch):
    class Cut(Exception):
        pass

    def cut(self, trainer, *args):
        if trainer.global_step == 3:
            raise Cut

    emp = ("methods=[emp]", "checkpoint.every_n_steps=2")
    with monkeypatch.context() as patch:
        patch.setattr(StopOnBrokenLoss, "on_train_batch_start", cut)
        with pytest.raises(Cut):
            compare(tmp_path, *emp, "checkpoint.min_seconds=0")
    (folder,) = (tmp_path / "runs" / "emp").glob("*/")
    assert (folder / LAST).exists()
    # evaluated otherwise than it began
    rows = compare(tmp_path, *emp, "evaluation.linear.epochs=2")
    assert list((tmp_path / "runs" / "emp").glob("*/")) == [folder]
    assert rows[rows.method == "emp"].steps.iloc[0] == 4
    assert rows.error.isna().all()
    assert saved_settings(folder)["evaluation"]["linear"]["epochs"] == 2


def test_references_are_evaluated_as_each_method_sees_images(tmp_path, trained, no_report):
    bag = ("evaluation.views=[bag]", "evaluation.bag_patches=1")
    compare(tmp_path, *bag, "methods=[simclr]")
    rows = compare(tmp_path, *bag, "methods=[emp,simclr]")
    assert trained == ["simclr", "emp"]
    untrained = of(rows, "untrained").set_index("inputs")
    assert untrained.index.tolist() == ["emp", "simclr"]
    assert untrained.run["emp"].startswith("runs/emp/")
    assert untrained.run["simclr"].startswith("runs/simclr/")
    evaluated = untrained[["view", "view_patches", "augmented"]].values.tolist()
    assert evaluated == [["bag", 1, False]] * 2


def test_a_point_that_cannot_be_evaluated_leaves_the_others(tmp_path, trained, monkeypatch):
    def broken(cfg):
        if "epoch=1" in cfg.pretrained_feature_extractor:
            raise UserError("no room")
        return probe(cfg)

    probe = run.probe_checkpoint
    monkeypatch.setattr(run, "probe_checkpoint", broken)
    rows = compare(tmp_path, "methods=[emp]", "epochs=[1,2,3]", "schedule=snapshot")
    points = rows[rows.method == "emp"].drop_duplicates("length").set_index("length")
    assert points.error[1].endswith("no room")
    assert points.error[[2, 3]].isna().all()
    assert (points.top1[[2, 3]] > 0).all()
    one, _, _ = (tmp_path / "table.md").read_text().split("## ")[1:]
    assert "EMP-SSL, seed 0: failed: evaluation of epoch=1.ckpt: no room" in one


def test_fewer_images_than_a_batch_are_that_runs_failure(tmp_path, trained, no_report):
    rows = compare(
        tmp_path, "methods=[simclr,emp]", "simclr.optimizer.batch_size=512", "epochs=0.5"
    )
    assert trained == ["emp"]
    assert "set simclr.optimizer.batch_size" in rows.error[0]
    assert rows.error[1:].isna().all()


@pytest.mark.slow
def test_snapshots_are_points_of_one_training(tmp_path, trained):
    both = ("methods=[emp]", "epochs=[1,2]", "schedule=[fitted,snapshot]")
    rows = compare(tmp_path, *both)
    # two epochs, with a snapshot after one; and one epoch. The fitted two epochs are the first run
    assert trained == ["emp", "emp"]
    points = of(rows, "emp").set_index(["schedule", "length"])
    assert points.steps.to_dict() == {
        ("snapshot", 1): 4,
        ("snapshot", 2): 8,
        ("fitted", 1): 4,
        ("fitted", 2): 8,
    }
    assert points.run["snapshot", 1] == points.run["snapshot", 2] == points.run["fitted", 2]
    assert points.run["fitted", 2] != points.run["fitted", 1]
    assert points.train_seconds["snapshot", 1] < points.train_seconds["snapshot", 2]
    text = (tmp_path / "table.md").read_text()
    assert "## 1 epoch, schedule fitted" in text
    assert "## 1 epoch, schedule snapshot" in text
    compare(tmp_path, *both)
    assert len(trained) == 2


def test_points_in_the_course_of_a_run(tmp_path, trained):
    """They are evaluated by quick, the end by the study's own probes and views."""
    every = of(compare(tmp_path, "methods=[emp]", "evaluate_every=0.25"), "emp")
    assert trained == ["emp"]
    course = every[every.schedule == "course"]
    assert set(course.protocol) == {"quick"}
    assert set(course["view"]) == {"whole", "dense"}
    assert set(course.probe) == {"linear", "online linear", "knn", "knn10"}
    assert every.protocol.iloc[-1] == "custom"
    rows = every[(every["view"] == "whole") & (every.probe == "knn")].set_index("steps")
    assert rows.index.tolist() == [1, 2, 3, 4]
    assert rows.schedule.tolist() == ["course"] * 3 + ["fitted"]
    assert rows.epoch.tolist() == [0.25, 0.5, 0.75, 1]
    assert set(rows.length) == {1}
    assert rows.train_seconds.is_monotonic_increasing
    assert (rows.evaluation_seconds > 0).all()
    assert rows.images.tolist() == [16, 32, 48, 64]
    assert rows.flops.tolist() == [rows.flops[1] * n for n in (1, 2, 3, 4)]
    (folder,) = (tmp_path / "runs" / "emp").glob("*/")
    for step in (1, 2, 3):
        assert torch.load(folder / f"step={step}.ckpt", weights_only=True)["global_step"] == step
    assert "schedule course" not in (tmp_path / "table.md").read_text()
    again = of(compare(tmp_path, "methods=[emp]", "evaluate_every=0.5"), "emp")
    assert trained == ["emp"]
    expected = every[every.steps.isin([2, 4])]
    pd.testing.assert_frame_equal(again.reset_index(drop=True), expected.reset_index(drop=True))


def test_equal_minutes_are_measured_once_and_fitted(tmp_path, trained, no_report, monkeypatch):
    monkeypatch.setattr(lengths, "SPEED_CHECK_STEPS", 2)
    minutes = ("budget=minutes", "minutes=0.05", "methods=[emp]")
    rows = compare(tmp_path, *minutes)
    # the second check may be as short as the first
    assert trained in (["emp*", "emp*", "emp"], ["emp*", "emp"])
    emp = rows[rows.method == "emp"].iloc[0]
    checks = [
        json.loads(path.read_text())
        for path in (tmp_path / "speed_checks").glob("*/*/summary.json")
    ]
    last = max(checks, key=lambda summary: summary["steps"])
    assert emp.steps == pytest.approx(3 * last["steps"] / last["train_seconds"], rel=0.3, abs=1)
    assert emp.epoch == pytest.approx(emp.steps / 4)
    count = len(trained)
    compare(tmp_path, *minutes)
    assert len(trained) == count


@pytest.mark.slow
def test_equal_flops(tmp_path, trained, no_report):
    rows = compare(tmp_path, "budget=flops", "epochs=0.5", "emp.data.num_patches=4")
    rows = rows.drop_duplicates("method").set_index("method")
    assert rows.epoch["emp"] == 0.5
    assert rows.steps["emp"] == 2
    # two views of an image, of the same networks but for the head: 4 steps, within half a step
    assert rows.steps["simclr"] == 4
    assert rows.flops["simclr"] == pytest.approx(rows.flops["emp"], rel=1 / 8)
    assert rows.flops["simclr"] != rows.flops["emp"]


def test_runs_at_once_give_the_same_rows(tmp_path, trained, no_report, monkeypatch):
    one_by_one = compare(tmp_path / "one by one")
    assert trained == ["emp", "simclr"]
    monkeypatch.undo()  # runs at once are processes of their own, which round as this one does
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(run, "write_report", lambda *_: None)
    at_once = compare(tmp_path / "at once", "at_once=2")
    same = ["method", "steps", "identity", "view", "probe", "top1", "top5", "error"]
    pd.testing.assert_frame_equal(one_by_one[same], at_once[same])
    assert of(one_by_one, "emp").train_seconds.notna().all()
    assert of(at_once, "emp").train_seconds.isna().all()


def test_an_interrupted_study_stops_all_of_its_runs(tmp_path, monkeypatch):
    ended = []

    def train(self, method, *_):
        if method == "simclr":
            while not launch.RUNNING:
                time.sleep(0.01)
            raise KeyboardInterrupt  # as in the main thread, which waits for the threads
        ended.append(launch.run_process([sys.executable, "-c", "import time; time.sleep(60)"]))

    monkeypatch.setattr(launch.Runs, "train", train)
    assert command(tmp_path, "at_once=2", "methods=[simclr,emp]") == 1
    assert ended == ["killed by signal 15"]


def test_an_ablation_varies_one_setting(tmp_path, trained, no_report):
    rows = compare(
        tmp_path,
        "methods=[emp]",
        "ablate=optimizer.batch_size",
        "values=[16,32]",
        "budget=[epochs,flops]",
        "epochs=0.5",
    )
    assert trained == ["emp"] * 2  # equal FLOPs take the same two
    emp = of(rows, "emp")
    assert emp[["setting", "value", "budget", "steps", "images"]].values.tolist() == [
        ["optimizer.batch_size", 16, "epochs", 2, 32],
        ["optimizer.batch_size", 32, "epochs", 1, 32],
        ["optimizer.batch_size", 16, "flops", 2, 32],
        ["optimizer.batch_size", 32, "flops", 1, 32],
    ]
    optimizers = [saved_settings(tmp_path / name)["optimizer"] for name in emp.run[:2]]
    assert [optimizer.pop("batch_size") for optimizer in optimizers] == [16, 32]
    assert optimizers[0] == optimizers[1]
    assert rows[rows.method == "untrained"].value.isna().all()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimiser.lr=1", "unknown setting 'optimiser"),
        ("max_epochs=3", "use epochs"),
        ("methods=[emq]", "emq"),
        ("ablate=seed values=[1]", "is the study's to set"),
        ("ablate=evaluation.bag_patches values=[1]", "settings of the training"),
        ("emp.limit_train_batches=2", "is the study's to set"),
        ("++accumulate_grad_batches=2", "is the study's to set"),
        ("evaluation.enabled=False", "is the study's to set"),
        ("byol.optimizer.lr=1", "would do nothing: byol is not among the methods"),
        ("data.num_patches=2", "would do nothing: the augmentations of digits/simclr"),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(
    tmp_path, trained, capsys, override, message
):
    assert command(tmp_path, *override.split()) == 1
    assert message in capsys.readouterr().err
    assert not trained
    assert not any(tmp_path.iterdir())

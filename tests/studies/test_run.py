"""The whole comparison, made tiny: two methods on a few digits, with the runs in this process."""

import contextlib
import io
import json
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf

from emp_plugin import main_compare, main_pretrain
from emp_plugin.errors import UserError
from emp_plugin.studies import run
from emp_plugin.studies.report import COLUMNS
from emp_plugin.studies.settings import read_comparison
from emp_plugin.training.callbacks import StopOnBrokenLoss
from emp_plugin.training.folder import LAST
from support import SCRIPTS

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
    """Names of the recipes trained, in order; runs happen in this process."""
    calls = []

    def in_process(command):
        arguments = command[3:]
        calls.append(arguments[3].split("/")[-1] + ("*" if "trials" in " ".join(arguments) else ""))
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            status = main_pretrain.main(arguments)
        return run._last_line(stderr.getvalue()) if status else None

    monkeypatch.setattr(run, "run_process", in_process)
    return calls


@pytest.fixture
def no_report(monkeypatch):
    monkeypatch.setattr(
        run, "write_report", lambda *_: None
    )  # seconds of drawing; test_report.py has it


def compare(folder, *overrides):
    assert (
        main_compare.main(
            [
                "--config-path",
                str(SCRIPTS / "compare"),
                "--config-name",
                "digits",
                *TINY,
                f"results_dir={folder}",
                *overrides,
            ]
        )
        == 0
    )
    rows = pd.read_csv(folder / "results.csv")
    assert list(rows.columns) == COLUMNS
    return rows


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
    assert (emp.epoch, emp.steps, emp.images, emp.patches, simclr.patches) == (
        1,
        4,
        64,
        128,
        128,
    )
    assert emp.train_seconds > 0
    assert rows[rows.method == "untrained"][["epoch", "images", "train_seconds"]].eq(0).all().all()
    (versions,) = json.loads((tmp_path / "versions.json").read_text())
    assert torch.__version__.startswith(versions["torch"])
    assert versions["runs"] == [
        emp.run,
        simclr.run,
    ]
    assert {
        "table.md",
        "time_to_accuracy.md",
        "results.csv",
        "comparison.yaml",
        "versions.json",
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
    (folder,) = (tmp_path / "runs" / "emp").iterdir()
    cfg, summary = (
        OmegaConf.load(folder / "config.yaml"),
        json.loads((folder / "summary.json").read_text()),
    )
    for key in ("mlp", "label_fractions"):
        del cfg.evaluation[key]
    for row in summary["evaluation"]:
        del row["labels"]
    OmegaConf.save(cfg, folder / "config.yaml")
    (folder / "summary.json").write_text(json.dumps(summary))
    pd.testing.assert_frame_equal(compare(tmp_path, "methods=[emp]"), rows)
    assert trained == ["emp"]


@pytest.mark.slow
def test_more_seeds_and_other_probes(tmp_path, trained, no_report):
    simclr = compare(tmp_path).query("method == 'simclr'").iloc[0]
    other = compare(tmp_path, "seeds=[0,1]", "methods=[simclr]")
    assert trained == [
        "emp",
        "simclr",
        "simclr",
        "simclr",
    ]  # seed 0 only to evaluate the references with it
    assert set(other.method) == {"simclr", "raw pixels", "untrained"}
    assert set(other[other.method == "untrained"].seed) == {0, 1}
    assert other[(other.method == "simclr") & (other.seed == 0)].top1.iloc[0] == simclr.top1

    rows = compare(tmp_path, "evaluation.linear.epochs=2", "evaluation.probes=[knn,linear]")
    assert trained[-2:] == ["emp", "simclr"]
    assert set(rows.probe) == {
        "knn",
        "linear",
        "online linear",
    }
    assert (
        rows[(rows.method == "simclr") & (rows.probe == "knn")].top1.iloc[0] == simclr.top1
    )  # evaluated again, not trained again
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

    with monkeypatch.context() as patch:
        patch.setattr(StopOnBrokenLoss, "on_train_batch_start", cut)
        with pytest.raises(Cut):
            compare(
                tmp_path, "methods=[emp]", "checkpoint.every_n_steps=2", "checkpoint.min_seconds=0"
            )
    (folder,) = (tmp_path / "runs" / "emp").iterdir()
    assert (folder / LAST).exists()
    rows = compare(
        tmp_path, "methods=[emp]", "checkpoint.every_n_steps=2", "evaluation.linear.epochs=2"
    )  # evaluated otherwise than it began
    assert list((tmp_path / "runs" / "emp").iterdir()) == [folder]
    assert rows[rows.method == "emp"].steps.iloc[0] == 4
    assert rows.error.isna().all()
    assert OmegaConf.load(folder / "config.yaml").evaluation.linear.epochs == 2


def test_references_are_evaluated_as_each_method_sees_images(tmp_path, trained, no_report):
    rows = compare(
        tmp_path, "evaluation.views=[bag]", "evaluation.bag_patches=1", "methods=[simclr]"
    )
    rows = compare(
        tmp_path, "evaluation.views=[bag]", "evaluation.bag_patches=1", "methods=[emp,simclr]"
    )
    assert trained == ["simclr", "emp"]
    untrained = rows[(rows.method == "untrained") & (rows.features == "backbone")].set_index(
        "inputs"
    )
    assert untrained.index.tolist() == ["emp", "simclr"]
    assert untrained.run["emp"].startswith("runs/emp/")
    assert untrained.run["simclr"].startswith("runs/simclr/")


def test_a_point_that_cannot_be_evaluated_leaves_the_others(tmp_path, trained, monkeypatch):
    def broken(cfg):
        if "epoch=1" in cfg.pretrained_feature_extractor:
            raise UserError("no room")
        return probe(cfg)

    probe = run.probe_checkpoint
    monkeypatch.setattr(run, "probe_checkpoint", broken)
    rows = (
        compare(tmp_path, "methods=[emp]", "epochs=[1,2,3]", "schedule=snapshot")
        .query("method == 'emp'")
        .drop_duplicates("length")
        .set_index("length")
    )
    assert rows.error[1].endswith("no room")
    assert rows.error[[2, 3]].isna().all()
    assert (rows.top1[[2, 3]] > 0).all()
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
    rows = compare(tmp_path, "methods=[emp]", "epochs=[1,2]", "schedule=[fitted,snapshot]")
    assert (
        trained == ["emp", "emp"]
    )  # two epochs, with a snapshot after one; and one epoch. The fitted two epochs are the first run
    points = rows[(rows.method == "emp") & (rows.features == "backbone")].set_index(
        ["schedule", "length"]
    )
    assert points.steps.to_dict() == {
        ("snapshot", 1): 4,
        ("snapshot", 2): 8,
        ("fitted", 1): 4,
        ("fitted", 2): 8,
    }
    assert (
        points.run["snapshot", 1]
        == points.run["snapshot", 2]
        == points.run["fitted", 2]
        != points.run["fitted", 1]
    )
    assert points.train_seconds["snapshot", 1] < points.train_seconds["snapshot", 2]
    text = (tmp_path / "table.md").read_text()
    assert "## 1 epoch, schedule fitted" in text
    assert "## 1 epoch, schedule snapshot" in text
    compare(tmp_path, "methods=[emp]", "epochs=[1,2]", "schedule=[fitted,snapshot]")
    assert len(trained) == 2


def test_points_in_the_course_of_a_run(tmp_path, trained):
    rows = (
        compare(tmp_path, "methods=[emp]", "evaluate_every=0.25")
        .query("method == 'emp' and features == 'backbone'")
        .set_index("steps")
    )
    assert trained == ["emp"]
    assert rows.index.tolist() == [1, 2, 3, 4]
    assert rows.schedule.tolist() == ["course"] * 3 + ["fitted"]
    assert rows.epoch.tolist() == [0.25, 0.5, 0.75, 1]
    assert set(rows.length) == {1}
    assert rows.train_seconds.is_monotonic_increasing
    assert (rows.evaluation_seconds > 0).all()
    assert rows.images.tolist() == [16, 32, 48, 64]
    (folder,) = (tmp_path / "runs" / "emp").iterdir()
    for step in (1, 2, 3):
        assert torch.load(folder / f"step={step}.ckpt", weights_only=True)["global_step"] == step
    assert "schedule course" not in (tmp_path / "table.md").read_text()
    again = compare(tmp_path, "methods=[emp]", "evaluate_every=0.5").query(
        "method == 'emp' and features == 'backbone'"
    )
    assert trained == ["emp"]
    assert again.steps.tolist() == [2, 4]
    assert again.top1.tolist() == rows.top1[[2, 4]].tolist()


def test_equal_minutes_are_measured_once_and_fitted(tmp_path, trained, no_report, monkeypatch):
    monkeypatch.setattr(run, "TRIAL_STEPS", 2)
    rows = compare(tmp_path, "budget=minutes", "minutes=0.05", "methods=[emp]")
    assert trained == ["emp*", "emp*", "emp"] or trained == [
        "emp*",
        "emp",
    ]  # the second look may be as short as the first
    emp = rows[rows.method == "emp"].iloc[0]
    trial = max(
        (json.loads(path.read_text()) for path in (tmp_path / "trials").glob("*/*/summary.json")),
        key=lambda summary: summary["steps"],
    )
    assert emp.steps == pytest.approx(3 * trial["steps"] / trial["train_seconds"], rel=0.3, abs=1)
    assert emp.epoch == pytest.approx(emp.steps / 4)
    count = len(trained)
    compare(tmp_path, "budget=minutes", "minutes=0.05", "methods=[emp]")
    assert len(trained) == count


@pytest.mark.slow
def test_equal_passes(tmp_path, trained, no_report):
    rows = (
        compare(tmp_path, "budget=passes", "epochs=0.5", "emp.data.num_patches=4")
        .drop_duplicates("method")
        .set_index("method")
    )
    assert rows.patches["emp"] == rows.patches["simclr"] == 0.5 * 64 * 4
    assert rows.epoch["emp"] == 0.5
    assert rows.epoch["simclr"] == 1


def test_an_ablation_varies_one_setting(tmp_path, trained, no_report):
    rows = compare(
        tmp_path,
        "methods=[emp]",
        "ablate=optimizer.batch_size",
        "values=[16,32]",
        "budget=[epochs,passes]",
        "epochs=0.5",
    )
    assert trained == ["emp"] * 2  # equal passes take the same two
    emp = rows[(rows.method == "emp") & (rows.features == "backbone")]
    assert emp[["setting", "value", "budget", "steps", "images"]].values.tolist() == [
        ["optimizer.batch_size", 16, "epochs", 2, 32],
        ["optimizer.batch_size", 32, "epochs", 1, 32],
        ["optimizer.batch_size", 16, "passes", 2, 32],
        ["optimizer.batch_size", 32, "passes", 1, 32],
    ]
    configs = [OmegaConf.load(tmp_path / run / "config.yaml") for run in emp.run[:2]]
    assert [config.optimizer.pop("batch_size") for config in configs] == [16, 32]
    assert configs[0].optimizer == configs[1].optimizer
    assert rows[rows.method == "untrained"].value.isna().all()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimiser.lr=1", "unknown setting 'optimiser"),
        ("max_epochs=3", "use epochs"),
        ("methods=[emq]", "emq"),
        ("ablate=seed values=[1]", "is the comparison's to set"),
        ("ablate=evaluation.bag_patches values=[1]", "settings of the training"),
        ("emp.limit_train_batches=2", "is the comparison's to set"),
        ("++accumulate_grad_batches=2", "is the comparison's to set"),
        ("evaluation.enabled=False", "is the comparison's to set"),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(
    tmp_path, trained, capsys, override, message
):
    assert (
        main_compare.main(
            [
                "--config-path",
                str(SCRIPTS / "compare"),
                "--config-name",
                "digits",
                *TINY,
                f"results_dir={tmp_path}",
                *override.split(),
            ]
        )
        == 1
    )
    assert message in capsys.readouterr().err
    assert not trained
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("cifar/emp", [], "EMP-SSL 20 patches"),
        (
            "cifar/emp",
            [
                "data.num_patches=200",
                "method_kwargs.patch_chunk=20",
                "data.dataset=cifar100",
                "max_epochs=10",
            ],
            "EMP-SSL 200 patches",
        ),
        (
            "cifar/emp",
            ["devices=2", "optimizer.batch_size=50", "precision=32", "data.views=image"],
            "EMP-SSL 20 patches",
        ),
        ("cifar/byol", ["max_epochs=1"], "BYOL"),
        ("tiny-imagenet/emp", ["data.num_patches=200"], "EMP-SSL 200 patches"),
        ("cifar/emp", ["data.num_patches=8"], ""),
        ("cifar/emp", ["augmentations=emp_crop_grey"], ""),
        ("cifar/emp_crop_grey", [], ""),
        ("cifar/emp_native", [], ""),
        ("cifar/emp", ["data.patch_size=24"], ""),
        ("cifar/emp", ["method_kwargs.invariance_weight=100"], ""),
        ("cifar/emp", ["method_kwargs.eps=0.4"], ""),
        ("cifar/emp", ["method_kwargs.preset=paper"], ""),
        ("cifar/emp", ["optimizer.batch_size=50"], ""),
        ("cifar/emp", ["optimizer.lr=0.1"], ""),
        ("cifar/emp", ["evaluation.linear.epochs=10"], ""),
        ("cifar/emp", ["backbone.name=resnet50"], ""),
        ("cifar/emp", ["data.fraction=0.2"], ""),
        ("cifar/emp", ["data.holdout=0.1"], ""),
        ("cifar/byol", ["max_epochs=1", "augmentations=crop_grey"], ""),
        ("cifar/byol", ["max_epochs=1", "momentum.base_tau=0.9"], ""),
        ("cifar/simclr", ["max_epochs=1", "scheduler.warmup_epochs=0"], ""),
        ("tiny-imagenet/byol", ["max_epochs=1"], ""),
        ("digits/emp", ["data.num_patches=20"], ""),
    ],
)
def test_the_papers_name_is_of_its_own_settings_only(config, name, overrides, expected):
    assert (
        run.paper_name(config(name, *overrides), SCRIPTS / "pretrain" / name.split("/")[0])
        == expected
    )


def runs_of(folder, *overrides):
    cfg, rest = read_comparison(
        str(SCRIPTS / "compare"), "digits", [*TINY, f"results_dir={folder}", *overrides]
    )
    return run.Runs(cfg, SCRIPTS / "pretrain", rest)


def test_images_are_counted_for_every_value_of_an_ablation(tmp_path):
    runs = runs_of(
        tmp_path,
        "ablate=data.fraction",
        "values=[0.1,0.5]",
        "methods=[emp]",
        "epochs=[0.5]",
        "data.holdout=0",
    )
    assert [runs.steps_per_epoch(job) for job in runs.jobs] == [
        144 // 16,
        719 // 16,
    ]  # of 1437 images


def test_all_devices_share_the_batch(tmp_path):
    one, two = (
        runs_of(
            tmp_path,
            "methods=[simclr]",
            f"devices={devices}",
            "optimizer.batch_size=8",
            "data.fraction=-1",
        )
        for devices in (1, 2)
    )
    assert two.steps_per_epoch(two.jobs[0]) == one.steps_per_epoch(one.jobs[0]) // 2


@pytest.mark.parametrize(("start", "step"), [(0.0, 6.0), (3.0, 0.05), (3.0, 0.02), (1.0, 0.003)])
def test_a_slow_start_does_not_shorten_equal_minutes(tmp_path, monkeypatch, start, step):
    """A machine on which the start of training takes ``start`` seconds and every step ``step``."""
    runs = runs_of(tmp_path, "budget=minutes", "minutes=5", "methods=[emp]")
    trials = []
    monkeypatch.setattr(
        runs, "trial", lambda job, steps: trials.append(steps) or steps / (start + steps * step)
    )
    steps = 300 * runs.steps_per_second(runs.jobs[0])
    assert start + steps * step == pytest.approx(300, rel=0.12)
    assert len(trials) < 8
    assert start + trials[-1] * step <= 40


def test_an_interrupted_process_is_waited_for(tmp_path, monkeypatch):
    """SIGTERM, or Ctrl-C, of the comparison alone: the run is told so, and has the time to write its checkpoint."""

    def pressed(part):
        raise KeyboardInterrupt

    monkeypatch.setattr(run.sys, "stderr", SimpleNamespace(buffer=SimpleNamespace(write=pressed)))
    script = f'trap "sleep 1; touch {tmp_path}/saved; exit 1" TERM; echo ready >&2; for i in $(seq 300); do sleep 0.1; done'
    with pytest.raises(UserError, match="the same command continues"):
        run.run_process(["bash", "-c", script])
    assert (tmp_path / "saved").exists()


def test_processes_that_fail(capfd):
    assert run.run_process(["bash", "-c", "echo fine >&2"]) is None
    assert run.run_process(["bash", "-c", "echo 'error: no room' >&2; exit 1"]) == "no room"
    assert run.run_process(["bash", "-c", "kill -9 $$"]) == "killed by signal 9"
    assert "no room" in capfd.readouterr().err

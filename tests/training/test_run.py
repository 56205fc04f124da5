"""The whole job through the command line, made tiny: a few steps on digits."""

import itertools
import json
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from PIL import Image

from emp_plugin import cli
from emp_plugin.config import augmentations, read_config
from emp_plugin.evaluation import extract_features, protocol
from emp_plugin.evaluation.probes import train_classifier
from emp_plugin.solo_learn import pl
from emp_plugin.training import pictures
from emp_plugin.training.callbacks import CONFIG_KEY, Checkpoints
from emp_plugin.training.data import PretrainData
from emp_plugin.training.probing import encoder, evaluate_run, fresh_method
from emp_plugin.training.run import batch_norm_group
from emp_plugin.transforms import BatchMultiPatch
from support import SCRIPTS, runs
from support.runs import TINY_EMP, at_step, the_run

SETTINGS = [
    "optimizer.batch_size=16",
    "data.fraction=0.06",
    "limit_val_batches=1",
    "evaluation.linear.epochs=2",
    "evaluation.views=[bag]",
    "evaluation.bag_patches=2",
    "checkpoint.every_n_steps=2",
    "checkpoint.min_seconds=0",
    "checkpoint.keep_prev=True",
]


def pretrain(folder, *overrides, method=TINY_EMP):
    return runs.pretrain(folder, *SETTINGS, *method, *overrides)


def state_of(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    ("recipe", "overrides", "group"),
    [
        ("digits/emp", [], 8 * 64),
        ("digits/emp", ["method_kwargs.patch_chunk=3"], 3 * 64),
        ("digits/emp", ["method_kwargs.patch_chunk=30"], 8 * 64),
        ("digits/byol", [], 64),
    ],
)
def test_patches_that_share_batch_norms_statistics(recipe, overrides, group):
    assert batch_norm_group(read_config(SCRIPTS / "pretrain", recipe, overrides)) == group


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    assert pretrain(folder, "max_epochs=2") == 0
    return the_run(folder)


def test_what_a_run_leaves(finished):
    names = {path.name for path in finished.iterdir()}
    assert {
        "config.yaml",
        "versions.json",
        "metrics.csv",
        "patches.png",
        "curves.png",
        "summary.json",
        "evaluation.csv",
        "last.ckpt",
        "epoch=1.ckpt",
        "epoch=2.ckpt",
    } <= names
    assert not [name for name in names if "tmp" in name]
    summary = json.loads((finished / "summary.json").read_text())
    counts = [summary[key] for key in ("epochs", "steps", "images", "patches")]
    assert counts == [2, 10, 160, 320]
    assert summary["batch_norm_group"] == 2 * 16
    assert summary["train_seconds"] > 0
    assert summary["patches_per_second"] == pytest.approx(320 / summary["train_seconds"], rel=0.1)
    rows = pd.DataFrame(summary["evaluation"])
    bag, probes = "bag", ("linear", "knn", "knn10")
    networks, features = ("emp", "untrained"), ("backbone", "embedding")
    expected = {("emp", "backbone", bag, "online linear")}
    expected |= set(itertools.product(networks, features, [bag], probes))
    expected |= {("raw pixels", "pixels", "whole", probe) for probe in probes}
    assert {tuple(row) for row in rows[["model", "features", "view", "probe"]].values} == expected
    assert (rows.top5 >= rows.top1).all()
    metrics = pd.read_csv(finished / "metrics.csv")
    assert metrics.train_coding_rate.notna().sum() == 10
    assert metrics.train_rank.between(1, 15).sum() == 10
    assert metrics.train_std.between(0, 1).sum() == 10
    assert metrics.val_acc1.notna().sum() == 2
    for name in ("patches.png", "curves.png"):
        with Image.open(finished / name) as picture:
            assert min(picture.size) > 50


@pytest.mark.parametrize("column", ["train_loss", "ressl_loss_step", "train_neg_cos_sim_step"])
def test_the_objective_is_drawn_under_any_name(tmp_path, monkeypatch, column):
    drawn = []
    monkeypatch.setattr(pictures, "save_figure", lambda figure, path: drawn.append(figure))
    others = {
        "train_class_loss_step": [4.0, 3.0],
        "train_momentum_class_loss_step": [4.0, 3.0],
        "val_loss": [None, 2.0],
        f"{column.removesuffix('_step')}_epoch": [None, 1.5],
    }
    pictures.draw_curves(pd.DataFrame({"step": [0, 1], column: [2.0, 1.0], **others}), tmp_path)
    (axis,) = drawn[0].axes
    assert axis.get_ylabel() == "loss"
    assert [line.get_ydata().tolist() for line in axis.lines] == [[2.0, 1.0]]


@pytest.mark.parametrize("method", ["emp", "byol"])
def test_the_online_classifier_s_row_is_the_validation_s(config, digits, tmp_path, method):
    cfg = config(
        f"digits/{method}",
        "precision=32",
        "evaluation.views=[whole]",
        "evaluation.probes=[linear]",
        "evaluation.linear.epochs=1",
        "evaluation.references=False",
    )
    train, test = digits[0].subset(range(80)), digits[1].subset(range(60))
    model, (augmentation, *_) = fresh_method(cfg), augmentations(cfg)
    # an online classifier that knows something
    mean, std = augmentation.mean, augmentation.std
    features, targets = extract_features(encoder(model), train, mean=mean, std=std)
    sgd = 10, 0, 30, 0.03, 0, 10
    [(weight, bias)] = train_classifier(features["backbone"], targets, *sgd)
    model.classifier.load_state_dict({"weight": weight, "bias": bias})
    device, out = torch.device("cpu"), tmp_path / "evaluation.csv"
    rows = evaluate_run(cfg, cfg.evaluation, model, train, test, device, out)
    (row,) = [row for row in rows if row["probe"] == "online linear"]
    views = [BatchMultiPatch.from_augmentation(augmentation) for augmentation in augmentations(cfg)]
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    data = PretrainData(train, test, views, 16, 0, 0, stacked=False, on_device=True)
    (validated,) = trainer.validate(model, datamodule=data, verbose=False)
    about = [row[key] for key in ("model", "features", "view", "labels")]
    assert about == [method, "backbone", "whole", 1]
    assert 25 < row["top1"] < row["top5"]
    assert row["top1"] == pytest.approx(validated["val_acc1"], abs=0.006)
    assert row["top5"] == pytest.approx(validated["val_acc5"], abs=0.006)


def test_an_evaluation_cut_short_is_continued(config, digits, tmp_path, monkeypatch, capsys):
    cfg = config(
        "digits/emp",
        "precision=32",
        "method_kwargs.embedding_dim=16",
        "evaluation.views=[whole]",
        "evaluation.probes=[knn]",
    )
    data = digits[0].subset(range(40)), digits[1].subset(range(20))
    out = tmp_path / "evaluation.csv"
    model, extract, taken = fresh_method(cfg), protocol.extract_views, []

    def extract_until(end):
        def extract_or_stop(*arguments, description, **settings):
            if len(taken) == end:
                raise KeyboardInterrupt
            taken.append(description)
            return extract(*arguments, description=description, **settings)

        monkeypatch.setattr(protocol, "extract_views", extract_or_stop)
        taken.clear()
        return evaluate_run(cfg, cfg.evaluation, model, *data, torch.device("cpu"), out)

    whole = extract_until(None)
    assert taken == ["emp, train", "emp, test", "untrained, train", "untrained, test"]
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.csv"]
    out.unlink()
    with pytest.raises(KeyboardInterrupt):
        extract_until(3)  # within the untrained network
    assert not out.exists()
    continued = extract_until(None)  # with the last complete one, of which this is not sure
    assert taken == ["emp, train", "emp, test", "untrained, train", "untrained, test"]
    assert "continued after raw pixels" in capsys.readouterr().out
    for rows in (whole, continued):
        for row in rows:
            del row["seconds"]
    assert whole == continued

    def other_weights():
        torch.nn.init.zeros_(model.embedder[0].weight)

    def other_images():
        data[0].images.bitwise_not_()

    for change in (other_weights, other_images):
        with pytest.raises(KeyboardInterrupt):
            extract_until(3)
        change()
        extract_until(None)  # from the beginning, raw pixels too
        assert "continued" not in capsys.readouterr().out
        assert [path.name for path in tmp_path.iterdir()] == ["evaluation.csv"]


def test_schedule_reaches_zero_over_the_run_s_steps(finished):
    states = [state_of(finished / name) for name in ("epoch=1.ckpt", "last.ckpt")]
    assert [state["global_step"] for state in states] == [5, 10]
    middle, end = (state["optimizer_states"][0]["param_groups"][0]["lr"] for state in states)
    assert middle == pytest.approx(0.15, rel=1e-3)  # half of the cosine
    assert end == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_cut_short_in_an_epoch_ends_as_if_it_never_was(
    finished, tmp_path, monkeypatch, capsys, num_workers
):
    class Cut(Exception):
        pass

    def cut(trainer):
        raise Cut

    settings = ["max_epochs=2", "auto_resume.enabled=True", f"data.num_workers={num_workers}"]
    with monkeypatch.context() as patch:
        at_step(patch, 7, cut)  # last.ckpt is of step 6, the first of the second epoch
        with pytest.raises(Cut):
            pretrain(tmp_path, *settings)
    assert pretrain(tmp_path, *settings) == 0
    assert "continued from" in capsys.readouterr().out
    pair = the_run(tmp_path), finished
    ours, theirs = (state_of(run / "last.ckpt")["state_dict"] for run in pair)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    tables = [pd.read_csv(run / "metrics.csv").sort_values("step") for run in pair]
    left, right = (table[sorted(table)].reset_index(drop=True) for table in tables)
    pd.testing.assert_frame_equal(left, right)


@pytest.mark.parametrize(
    ("seconds", "steps"),
    [(0, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]), (29, [3, 5, 8, 10]), (1000, [5, 10])],
)
def test_checkpoints_within_an_epoch_are_not_closer_than_asked(
    tmp_path, monkeypatch, seconds, steps
):
    """Two epochs of five steps that take ten seconds each."""
    clock, written = SimpleNamespace(now=0.0), []
    monkeypatch.setattr(
        "emp_plugin.training.callbacks.time", SimpleNamespace(monotonic=lambda: clock.now)
    )
    end, save = Checkpoints.on_train_batch_end, Checkpoints.on_save_checkpoint

    def ten_seconds_later(self, *args):
        clock.now += 10
        end(self, *args)

    def note(self, trainer, *args):
        written.append(trainer.global_step)
        save(self, trainer, *args)

    monkeypatch.setattr(Checkpoints, "on_train_batch_end", ten_seconds_later)
    monkeypatch.setattr(Checkpoints, "on_save_checkpoint", note)
    spacing = ["checkpoint.every_n_steps=1", f"checkpoint.min_seconds={seconds}"]
    assert pretrain(tmp_path, "max_epochs=2", "evaluation.enabled=False", *spacing) == 0
    assert sorted(set(written)) == steps


def test_a_finished_run_is_not_continued(tmp_path):
    settings = ["max_epochs=1", "auto_resume.enabled=True", "evaluation.enabled=False"]
    for _ in range(2):
        assert pretrain(tmp_path, *settings) == 0
    assert len(list((tmp_path / "emp").glob("*/"))) == 2


def test_a_baseline_takes_the_same_road(tmp_path):
    dims = ("proj_hidden_dim", "proj_output_dim", "pred_hidden_dim")
    byol = [
        "method=byol",
        "data.num_patches=2",
        "~method_kwargs.preset",
        *(f"method_kwargs.{dim}=32" for dim in dims),
    ]
    assert pretrain(tmp_path, "max_epochs=1", method=byol) == 0
    run = the_run(tmp_path)
    assert run.parent.name == "byol"
    rows = pd.read_csv(run / "evaluation.csv")
    assert set(rows.model) == {"byol", "untrained", "raw pixels"}
    assert set(rows.features) == {"backbone", "pixels"}
    state = state_of(run / "last.ckpt")["state_dict"]
    online, momentum = (state[f"{name}.conv1.weight"] for name in ("backbone", "momentum_backbone"))
    assert not torch.equal(online, momentum)
    # four panels: its loss, under its own name, both gauges and the online accuracy
    with Image.open(run / "curves.png") as picture:
        assert picture.width > 4 * picture.height


def test_a_run_cut_short_in_its_evaluation_is_only_evaluated_again(
    finished, tmp_path, monkeypatch, capsys
):
    def cut(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("emp_plugin.training.run.evaluate_run", cut)
        assert pretrain(tmp_path, "max_epochs=2", "auto_resume.enabled=True") == 1
    assert capsys.readouterr().err == "error: interrupted\n"
    run = the_run(tmp_path)
    before = (run / "last.ckpt").read_bytes()
    assert not (run / "summary.json").exists()
    assert pretrain(tmp_path, "max_epochs=2", "auto_resume.enabled=True") == 0
    assert (run / "last.ckpt").read_bytes() == before
    ours, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (run, finished))
    for key in ("epochs", "steps", "images", "patches"):
        assert ours[key] == theirs[key]
    left, right = ([row["top1"] for row in summary["evaluation"]] for summary in (ours, theirs))
    assert left == right
    assert len(pd.read_csv(run / "metrics.csv")) == len(pd.read_csv(finished / "metrics.csv"))


@pytest.mark.parametrize(
    ("probe", "probes"),
    [([], "linear-knn-knn10"), (["evaluation.probes=[knn,knn10]"], "knn-knn10")],
)
def test_probing_a_checkpoint_gives_the_run_s_own_figures(finished, probe, probes):
    settings = [
        "evaluation.views=[bag]",
        "evaluation.bag_patches=2",
        "evaluation.linear.epochs=2",
        "accelerator=cpu",
        "data.fraction=0.06",
    ]
    assert cli.main(["probe", str(finished / "last.ckpt"), *probe, *settings]) == 0
    (path,) = finished.glob(f"{probes}-bag-2plain-*-digits-last.csv")
    rows = pd.read_csv(path)
    whole = pd.read_csv(finished / "evaluation.csv")
    whole = whole[whole.probe.isin(rows.probe.unique())].reset_index(drop=True)
    columns = ["model", "features", "view", "top1", "top5", "flops", "identity"]
    pd.testing.assert_frame_equal(rows[columns], whole[columns])
    assert rows.flops.notna().all()


def test_nan_loss_stops_with_advice(tmp_path, capsys):
    rates = ["optimizer.lr=1e30", "optimizer.kwargs.clip_lr=False", "optimizer.kwargs.eta=1e30"]
    assert pretrain(tmp_path, "evaluation.enabled=False", *rates) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: the loss is")
    assert "learning rate" in message
    assert "smaller optimizer.lr" in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.fraction=0.008"], "fewer than a batch: optimizer.batch_size=16"),
        pytest.param(
            ["accelerator=gpu"],
            "Trainer: ",
            marks=pytest.mark.skipif(
                torch.cuda.is_available(), reason="needs a machine without a GPU"
            ),
        ),
        (["resume_from_checkpoint=nowhere.ckpt"], "is not a file"),
        (["precision=bf16-true"], "precision must be"),
        (["max_steps=3"], "max_epochs"),
    ],
)
def test_mistakes_leave_nothing_behind(tmp_path, capsys, overrides, message):
    assert pretrain(tmp_path, *overrides) == 1
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_checkpoints_that_cannot_be_probed(finished, tmp_path, capsys):
    def probe(path):
        status = cli.main(["probe", str(path)])
        return status, capsys.readouterr().err

    assert probe(tmp_path) == (1, f"error: checkpoint {tmp_path} is not a file\n")
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes((finished / "last.ckpt").read_bytes()[:1000])
    assert probe(broken)[0] == 1
    torch.save({"state_dict": {}}, broken)
    assert "was not written by emp_plugin" in probe(broken)[1]
    state = state_of(finished / "last.ckpt")
    state[CONFIG_KEY]["method_kwargs"]["proj_output_dim"] = 17
    torch.save(state, broken)
    status, message = probe(broken)
    assert status == 1
    assert "do not fit" in message

"""t-SNE of checkpoints: which images, which features, and a picture that can be drawn again."""

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from emp_plugin import cli
from emp_plugin.errors import UserError
from emp_plugin.solo_learn import backbone_of
from emp_plugin.studies import tsne
from emp_plugin.training.probing import load_method
from support.runs import pretrain

SETTINGS = [
    "optimizer.batch_size=16",
    "limit_train_batches=1",
    "max_epochs=1",
    "limit_val_batches=0",
    "evaluation.enabled=False",
    "method_kwargs.proj_hidden_dim=16",
    "method_kwargs.proj_output_dim=8",
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Of EMP-SSL and of SimCLR."""
    folder = tmp_path_factory.mktemp("runs")
    recipes = {"emp": ["data.num_patches=2", "method_kwargs.embedding_dim=24"], "simclr": []}
    for method, settings in recipes.items():
        assert pretrain(folder, *SETTINGS, *settings, recipe=f"digits/{method}") == 0
    return [str(next(folder.glob(f"{method}/*/last.ckpt"))) for method in recipes]


def test_a_panel_for_each_checkpoint_of_the_same_images(checkpoints, digits, tmp_path, capsys):
    out = tmp_path / "new" / "it-0.5"
    arguments = ["--features", "projection", "--images", "40", "--classes", "4", "--out", str(out)]
    assert cli.main(["tsne", *checkpoints, checkpoints[0], *arguments]) == 0
    assert "it-0.5.png" in capsys.readouterr().out
    rows = pd.read_csv(tmp_path / "new" / "it-0.5.csv")
    emp, simclr, again = (rows[rows.panel == panel].reset_index() for panel in rows.panel.unique())
    assert emp.panel[0] == "EMP-SSL: emp-digits, epoch 1, step 1, seed 5"
    assert simclr.panel[0].startswith("SimCLR")
    assert emp.image.tolist() == simclr.image.tolist()
    assert emp["class"].tolist() == digits[1].targets[emp.image.tolist()].tolist()
    counts = emp["class"].value_counts().to_dict()
    assert counts == pytest.approx(dict.fromkeys(range(4), 10), abs=1)
    assert emp[["x", "y"]].equals(again[["x", "y"]])
    assert not emp[["x", "y"]].equals(simclr[["x", "y"]])
    drawn = Image.open(tmp_path / "new" / "it-0.5.png")
    tsne.draw_tsne(rows, "t-SNE of 40 test images of digits: projection", tmp_path / "again.png")
    assert Image.open(tmp_path / "again.png").tobytes() == drawn.tobytes()
    assert min(drawn.size) > 500


def test_features_are_those_of_the_method(checkpoints, digits):
    x = torch.randn(3, 3, 32, 32)
    emp, simclr = (load_method(path)[0].eval() for path in checkpoints)
    with torch.no_grad():
        out = tsne.WithProjection(emp)(x)
        torch.testing.assert_close(
            F.normalize(out["projection"], dim=1), emp.project(x[None])[1][0]
        )
        assert [out[name].shape[1] for name in tsne.FEATURES] == [512, 24, 8]
        out = tsne.WithProjection(simclr)(x)
        torch.testing.assert_close(out["projection"], simclr.projector(backbone_of(simclr)(x)))
    assert out["embedding"] is out["backbone"]
    del simclr.projector  # as DINO, which has a head
    assert set(tsne.WithProjection(simclr)(x)) == {"backbone", "embedding"}


def test_a_method_without_a_projector(checkpoints, tmp_path, capsys, monkeypatch):
    def load_method(path):
        method, *rest = original(path)
        del method.projector
        return method, *rest

    original = tsne.load_method
    monkeypatch.setattr(tsne, "load_method", load_method)
    arguments = [checkpoints[1], "--images", "20", "--classes", "2", "--out", str(tmp_path / "x")]
    assert cli.main(["tsne", *arguments, "--features", "projection"]) == 1
    assert "simclr has no projector; choose --features backbone" in capsys.readouterr().err
    assert cli.main(["tsne", *arguments]) == 0


def test_groups_stay_groups_and_the_same_twice():
    centres = torch.eye(3, 10).repeat_interleave(20, 0)
    features = centres + 0.05 * torch.randn(60, 10)
    flat = torch.from_numpy(tsne.embed(features))
    labels = centres.argmax(1)
    nearest = torch.cdist(flat, flat).fill_diagonal_(float("inf")).argmin(1)
    assert (labels[nearest] == labels).all()
    assert torch.equal(flat, torch.from_numpy(tsne.embed(features)))


def test_choice_of_images(digits):
    data, places = tsne.choose_images(digits[1], 100, 10)
    assert len(data) == 100
    assert places == sorted(places)
    assert torch.equal(data.images, digits[1].images[places])
    assert torch.bincount(data.targets).tolist() == pytest.approx([10] * 10, abs=1)
    assert tsne.choose_images(digits[1], 100, 10)[1] == places
    assert len(tsne.choose_images(digits[1], 10_000, 10)[0]) == len(digits[1])
    with pytest.raises(UserError, match="--images=3"):
        tsne.choose_images(digits[1], 3, 10)


def test_mistakes(checkpoints, tmp_path, capsys):
    assert cli.main(["tsne", checkpoints[0], "--classes", "11", "--out", str(tmp_path / "x")]) == 1
    assert cli.main(["tsne", str(tmp_path / "none.ckpt"), "--out", str(tmp_path / "x")]) == 1
    assert "2 to 10" in (errors := capsys.readouterr().err)
    assert "is not a file" in errors
    assert not list(tmp_path.iterdir())

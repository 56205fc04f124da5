"""Mistakes through the command line.

They end within seconds, with an exit status, one message and no traceback. Nothing is left behind.
"""

import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from emp_plugin import cli
from emp_plugin.config import Run, augmentations, read_config, trainer_arguments
from emp_plugin.data import load_dataset
from emp_plugin.errors import UserError
from emp_plugin.training.probing import fresh_method
from emp_plugin.training.run import build_trainer
from emp_plugin.transforms import BatchMultiPatch
from support import SCRIPTS

PRETRAIN = str(SCRIPTS / "pretrain")
SMALL = [  # a mistake that is let through ends soon
    "method_kwargs.embedding_dim=8",
    "method_kwargs.proj_hidden_dim=8",
    "method_kwargs.proj_output_dim=8",
    "accelerator=cpu",
    "precision=32",
    "enable_progress_bar=False",
    "max_epochs=1",
    "limit_train_batches=4",
    "limit_val_batches=1",
    "evaluation.enabled=False",
]

SETTINGS = [  # overrides of digits/emp, and what the message says
    ("max_epochs=0", "max_epochs must be at least 1"),
    ("max_epochs=-3", "max_epochs must be at least 1"),
    ("max_epochs=many", "max_epochs"),
    ("max_steps=10", "max_steps is not supported"),
    ("data.num_patches=0", "num_patches"),
    ("data.num_patches=-1", "num_patches"),
    ("data.num_patches=2.5", "data.num_patches"),
    ("data.patch_size=33", "larger than the images"),
    ("data.patch_size=0", "patch_size"),
    ("data.output_size=0", "crop_size|output_size"),
    ("data.output_size=-8", "crop_size|output_size"),
    ("optimizer.batch_size=1", "batch_size must be at least 2"),
    ("optimizer.batch_size=0", "batch_size must be at least 2"),
    ("optimizer.batch_size=5000", "1437 training images are fewer than"),
    ("optimizer.lr=0", "optimizer.lr must be positive"),
    ("optimizer.lr=nan", "optimizer.lr must be positive"),
    ("optimizer.lr=inf", "optimizer.lr must be positive and finite"),
    ("optimizer.weight_decay=-0.1", "weight_decay"),
    ("optimizer.name=lamb", "unknown optimizer.name 'lamb'"),
    ("optimizer.kwargs.momentum=0", "nesterov needs a momentum"),
    ("optimizer.kwargs.momentum=-0.5", "optimizer.kwargs.momentum must be in"),
    ("optimizer.kwargs.eta=-1", "optimizer.kwargs.eta must be positive"),
    ("scheduler.warmup_epochs=-1", "scheduler.warmup_epochs must be finite and not negative"),
    ("scheduler.min_lr=nan", "scheduler.min_lr must be finite and not negative"),
    ("momentum.base_tau=2", "momentum.base_tau must be in"),
    ("scheduler.name=linear", "unknown scheduler.name 'linear'"),
    ("method=emq", "unknown method 'emq'"),
    ("data.dataset=mnist", "unknown data.dataset 'mnist'"),
    ("backbone.name=resnet1800", "has no 'resnet1800'"),
    ("backbone.kwargs={depth: 3}", "depth"),
    ("precision=12", "precision must be one of"),
    ("optimzer.lr=1", "did you mean 'optimizer"),
    ("optimizer.learning_rate=1", "unknown setting 'optimizer.learning_rate'"),
    ("method_kwargs.tempreature=1", "tempreature"),
    ("method_kwargs.eps=0", "eps must be positive"),
    ("method_kwargs.eps=small", "eps has the wrong type"),
    ("method_kwargs.patch_chunk=0", "patch_chunk must be at least 1"),
    ("method_kwargs.preset=book", "preset must be one of"),
    ("data.holdout=1", "data.holdout must be between"),
    ("data.holdout=0.001", "data.holdout=0.001 cannot split"),
    ("data.fraction=0", "data.fraction must be"),
    ("data.fraction=0.001", "data.fraction=0.001 cannot split"),
    ("data.num_workers=-1", "num_workers must not be negative"),
    ("seed=-1", "seed must not be negative"),
    ("seed=1.5", "seed"),
    ("devices=0", "Trainer: "),
    ("devices=many", "devices"),
    ("strategy=telepathy", "Trainer: "),
    ("limit_train_batches=-1", "Trainer: "),
    ("performance.compile=True", "performance.compile must be one of off, default"),
    ("accumulate_grad_batches=0", "accumulate_grad_batches must be"),
    ("accumulate_grad_batches=some", "accumulate_grad_batches: "),
    ("evaluation.bag_patches=0", "bag_patches must be at least 1"),
    ("evaluation.probes=[forest]", "evaluation.probes"),
    ("checkpoint.every_n_steps=0", "every_n_steps must be at least 1"),
    ("checkpoint.min_seconds=-1", "min_seconds must not be negative"),
    ("knn_eval.k=0", "knn_eval.k must be at least 1"),
    ("resume_from_checkpoint=.", "is not a file"),
    ("resume_from_checkpoint=nowhere.ckpt", "is not a file"),
    ("augmentations=[]", "augmentations is empty"),
    ("max_epochs", "key=value"),
    ("a b c=1", "a b c|not"),
    ("data.fraction=[1", "[1|not"),
]


def check(status, capsys, message):
    text = capsys.readouterr().err
    errors = [line for line in text.splitlines() if "error: " in line]
    assert status != 0, text
    assert len(errors) == 1, text
    assert "Traceback" not in text, text
    assert any(part in text for part in message.split("|")), text


def pretrain(folder, *overrides, config="digits/emp"):
    return cli.main(["pretrain", config, *SMALL, f"checkpoint.dir={folder / 'runs'}", *overrides])


@pytest.mark.parametrize(("override", "message"), SETTINGS)
def test_settings(tmp_path, capsys, override, message):
    check(pretrain(tmp_path, override), capsys, message)
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there(tmp_path, capsys):
    check(pretrain(tmp_path, "accelerator=gpu"), capsys, "Trainer: ")
    assert not (tmp_path / "runs").exists()


def test_loss_that_is_not_finite(tmp_path, capsys):
    """The one that is found in training: what the run has left by then stays."""
    overrides = [
        "optimizer.lr=1e30",
        "optimizer.kwargs.clip_lr=False",
        "optimizer.kwargs.eta=1e30",
        "optimizer.batch_size=16",
        "data.num_patches=2",
    ]
    check(pretrain(tmp_path, *overrides), capsys, "the loss is")


# --- images


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Ten classes of 32x32 images, 3 for training and 1 for testing each."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in (("train", 3), ("test", 1)):
        for label in range(10):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def truncated_jpeg(root):
    png = root / "train" / "class0" / "0.png"
    jpeg = png.with_suffix(".jpg")
    Image.open(png).save(jpeg)
    png.unlink()
    jpeg.write_bytes(jpeg.read_bytes()[:400])


def one_class(root):
    for split in ("train", "test"):
        for label in range(1, 10):
            shutil.rmtree(root / split / f"class{label}")


DAMAGES = {  # what is done to the folder, and what the message says
    "no data": (shutil.rmtree, "download failed"),
    "no test set": (
        lambda root: shutil.rmtree(root / "test"),
        "is not a folder",
    ),
    "an empty class": (
        lambda root: [path.unlink() for path in (root / "train" / "class3").iterdir()],
        "class3",
    ),
    "a truncated JPEG": (truncated_jpeg, "0.jpg: not a readable image"),
    "text called .png": (
        lambda root: (root / "train" / "class1" / "0.png").write_text("hello"),
        "class1/0.png: not a readable image",
    ),
    "an empty file": (
        lambda root: (root / "train" / "class1" / "0.png").write_bytes(b""),
        "class1/0.png: not a readable image",
    ),
    "a 1x1 image": (
        lambda root: Image.new("RGB", (1, 1)).save(root / "train" / "class2" / "1.png"),
        "class2/1.png: 1x1 pixels, expected 32x32",
    ),
    "an image smaller than the patch": (
        lambda root: Image.new("RGB", (32, 12)).save(root / "test" / "class2" / "0.png"),
        "32x12 pixels",
    ),
    "floating-point pixels": (
        lambda root: Image.new("F", (32, 32)).save(root / "train" / "class2" / "9.tiff"),
        "set data.window=[low,high]",
    ),
    "one class": (one_class, "1 class folders, but cifar10 has 10"),
    "labels missing in the test set": (
        lambda root: shutil.rmtree(root / "test" / "class4"),
        "different class folders: class4",
    ),
    "fewer images than the batch": (lambda root: None, "30 training images are fewer than"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_images(tmp_path, capsys, monkeypatch, pictures, damage):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    shutil.copytree(pictures, root := tmp_path / "data")
    act, message = DAMAGES[damage]
    act(root)
    check(pretrain(tmp_path, f"data.train_path={root}", config="cifar/emp"), capsys, message)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1"])
def test_other_kinds_of_images_become_rgb(tmp_path, pictures, mode):
    shutil.copytree(pictures, root := tmp_path / "data")
    grey = np.arange(1024, dtype=np.uint16).reshape(32, 32) // 4
    image = Image.fromarray(grey.astype(np.uint8)).convert(mode)
    (root / "train" / "class0" / "0.png").unlink()
    image.save(root / "train" / "class0" / "0.tiff")
    read = load_dataset("cifar10", str(root))[0].images[0]
    values = np.asarray(image).astype(np.int64) * 255 if mode == "1" else grey.astype(np.int64)
    expected = torch.from_numpy(values)
    assert (read.long() - expected).abs().max() <= 1


# --- probes, and the options themselves


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.ckpt"], "is not a file"),
        ([str(SCRIPTS)], "is not a file"),
        ([str(SCRIPTS / "env.sh")], "is not a readable checkpoint"),
        ([], "pretrained_feature_extractor is not set"),
        (["epoch=1.ckpt", "max_epochs=3"], "unknown setting 'max_epochs'"),
    ],
)
def test_probes(capsys, arguments, message):
    check(cli.main(["probe", *arguments]), capsys, message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["pretrian"], "invalid choice: 'pretrian'"),
        (["pretrain"], "say which, as in `emp pretrain cifar/emp`"),
        (["pretrain", "cifar/emq"], "did you mean cifar/emp"),
        (["pretrain", "cifar10/emp"], "did you mean cifar/emp"),
        (["pretrain", "--config-path", PRETRAIN], "--config-path goes with --config-name"),
        (
            ["pretrain", "--config-path", "nowhere", "--config-name", "emp"],
            "nowhere is not a folder",
        ),
        (["pretrain", "--config-path", str(SCRIPTS), "--config-name", "nothing"], "nothing"),
        (["pretrain", "digits/emp", "--epochs", "3"], "unknown option --epochs"),
        (["compare", "cifar"], "there is no study 'cifar'"),
        (["ablate", "seeds=[1]"], "name a setting and its values"),
        (["ablate", "data.num_patches"], "an ablation needs both"),
        (["export"], "give a checkpoint"),
        (["tsne"], "name the checkpoints"),
        (["solo", "nowhere.py"], "nowhere.py is no program"),
    ],
)
def test_options(capsys, arguments, message):
    try:
        status = cli.main(arguments)
    except SystemExit as stop:
        status = stop.code
    check(status, capsys, message)


def test_a_yaml_file_with_a_syntax_error(tmp_path, capsys):
    (tmp_path / "x.yaml").write_text("a: [1\nb: }")
    status = cli.main(["pretrain", str(tmp_path / "x.yaml")])
    check(status, capsys, "x: ")


def test_debug_shows_where(tmp_path):
    with pytest.raises(UserError, match="max_epochs"):
        pretrain(tmp_path, "max_epochs=0", "--debug")


@pytest.mark.parametrize(
    ("script", "override", "message"),
    [
        ("pretrain/digits", "max_epochs=0", "max_epochs must be at least 1"),
        ("pretrain/cifar", "data.num_patches=-2", "num_patches"),
        ("linear/digits", "pretrained_feature_extractor=nowhere.ckpt", "is not a file"),
        (
            "knn/cifar",
            "pretrained_feature_extractor=x.ckpt evaluation.probes=[]",
            "probes must be of",
        ),
        ("pretrain/digits", "--nonsense", "unknown option --nonsense"),
    ],
)
def test_through_bash(tmp_path, script, override, message):
    before = set(SCRIPTS.rglob("*"))
    answer = subprocess.run(
        ["bash", str(SCRIPTS / script / "emp.sh"), *override.split()],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    said = answer.stderr
    assert answer.returncode != 0, said
    assert "Traceback" not in said, said
    assert said.count("error: ") == 1, said
    assert message in said, said
    assert not any(tmp_path.iterdir())
    assert before == set(SCRIPTS.rglob("*"))


# --- arbitrary values

KEYS = [
    "seed",
    "max_epochs",
    "method",
    "name",
    "precision",
    "devices",
    "data.dataset",
    "data.num_patches",
    "data.patch_size",
    "data.output_size",
    "data.scale",
    "data.holdout",
    "data.fraction",
    "data.num_workers",
    "performance.compile",
    "optimizer.name",
    "optimizer.lr",
    "optimizer.batch_size",
    "optimizer.kwargs.eta",
    "optimizer.kwargs",
    "scheduler.name",
    "scheduler.warmup_epochs",
    "method_kwargs.preset",
    "method_kwargs.eps",
    "method_kwargs.patch_chunk",
    "method_kwargs",
    "backbone.name",
    "backbone.stem_padding",
    "checkpoint.every_n_steps",
    "checkpoint.dir",
    "evaluation.views",
    "evaluation.linear.lr",
    "knn_eval.k",
    "augmentations",
    "limit_train_batches",
    "accumulate_grad_batches",
    "log_every_n_steps",
    "momentum.base_tau",
    "wandb.enabled",
    "auto_resume",
]
VALUES = st.one_of(
    st.integers(-3, 300).map(str),
    st.floats().map(str),
    st.booleans().map(str),
    st.text(max_size=8),
    st.sampled_from(
        [
            "null",
            "[]",
            "{}",
            "[1,2]",
            "{a: 1}",
            "[0.2,0.5]",
            "???",
            "${seed}",
            "${nothing}",
            "''",
            "auto",
            "emp",
            "digits",
            "resnet18",
        ]
    ),
)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(overrides=st.lists(st.tuples(st.sampled_from(KEYS), VALUES), min_size=1, max_size=2))
def test_arbitrary_settings_give_a_run_or_an_error(tmp_path, overrides):
    problem = None
    try:
        drawn = [f"{key}={value}" for key, value in overrides]
        cfg = read_config(PRETRAIN, "digits/emp", [*SMALL, *drawn])
        assert isinstance(cfg, Run)
        assert augmentations(cfg)
        assert "max_epochs" not in trainer_arguments(cfg)
        build_trainer(cfg, tmp_path)
        fresh_method(cfg)
    except UserError as error:
        problem = error
    assert problem is None or str(problem)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    patches=st.integers(-1, 5),
    size=st.one_of(st.none(), st.integers(-1, 40)),
    output=st.integers(-1, 40),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_arbitrary_patches_lie_in_the_image_or_are_an_error(
    patches, size, output, height, width, seed
):
    images = torch.full((2, 3, height, width), 255, dtype=torch.uint8)
    problem = None
    try:
        view = BatchMultiPatch(num_patches=patches, patch_size=size, output_size=output)
        made = view(images, torch.Generator().manual_seed(seed))
    except ValueError as error:
        problem = error
    if problem is None:
        assert made.shape == (patches, 2, 3, output, output)
        assert torch.isfinite(made).all()
    else:
        assert re.search("patch_size|output_size|num_patches|at least one pixel", str(problem))

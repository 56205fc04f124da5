import dataclasses
import inspect
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.utils import JobRuntime
from hydra.version import getbase

from emp_plugin.config import (
    TRAINER_KEYS,
    Probe,
    augmentations,
    from_dict,
    read_config,
    recipe_names,
    recipes_root,
    to_dict,
    trainer_arguments,
)
from emp_plugin.errors import UserError
from emp_plugin.solo_learn import pl
from emp_plugin.transforms import PatchAugmentation
from support import SCRIPTS


def test_the_shipped_recipe_is_the_paper_s(config):
    cfg = config("cifar/emp")
    assert cfg.method == "emp"
    assert cfg.method_kwargs["preset"] == "code"
    assert cfg.max_epochs == 1
    assert cfg.data.num_classes == 10
    assert cfg.optimizer.lr == 0.3
    assert cfg.optimizer.weight_decay == 1e-4
    assert cfg.optimizer.batch_size == 100
    assert cfg.optimizer.kwargs == {
        "momentum": 0.9,
        "nesterov": True,
        "eta": 0.005,
        "clip_lr": True,
        "exclude_bias_n_norm": True,
    }
    assert augmentations(cfg) == [
        PatchAugmentation(
            num_patches=20,
            patch_size=16,
            output_size=32,
            scale=(1.0, 1.0),  # without effect beside patch_size
            interpolation="bilinear",
            flip_prob=0.5,
            jitter_prob=0.8,
            jitter=(0.4, 0.4, 0.4, 0.2),
            grey_prob=0.2,
            blur_prob=0.1,
            blur_sigma=(0.1, 2.0),
            solarize_prob=0.1,
            mean=(0.5, 0.5, 0.5),
        )
    ]
    assert augmentations(config("cifar/emp_native"))[0].output_size == 16


def test_every_recipe_has_its_script_and_every_script_its_recipe():
    root = SCRIPTS / "pretrain"
    scripts = {
        path: path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.sh")
    }
    assert recipe_names(root) == sorted(scripts.values())
    for path, name in scripts.items():
        assert path.read_text().endswith(f'/../../bin/emp" pretrain {name} "$@"\n')


def test_overrides(config):
    cfg = config(
        "cifar/emp",
        "data.dataset=cifar100",
        "max_epochs=30",
        "data.num_patches=200",
        "optimizer.lr=0.1",
        "backbone.stem_padding=1",
        "limit_train_batches=5",
        "precision=16-mixed",
        "method_kwargs.preset=paper",
    )
    assert cfg.name == "emp-cifar100"
    assert cfg.data.num_classes == 100
    assert cfg.data.num_large_crops == 200
    assert augmentations(cfg)[0].num_patches == 200
    assert cfg.optimizer.lr == 0.1
    assert cfg.backbone.stem_padding == 1
    assert trainer_arguments(cfg)["limit_train_batches"] == 5
    assert cfg.method_kwargs["preset"] == "paper"


@pytest.mark.parametrize(
    ("gpu", "bf16", "cpu", "accelerator", "expected"),
    [
        (True, True, "AMD EPYC", "auto", ("bf16-mixed", "auto", [0])),
        (True, False, "AMD EPYC", "gpu", ("16-mixed", "gpu", [0])),
        (True, True, "AMD EPYC", "cpu", ("bf16-mixed", "cpu", 1)),
        (False, True, "AMD EPYC", "auto", ("bf16-mixed", "cpu", 1)),
        (False, False, "AMD EPYC", "auto", ("32", "cpu", 1)),  # and not Apple's GPU
        (False, True, "Intel Xeon", "auto", ("32", "cpu", 1)),
        (False, True, "Intel Xeon with AMX", "auto", ("bf16-mixed", "cpu", 1)),
    ],
)
def test_what_is_left_to_the_machine(config, monkeypatch, gpu, bf16, cpu, accelerator, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: bf16 or including_emulation
    )
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16, raising=False)
    monkeypatch.setattr(
        torch.cpu,
        "get_capabilities",
        lambda: {"cpu_name": cpu, "amx_tile": "AMX" in cpu},
        raising=False,
    )
    cfg = config("cifar/emp", f"accelerator={accelerator}")
    arguments = trainer_arguments(cfg)
    assert (
        cfg.precision,
        arguments["accelerator"],
        arguments["devices"],
    ) == expected
    assert config("cifar/emp", "precision=16-mixed").precision == "16-mixed"


def test_patches_by_share_of_the_image(config):
    (by_share,) = augmentations(config("cifar/emp", "data.patch_size=null", "data.scale=[0.2,0.5]"))
    assert by_share.patch_size is None
    assert by_share.scale == (0.2, 0.5)
    assert by_share.ratio == (1.0, 1.0)
    assert by_share.num_patches == 20
    entry = "{crop_size: 24, num_crops: 3, patch_size: 8}"
    (by_size,) = augmentations(config("cifar/emp", f"augmentations=[{entry}]"))
    assert (by_size.patch_size, by_size.output_size, by_size.num_patches) == (8, 24, 3)


def one_by_one(made):
    for augmentation in made:
        yield from [augmentation.with_patches(1)] * augmentation.num_patches


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("cifar/emp", "emp_crop_grey"),
        ("tiny-imagenet/emp", "emp_crop_grey"),
        ("cifar/simclr", "crop_grey"),
        ("cifar/byol", "crop_grey"),
        ("cifar/swav", "crop_grey"),
        ("imagenet100/simclr", "crop_grey"),
    ],
)
def test_crop_and_grey_presets_switch_all_else_off_and_change_nothing_more(config, name, preset):
    usual, few = config(name), config(name, f"augmentations={preset}")
    off = {
        "flip_prob": 0.0,
        "jitter_prob": 0.0,
        "jitter": (0.0,) * 4,
        "blur_prob": 0.0,
        "solarize_prob": 0.0,
    }
    usual_views, few_views = ([*one_by_one(augmentations(cfg))] for cfg in (usual, few))
    assert [dataclasses.replace(view, **off) for view in usual_views] == few_views
    assert usual_views[0].grey_prob == 0.2
    assert usual != few
    assert dataclasses.replace(usual, augmentations=few.augmentations) == few


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimzer.lr=1", "unknown setting 'optimzer.*did you mean 'optimizer"),
        ("optimizer.learning_rate=1", "unknown setting 'optimizer.learning_rate'"),
        ("optimizer.lr=fast", "optimizer.lr.*'fast'"),
        ("max_epochs=0", "max_epochs must be at least 1"),
        ("max_epochs=1.5", "max_epochs"),
        ("data.dataset=mnist", "unknown data.dataset 'mnist'.*digits"),
        ("optimizer.batch_size=1", "batch_size must be at least 2"),
        ("data.patch_size=33", "larger than the images"),
        ("data.image_size=16", "for digits, imagenet100, custom; images of cifar10 have 32"),
        ("data.num_patches=0", "augmentations: num_patches"),
        ("augmentations=[{colour_jitter: {prob: 1}}]", "unknown augmentation keys: colour_jitter"),
        ("augmentations=unheard_of", "unheard_of"),
        ("scheduler.interval=epoch", "scheduler.interval"),
        ("evaluation.views=[top]", "evaluation.views"),
        ("data.holdout=1.5", "data.holdout"),
        ("data.fraction=2", "data.fraction"),
        ("data.scale=[0.2,0.3]", "set patch_size to null"),
        ("seed=-1", "seed must not be negative"),
        ("optimizer.kwargs.eta=fast", "optimizer.kwargs.eta must be a number"),
        ("optimizer.weight_decay=-1", "weight_decay"),
        ("evaluation.probes=[]", "evaluation.probes must be of"),
        ("evaluation.probes=[svm]", "must be of linear, mlp, published, knn, knn10, got"),
        ("evaluation.bag_patches=4", "bag_patches would do nothing"),
        ("evaluation.label_fractions=[0.1,10]", "label_fractions must be in"),
        ("evaluation.mlp.hidden=0", "evaluation.mlp.hidden"),
        ("evaluation.mlp.lr=0", "evaluation.mlp.lr must be positive"),
        ("optimizer.lr", "key=value"),
        ("limit_trian_batches=3", "did you mean 'limit_train_batches'"),
        ("name=???", "name is not set"),
        ("data.num_classes=3", "unknown setting 'data.num_classes'"),
        ("trainer.max_epochs=3", "unknown setting 'trainer'"),
    ],
)
def test_mistakes_are_named(config, override, message):
    with pytest.raises(UserError, match=message):
        config("cifar/emp", override)


@pytest.mark.parametrize(
    "setting",
    ["num_patches=4", "patch_size=8", "scale=[0.2,0.5]", "ratio=[1,2]", "interpolation=bicubic"],
)
def test_a_setting_of_patches_is_nothing_to_a_method_without(config, setting):
    name = setting.partition("=")[0]
    message = f"data.{name} would do nothing: the augmentations of cifar/simclr"
    with pytest.raises(UserError, match=message):
        config("cifar/simclr", f"data.{setting}")
    crops = f"augmentations=[{{crop_size: 32, {name}: '${{data.{name}}}'}}]"
    if name in ("patch_size", "interpolation"):
        config("cifar/simclr", f"data.{setting}", crops)


def test_another_optimizer_takes_none_of_the_recipe_s_kwargs(config):
    usual = config("cifar/emp").optimizer.kwargs
    kwargs = [
        config("cifar/emp", *items).optimizer.kwargs
        for items in (
            ["optimizer.name=adamw"],
            ["optimizer.kwargs.betas=[0.8,0.9]", "optimizer.name=adamw"],
            ["optimizer.name=sgd", "optimizer.kwargs.momentum=0.5"],
            ["optimizer.name=lars", "optimizer.kwargs.eta=0.01"],
        )
    ]
    assert kwargs == [{}, {"betas": [0.8, 0.9]}, {"momentum": 0.5}, {**usual, "eta": 0.01}]


def test_a_caller_s_hydra_and_random_numbers_are_left_alone(config, tmp_path):
    (tmp_path / "own.yaml").write_text("a: 1")

    def numbers():
        return random.random(), np.random.random(), torch.rand(())

    def seed():
        random.seed(0), np.random.seed(0), torch.manual_seed(0)

    seed()
    expected = numbers()
    seed()
    with initialize_config_dir(config_dir=str(tmp_path), job_name="own", version_base="1.3"):
        config("cifar/emp")
        with pytest.raises(UserError):
            config("cifar/emp", "optimzer.lr=1")
        assert compose("own").a == 1
        assert JobRuntime().get("name") == "own"
        assert str(getbase()) == "1.3"
    assert numbers() == expected


def test_a_caller_s_figures_are_left_alone():
    code = (
        "import matplotlib; matplotlib.use('svg');"
        "import emp_plugin.studies.run, emp_plugin.studies.tsne;"
        "assert matplotlib.get_backend() == 'svg', matplotlib.get_backend()"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.mark.parametrize("name", ["cifar/emp", "imagenet100/swav", "digits/ressl"])
def test_what_is_saved_is_read_again(config, name):
    cfg = config(name, "limit_train_batches=3", "performance.compile=off", "precision=32")
    saved = yaml.safe_load(yaml.safe_dump(to_dict(cfg)))
    assert (saved["limit_train_batches"], saved["devices"], saved["precision"]) == (3, [0], "32")
    assert saved["strategy"] == "auto"  # beside the others, as in a recipe
    assert not {"trainer", "num_nodes", "limit_val_batches"} & set(saved)  # not given
    assert from_dict(saved) == cfg
    # of another version: a setting that is none any more, and one that was none yet
    del saved["data"]["interpolation"]
    saved["data"]["colour"] = saved["patches"] = 1
    assert from_dict(saved) == cfg


def test_missing_files_are_named():
    with pytest.raises(UserError, match="not a folder"):
        read_config(str(SCRIPTS / "nowhere"), "emp", [])
    with pytest.raises(UserError, match="no recipe cifar/emq .* did you mean cifar/emp or"):
        read_config(str(SCRIPTS / "pretrain"), "cifar/emq", [])


def test_probe_configuration():
    with pytest.raises(UserError, match="pretrained_feature_extractor is not set"):
        read_config(recipes_root(), None, [], Probe)

    def read(*overrides):
        return read_config(recipes_root(), None, list(overrides), Probe)

    bag = ["evaluation.views=[whole,bag]", "evaluation.bag_patches=4"]
    probe = read("pretrained_feature_extractor=x.ckpt", *bag)
    assert (probe.evaluation.views, probe.evaluation.bag_patches) == (["whole", "bag"], 4)
    assert probe.evaluation.protocol == "custom"
    path = "a run/epoch=1.ckpt"
    probe = read(f"pretrained_feature_extractor={path}")
    assert probe.pretrained_feature_extractor == path
    with pytest.raises(UserError, match="unknown setting 'max_epochs'"):
        read("pretrained_feature_extractor=x.ckpt", "max_epochs=4")


@pytest.mark.parametrize(
    "path",
    ["Fotos München", "照片", "photos (1)", "cats,dogs", "a#1", "100%", "it's", "~/x"]
    + ["[a]", "{a}", "true", "1.0", "a=b", 'say "a"', "a:b", "$HOME"],
)
def test_paths_are_taken_as_they_are(path):
    """Hydra's grammar has a meaning of its own for some."""
    overrides = [f"data.train_path={path}", f"checkpoint.dir={path}"]
    cfg = read_config(str(SCRIPTS / "pretrain"), "digits/emp", overrides)
    assert cfg.data.train_path == cfg.checkpoint.dir == path


def test_the_arguments_of_lightning_s_trainer_are_settings():
    set_by_the_run = {
        "max_epochs",  # of the schema itself
        "callbacks",
        "plugins",
        "logger",
        "default_root_dir",
        "enable_checkpointing",
        "use_distributed_sampler",
    }
    of_lightning = set(inspect.signature(pl.Trainer).parameters)
    assert set_by_the_run <= of_lightning
    assert of_lightning - set_by_the_run == TRAINER_KEYS

"""The command ``emp``: its help, its recipes in a clone and in a wheel, and what config prints."""

import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import yaml
from PIL import Image

from emp_plugin import cli
from emp_plugin.config import read_config, recipe_names, recipes_root, to_dict
from support import ROOT, SCRIPTS


def said(capsys, *arguments):
    assert cli.main([*arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", [[], *([name] for name in cli.COMMANDS)])
def test_help_says_what_and_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: emp {' '.join(command)}".rstrip())
    assert f"  emp {' '.join(command)}".rstrip() in text or command == ["list"]


def test_help_imports_nothing_but_the_package():
    code = """if True:
        import sys
        import emp_plugin
        before = set(sys.modules)
        from emp_plugin import cli
        try:
            cli.main(["pretrain", "--help"])
        finally:
            added = {name.partition(".")[0] for name in set(sys.modules) - before}
            print(added - sys.stdlib_module_names)
    """
    asked = [sys.executable, "-c", code]
    answer = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.endswith("\n{'emp_plugin'}\n")


def test_every_script_says_a_command_that_there_is():
    """In at most four lines; they are names for commands, and nothing more."""
    scripts = set(SCRIPTS.rglob("*.sh")) - {SCRIPTS / "env.sh", SCRIPTS / "test.sh"}
    assert len(scripts) > 40
    for path in scripts:
        lines = path.read_text().splitlines()
        assert len(lines) <= 4
        start, _, rest = lines[-1].partition('bin/emp" ')
        to_scripts = "../" * len(path.relative_to(SCRIPTS).parents[1:])
        assert start == f'exec bash "$(dirname "$0")/{to_scripts}'
        assert rest.split()[0] in cli.COMMANDS
        assert rest.endswith('"$@"')


def test_list_names_what_there_is(capsys):
    text = said(capsys, "list")
    words = set(text.split())
    assert words >= set(recipe_names(recipes_root()))
    assert words >= {"tiny-imagenet/byol", "custom/emp", "cifar100", "ablation", "barlow_twins"}


# --- the settings of a recipe


def settings(name, *overrides):
    """Of a shipped recipe, without what is counted of the data."""
    made = to_dict(read_config(recipes_root(), name, [*overrides]))
    data = made["data"].items()
    made["data"] = {key: value for key, value in data if not key.startswith("num_c")}
    del made["data"]["num_large_crops"], made["data"]["num_small_crops"]
    return made


def test_config_prints_every_setting_with_its_origin(capsys):
    text = said(capsys, "config", "digits/byol", "optimizer.lr=0.5", "augmentations=digits")
    for line in (
        "name: byol-digits  # cifar/byol",
        "  lr: 0.5  # command line",
        "  batch_size: 64  # shared/baselines_digits",
        "  dataset: digits  # datasets/digits",
        "  pred_hidden_dim: 4096  # cifar/byol",
        "  base_tau: 0.9  # digits/byol",
        "augmentations:  # augmentations/digits",
        "seed: 5  # default",
        "max_epochs: 3  # shared/baselines_digits",
    ):
        assert f"{line}\n" in text
    shipped = settings("digits/byol", "optimizer.lr=0.5", "augmentations=digits")
    assert yaml.safe_load(text) == shipped


def test_what_config_prints_is_a_recipe(capsys, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(said(capsys, "config", "imagenet100/swav", "max_epochs=40"))
    again = yaml.safe_load(said(capsys, "config", str(path)))
    assert again == yaml.safe_load(path.read_text())
    assert again["method_kwargs"]["epoch_queue_starts"] == 5


def test_a_recipe_of_ones_own_builds_on_those_shipped(capsys, tmp_path):
    path = tmp_path / "a folder" / "mine.yaml"
    path.parent.mkdir()
    path.write_text(
        "# @package _global_\ndefaults: [/cifar/simclr, _self_]\noptimizer: {lr: 0.125}\n"
    )
    shipped = settings("cifar/simclr", "optimizer.lr=0.125")
    own = ["--config-path", str(path.parent), "--config-name", "mine"]
    for recipe in ([str(path)], own):
        text = said(capsys, "config", *recipe)
        assert "  lr: 0.125  # mine\n" in text
        assert "  name: lars  # shared/baselines_lars\n" in text
        assert yaml.safe_load(text) == shipped
    text = said(capsys, "config", str(path), "augmentations=crop_grey")
    assert "augmentations:  # augmentations/crop_grey\n" in text


def test_a_dataset_without_a_recipe_has_that_of_large_images():
    own = settings("tiny-imagenet/byol")
    there = settings("imagenet100/byol", "data.dataset=tiny-imagenet", "data.output_size=64")
    assert own["name"] == "byol-tiny-imagenet"
    assert {key for key in own if own[key] != there[key]} == {"data"}
    differing = {key for key in own["data"] if own["data"][key] != there["data"][key]}
    assert differing == {"train_path", "num_workers"}


def test_check_data_names_what_cannot_be_used(capsys, tmp_path):
    ramp = np.linspace(0, 4095, 64).reshape(8, 8)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "deep.png")
    folder = str(tmp_path)
    assert cli.main(["check-data", folder]) == 1
    assert "deep.png: its grey values, 0 to 4095" in capsys.readouterr().out
    assert cli.main(["check-data", folder, "data.window=[0,4095]"]) == 0
    assert "1 images, all readable" in capsys.readouterr().out
    assert cli.main(["check-data", folder, "data.window=4095"]) == 1
    assert "two numbers" in capsys.readouterr().err
    assert cli.main(["check-data", f"{folder}/none"]) == 1
    assert "is not a folder" in capsys.readouterr().err


def test_a_study_is_what_its_folder_says(monkeypatch, tmp_path, capsys):
    made = []
    monkeypatch.setattr("emp_plugin.studies.run.compare", lambda *given: made.append(given))
    study = tmp_path / "question"
    assert cli.main(["study", str(study)]) == 1
    assert "study.yaml is not a file" in capsys.readouterr().err
    study.mkdir()
    (study / "study.yaml").write_text("recipes: digits\nmethods: [emp, byol]\nepochs: [2]\n")
    assert cli.main(["study", str(study), "seeds=[3]", "byol.optimizer.lr=0.1"]) == 0
    [(settings, recipes, overrides)] = made
    assert (settings.results_dir, settings.methods) == (str(study), ["emp", "byol"])
    assert (settings.epochs, settings.seeds, recipes) == ([2.0], [3], recipes_root())
    assert overrides == ["byol.optimizer.lr=0.1"]


# --- a wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the wheel of this tree in it, and nothing of the tree."""
    pytest.importorskip("setuptools", reason="builds a wheel without an index")
    folder = tmp_path_factory.mktemp("wheel")
    copy = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"]
    names = subprocess.run(copy, capture_output=True, text=True, check=True).stdout.splitlines()
    ours = ("emp_plugin/", "scripts/", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
    for name in names:
        if name.startswith(ours) and (ROOT / name).is_file():
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "tree" / name).write_bytes((ROOT / name).read_bytes())
    build = "from setuptools.build_meta import build_wheel; build_wheel('..')"
    subprocess.run([sys.executable, "-c", build], cwd=folder / "tree", check=True)
    (wheel,) = folder.glob("*.whl")
    with ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_a_wheel_has_all_modules_and_recipes_and_the_command(installed):
    def names(root, pattern):
        return {path.relative_to(root).as_posix() for path in root.rglob(pattern)}

    package = installed / "emp_plugin"
    assert names(package, "*.py") == names(ROOT / "emp_plugin", "*.py")
    assert names(package / "recipes", "*.yaml") == names(SCRIPTS / "pretrain", "*.yaml")
    assert names(package / "studies", "*.[cy]*") >= {"paper.csv", "shipped.yaml"}
    assert not names(installed, "*.sh")
    (points,) = installed.glob("*.dist-info/entry_points.txt")
    assert "emp = emp_plugin.cli:main" in points.read_text()


def test_the_recipes_of_a_wheel_are_read_anywhere(installed, tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(installed)!r})
from emp_plugin import cli
sys.exit(cli.main(["list"]) or cli.main(["config", "tiny-imagenet/swav"]))
"""
    asked = [sys.executable, "-c", code]
    answer = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"recipes, in {Path(installed, 'emp_plugin', 'recipes')}:" in answer.stdout
    assert "  dataset: tiny-imagenet  # datasets/tiny-imagenet\n" in answer.stdout

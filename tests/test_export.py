import json
import subprocess

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file

import emp_plugin
from emp_plugin import cli
from emp_plugin.data import load_dataset, normalise
from emp_plugin.export import Backbone, export_backbone
from emp_plugin.solo_learn import METHODS, backbone_of
from emp_plugin.training.probing import load_method
from support import SCRIPTS
from support.runs import TINY_EMP, pretrain, the_run

SETTINGS = [*TINY_EMP, "limit_val_batches=0", "evaluation.enabled=False"]
MEAN, STD = (0.2, 0.5, 0.6), (0.3, 0.25, 0.4)  # they differ, so that a swap shows


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    length = ["optimizer.batch_size=16", "data.fraction=0.03", "max_epochs=2"]
    normalisation = [f"augmentations.0.mean={[*MEAN]}", f"augmentations.0.std={[*STD]}"]
    assert pretrain(folder, *SETTINGS, *length, *normalisation) == 0
    return the_run(folder) / "last.ckpt"


def test_the_rebuilt_backbone_gives_the_same_features(checkpoint, capsys):
    assert cli.main(["export", str(checkpoint)]) == 0
    out = checkpoint.with_name("backbone.safetensors")
    assert str(out) in capsys.readouterr().out
    backbone = emp_plugin.load_backbone(out)
    images = load_dataset("digits", None)[1].images[:20]
    method = load_method(checkpoint)[0].eval()
    with torch.no_grad():
        expected = backbone_of(method)(normalise(images, MEAN, STD))
        torch.testing.assert_close(backbone(images), expected, atol=1e-6, rtol=1e-5)
    assert not backbone.training
    settings = backbone.settings
    assert settings["architecture"] == "resnet18"
    assert settings["stem_padding"] == 1
    assert (settings["epochs"], settings["method"], settings["dataset"]) == (2, "emp", "digits")
    assert settings["augmentation"]["patch_size"] == 8
    assert json.dumps(settings["versions"])
    with pytest.raises(ValueError, match="uint8"):
        backbone(images.float())
    assert "layer4.1.bn2.running_var" in load_file(out)  # torchvision's names


def test_a_rebuilt_backbone_normalises_as_in_training():
    images = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    backbone = Backbone(torch.nn.Identity(), {"mean": MEAN, "std": STD})
    by_hand = (images[1, 2] / 255 - 0.6) / 0.4
    torch.testing.assert_close(backbone(images)[1, 2], by_hand)


def test_a_checkpoint_between_two_epochs_has_the_one_behind_it(checkpoint, tmp_path):
    """``epoch=1.ckpt`` is written when the second epoch's first batch is about to be trained on."""
    contents = torch.load(checkpoint, weights_only=True)
    contents["epoch"] = 1
    contents["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["processed"] = 0
    torch.save(contents, tmp_path / "epoch=1.ckpt")
    file = export_backbone(tmp_path / "epoch=1.ckpt", tmp_path / "out.safetensors")
    assert emp_plugin.load_backbone(file).settings["epochs"] == 1


def test_loading_leaves_the_random_numbers_alone(checkpoint, tmp_path):
    file = export_backbone(checkpoint, tmp_path / "out.safetensors")
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    emp_plugin.load_backbone(file)
    assert torch.equal(torch.rand(3), expected)


def test_with_the_imagenet_stem_the_file_is_torchvision_s(tmp_path):
    """The lines of docs/python.md, on an EMP run over a folder of images."""
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    images = [
        f"data.train_path={tmp_path}",
        "data.image_size=48",
        "data.output_size=32",
        "data.num_workers=0",
        "optimizer.batch_size=8",
    ]
    assert pretrain(tmp_path / "runs", *SETTINGS, *images, recipe="custom/emp") == 0
    checkpoint = the_run(tmp_path / "runs") / "last.ckpt"
    file = export_backbone(checkpoint, tmp_path / "backbone.safetensors")

    # what is made public has no paths of the machine
    assert str(tmp_path) not in file.read_bytes()[:20000].decode(errors="replace")
    network = torchvision.models.resnet18()
    network.fc = torch.nn.Identity()
    network.load_state_dict(load_file(file))

    images = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8)
    backbone = emp_plugin.load_backbone(file).double()
    with torch.no_grad():
        # in float32 sums in another order differ by 3e-4 here: features of one step are large
        theirs = network.double().eval()((images.double() / 255 - 0.5) / 0.5)
        ours = backbone.network(normalise(images, (0.5,) * 3, (0.5,) * 3).double())
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    assert ours.std(0).mean() > 0.01  # images differ


def by_lightning(path):
    """As other people's programs call it."""
    return METHODS["emp"].load_from_checkpoint(path, "cpu", strict=True)


@pytest.mark.parametrize(
    "load", [emp_plugin.load_method, METHODS["emp"].load_from_checkpoint, by_lightning]
)
def test_a_method_is_rebuilt_from_its_checkpoint_alone(checkpoint, load):
    torch.manual_seed(123)
    np.random.seed(123)
    expected = torch.rand(3), np.random.rand()
    torch.manual_seed(123)
    np.random.seed(123)
    method = load(checkpoint)
    assert torch.equal(torch.rand(3), expected[0])
    assert np.random.rand() == expected[1]
    assert type(method) is METHODS["emp"]
    assert not method.training
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    # a checkpoint has the names of 1.0.6
    made = {name.replace("encoder.", "backbone."): x for name, x in method.state_dict().items()}
    assert saved.keys() == made.keys()
    assert all(torch.equal(saved[name], made[name]) for name in saved)
    assert backbone_of(method).conv1.padding == (1, 1)  # of the recipe, not solo-learn's


def test_what_cannot_be_exported_or_loaded_is_named(checkpoint, tmp_path, capsys):
    assert cli.main(["export", str(checkpoint), str(tmp_path / "missing" / "out.safetensors")]) == 1
    assert cli.main(["export", str(tmp_path / "none.ckpt")]) == 1
    assert "cannot write" in (errors := capsys.readouterr().err)
    assert "is not a file" in errors
    assert not list(tmp_path.iterdir())
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    (tmp_path / "broken.safetensors").write_text("no")
    for name in ("foreign", "broken", "none"):
        with pytest.raises(emp_plugin.errors.UserError, match=name):
            emp_plugin.load_backbone(tmp_path / f"{name}.safetensors")
        with pytest.raises(emp_plugin.errors.UserError, match=name):
            emp_plugin.load_method(tmp_path / f"{name}.safetensors")


def test_the_script(checkpoint, tmp_path):
    out = tmp_path / "out.safetensors"
    command = ["bash", SCRIPTS / "export.sh", checkpoint, out]
    subprocess.run(command, check=True, capture_output=True)
    assert emp_plugin.load_backbone(out).settings["steps"] > 0

import os
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from emp_plugin.data.datasets import count_classes
from emp_plugin.data.files import (
    ImageFiles,
    image_paths,
    list_flat,
    list_folder,
    list_tiny_imagenet,
    make_output_folder,
    open_image,
    read_image,
)
from emp_plugin.errors import UserError


def picture(path, size=(12, 8), mode="RGB", seed=0):
    """An image file of random pixels; its pixels as RGB."""
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}[mode]
    shape = (size[1], size[0], *channels)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels, mode).save(path)
    return pixels


def test_the_middle_square_of_an_image(tmp_path):
    pixels = picture(tmp_path / "a.png", (12, 8))
    middle = torch.from_numpy(pixels[:, 2:10]).permute(2, 0, 1)
    assert torch.equal(read_image(tmp_path / "a.png", 8), middle)
    assert read_image(tmp_path / "a.png", 20).shape == (3, 20, 20)
    large = torch.from_numpy(picture(tmp_path / "b.png", (64, 96))).permute(2, 0, 1)
    mean = large[:, 16:80].double().view(3, 8, 8, 8, 8).mean((2, 4))
    difference = (read_image(tmp_path / "b.png", 8).double() - mean).abs().mean()
    assert difference < 20  # smoothed, where skipping pixels would leave noise (60)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK"])
def test_other_modes_become_rgb(tmp_path, mode):
    picture(tmp_path / "a.tiff", (8, 8), mode)
    with Image.open(tmp_path / "a.tiff") as file:
        expected = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(read_image(tmp_path / "a.tiff", 8), expected)


RAMP = np.arange(64).reshape(8, 8) / 63  # black to white
DEEP = {  # file: grey values that 8 bits do not hold, and the window that makes them the ramp
    "12 bits in 16.png": ((RAMP * 4095).astype(np.uint16), (0, 4095)),
    "all 16 bits.png": ((RAMP * 65535).astype(np.uint16), (0, 65535)),
    "16 bits, big endian.tif": ((RAMP * 65535).astype(">u2"), (0, 65535)),
    "8 bits in 32.tif": ((RAMP * 255).astype(np.int32), (0, 255)),
    "Hounsfield units.tif": ((RAMP * 4095 - 1024).astype(np.int32), (-1024, 3071)),
    "unit interval.tif": (RAMP.astype(np.float32), (0, 1)),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_grey_needs_a_window_and_keeps_its_contrast(tmp_path, name):
    values, window = DEEP[name]
    path = tmp_path / name
    Image.fromarray(values).save(path)
    with pytest.raises(UserError, match=rf"{name}.*set data.window=\[low,high\]") as caught:
        read_image(path, 8)
    assert f"{values.min():g} to {values.max():g}" in str(caught.value)
    read = read_image(path, 8, window)
    assert abs(read[0].numpy() - 255 * RAMP).max() <= 1
    half = read_image(path, 8, (window[0], (window[0] + window[1]) / 2))
    assert abs(half[0].numpy() - (510 * RAMP).clip(0, 255)).max() <= 2


def test_what_is_no_number_is_black(tmp_path):
    values = RAMP.astype(np.float32)
    values[3, 3] = np.nan
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert read_image(tmp_path / "a.tif", 8, (0, 1))[0, 3, 3] == 0


def test_deep_colours_keep_their_upper_bits_or_are_refused(tmp_path):
    for name, high in (("whole.png", 65535), ("12 bits.png", 4095)):
        values = (RAMP[..., None].repeat(3, 2) * high).astype(">u2")
        rows = b"".join(b"\0" + row.tobytes() for row in values)
        header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
        chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
        content = b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    assert abs(read_image(tmp_path / "whole.png", 8)[1].numpy() - 255 * RAMP).max() <= 1
    with pytest.raises(UserError, match=r"12 bits.png.*convert it to 8 bits"):
        read_image(tmp_path / "12 bits.png", 8)


def test_pages_are_refused(tmp_path):
    pages = [Image.new("L", (8, 8), value) for value in (0, 128, 255)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(UserError, match=r"a.tif.*3 pages"):
        read_image(tmp_path / "a.tif", 8)


def test_images_are_upright(tmp_path):
    lying = Image.new("RGB", (64, 32), "red")
    lying.paste("blue", (32, 0, 64, 32))
    exif = Image.Exif()
    exif[0x112] = 6  # a camera held upright: red is above
    lying.save(tmp_path / "a.jpg", exif=exif, quality=95)
    image = open_image(tmp_path / "a.jpg")
    assert image.size == (32, 64)
    assert image.getpixel((16, 8))[0] > 200 > 50 > image.getpixel((16, 56))[0]


def test_images_without_contrast_are_named(tmp_path):
    Image.new("L", (8, 8), 3).save(tmp_path / "dark.png")
    picture(tmp_path / "good.png", (8, 8))
    (tmp_path / "cut.png").write_bytes(b"")
    files = list_flat(tmp_path, 8)
    faults = list(files.faults())
    assert len(faults) == 2
    assert "cut.png: not a readable image" in faults[0]
    assert "dark.png: nearly without contrast" in faults[1]
    with pytest.warns(UserWarning, match="dark.png: its values are 3 to 3 of 255"):
        files.fetch(torch.tensor([1]))


def test_outputs_are_no_data(tmp_path):
    """Runs started among the images leave folders and pictures there."""
    for name in ("ant", "bee"):
        picture(tmp_path / name / "1.png")
    before = list_folder(tmp_path, 8)
    make_output_folder(tmp_path / "trained_models" / "emp")
    picture(tmp_path / "trained_models" / "emp" / "run" / "patches.png")
    (tmp_path / "mine").mkdir()  # made by hand, and given as checkpoint.dir
    make_output_folder(tmp_path / "mine" / "emp")
    picture(tmp_path / "mine" / "emp" / "run" / "patches.png")
    make_output_folder(tmp_path / "emp")  # checkpoint.dir=.
    picture(tmp_path / "emp" / "run" / "patches.png")
    for old in ("older/emp/run/config.yaml", "older/emp/run/versions.json"):  # without a mark
        (tmp_path / old).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / old).write_text("")
    picture(tmp_path / "older" / "emp" / "run" / "patches.png")
    picture(tmp_path / "study" / "accuracy.png")
    (tmp_path / "study" / "comparison.yaml").write_text("")
    after = list_folder(tmp_path, 8)
    assert after.classes == before.classes == ["ant", "bee"]
    assert len(list_flat(tmp_path, 8)) == 2
    assert after.digest() == before.digest()


def test_a_folder_of_images_is_not_marked_for_the_runs_in_it(tmp_path):
    picture(tmp_path / "mine" / "1.png")
    make_output_folder(tmp_path / "mine")
    make_output_folder(tmp_path / "mine" / "runs")
    assert len(list_flat(tmp_path / "mine", 8)) == 1
    with pytest.raises(UserError, match="it is a folder of outputs"):
        list_flat(tmp_path / "mine" / "runs", 8)


def test_names_need_not_be_utf8(tmp_path):
    for name in (b"a\xff.png", b"b.png"):
        picture(tmp_path / os.fsdecode(name))
    assert len(list_flat(tmp_path, 8).digest()) == 16


def test_the_digest_tells_lists_apart(tmp_path):
    for name in ("ant/1.png", "ant/2.png", "bee/1.png"):
        picture(tmp_path / "old" / name)
    digest = list_folder(tmp_path / "old", 8).digest()
    shutil.copytree(tmp_path / "old", tmp_path / "moved")
    assert list_folder(tmp_path / "moved", 8).digest() == digest
    (tmp_path / "moved" / "ant" / "2.png").rename(tmp_path / "moved" / "bee" / "2.png")
    assert list_folder(tmp_path / "moved", 8).digest() != digest
    (tmp_path / "old" / "ant" / "2.png").write_bytes(b"another size")
    assert list_folder(tmp_path / "old", 8).digest() != digest


def test_palette_images_become_rgb(tmp_path):
    Image.new("RGB", (8, 8), (255, 0, 0)).quantize(4).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", 8)[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("name", "content"), [("a.png", b"text"), ("a.jpg", b""), ("a.png", "cut")]
)
def test_a_broken_file_is_named(tmp_path, name, content):
    if content == "cut":
        picture(tmp_path / name, (50, 50))
        content = (tmp_path / name).read_bytes()[:500]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        read_image(tmp_path / name, 8)


def test_folders_are_classes(tmp_path):
    for i, name in enumerate(("cat/1.png", "cat/2.PNG", "ant/deep/3.jpg", "zebra/4.bmp")):
        picture(tmp_path / name, seed=i)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    files = list_folder(tmp_path, 8)
    assert files.classes == ["ant", "cat", "zebra"]
    assert files.targets.tolist() == [0, 1, 1, 2]
    assert len(files) == 4
    first_cat = read_image(tmp_path / "cat" / "1.png", 8)
    assert torch.equal(files.fetch(torch.tensor([2, 1]))[1], first_cat)
    assert list_folder(tmp_path, 8, classes=["zebra", "cat"]).classes == ["cat", "zebra"]
    assert files.subset(torch.tensor([3, 0])).targets.tolist() == [2, 0]
    assert torch.equal(files.read_all("reading"), files.fetch(torch.arange(4)))
    with pytest.raises(UserError, match="lacks 1 of 2 class folders, the first is dog"):
        list_folder(tmp_path, 8, classes=["cat", "dog"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no images"):
        list_folder(tmp_path, 8)


def test_hidden_files_and_folders_are_none_of_the_images_and_links_are(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for path in (elsewhere / "2.png", root / "ant" / "1.png"):
        picture(path)
    for hidden in (root / ".thumbnails" / "1.png", root / "ant" / ".thumbnails" / "1.png"):
        picture(hidden)
    (root / "ant" / "._1.png").write_bytes(b"left by macOS")
    (root / "ant" / "more").symlink_to(elsewhere, target_is_directory=True)
    (root / "ant" / "more" / "up").symlink_to(root / "ant", target_is_directory=True)  # a circle
    files = list_folder(root, 8)
    assert files.classes == ["ant"]
    assert len(files) == 2
    assert len(image_paths(root / "ant", below=False)) == 1
    assert count_classes("custom", str(root)) == 1


def test_what_the_decoder_of_avif_says_is_named_too(tmp_path):
    path = tmp_path / "a.avif"
    try:
        Image.new("RGB", (40, 30), "red").save(path)
    except (KeyError, OSError):
        pytest.skip("this Pillow has no AVIF")
    content = path.read_bytes()
    header = content.index(b"mdat") + 4
    path.write_bytes(content[:header] + bytes(len(content) - header))  # RuntimeError
    with pytest.raises(UserError, match="a.avif: not a readable image"):
        read_image(path, 8)


def test_a_flat_folder_has_no_labels(tmp_path):
    picture(tmp_path / "x" / "1.png")
    picture(tmp_path / "2.png")
    files = list_flat(tmp_path, 8)
    assert len(files) == 2
    assert files.classes == ["unlabelled"]
    assert files.targets.tolist() == [-1, -1]


def test_tiny_imagenet_as_distributed(tmp_path):
    for name in ("n02", "n01"):
        picture(tmp_path / "train" / name / "images" / f"{name}_0.JPEG", (64, 64))
        (tmp_path / "train" / name / f"{name}_boxes.txt").write_text("n02_0.JPEG\t0\t0\t9\t9\n")
    for i in range(3):
        picture(tmp_path / "val" / "images" / f"val_{i}.JPEG", (64, 64), seed=i)
    annotations = tmp_path / "val" / "val_annotations.txt"
    annotations.write_text(
        "val_0.JPEG\tn02\t0\t32\t44\t62\nval_2.JPEG\tn01\t5\t5\t9\t9\nval_1.JPEG\tn02\t0\t0\t1\t1\n"
    )
    train, test = list_tiny_imagenet(tmp_path, 64)
    assert isinstance(train, ImageFiles)
    assert train.targets.tolist() == [0, 1]
    assert test.targets.tolist() == [1, 0, 1]
    second = read_image(tmp_path / "val" / "images" / "val_2.JPEG", 64)
    assert torch.equal(test.fetch(torch.tensor([1]))[0], second)
    annotations.write_text("val_0.JPEG\tn99\n")
    with pytest.raises(UserError, match="n99"):
        list_tiny_imagenet(tmp_path, 64)
    annotations.unlink()
    with pytest.raises(UserError, match="val_annotations.txt is missing"):
        list_tiny_imagenet(tmp_path, 64)

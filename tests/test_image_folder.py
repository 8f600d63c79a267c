"""Folders of images: every file is read, left out by name, or named as broken."""

import logging
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

import data
from images import image_folder
from utils import UserError


@pytest.fixture
def root(image_folder, tmp_path):
    return shutil.copytree(image_folder, tmp_path / "images")


def labels(root):
    return data.load("folder", root, True).labels.bincount().tolist()


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda root: shutil.rmtree(root), "no such folder"),
        (lambda root: shutil.rmtree(root / "train"), "the folder train is missing"),
        (lambda root: [p.unlink() for p in (root / "train" / "green").iterdir()], "train/green holds no image file"),
        (lambda root: [shutil.rmtree(p) for p in (root / "train").iterdir()], "needs two class folders or more"),
        (lambda root: [shutil.rmtree(root / "train" / p) for p in ("red", "blue")], "in %s/CLASS/; got 1"),
        (lambda root: (root / "train" / "red" / "003.png").write_bytes(b"\x89PNG no"), "train/red/003.png"),
        (lambda root: (root / "train" / "red" / "003.png").write_bytes(b""), "train/red/003.png"),
    ],
)
def test_damaged_folders_are_named(image_folder, tmp_path, damage, says):
    root = tmp_path / "images"
    shutil.copytree(image_folder, root)
    damage(root)
    with pytest.raises(UserError) as caught:
        data.load("folder", root, True)
    assert says.replace("%s", str(root / "train")) in str(caught.value)


def test_what_file_managers_leave_behind_is_skipped(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "train" / "red" / "._000.png").write_bytes(b"not an image")
    assert len(data.load("folder", tmp_path, True)) == 24


def test_sixteen_bits_are_scaled_not_clipped(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path, dirs_exist_ok=True)
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "train" / "blue" / "000.png")
    pixels = data.load("folder", tmp_path, True, image_size=8).pixels[0]
    assert torch.equal(pixels[..., 0], torch.from_numpy((ramp >> 8).astype(np.uint8)))


def test_what_has_more_than_sixteen_bits_is_refused(root):
    """Pillow opens these two in one mode."""
    of_sixteen, of_more = (root / "train" / "blue" / f"deep.{extension}" for extension in ("pgm", "tiff"))
    of_sixteen.write_bytes(b"P5 8 8 65535\n" + np.full((8, 8), 200 * 256, ">u2").tobytes())
    images = data.load("folder", root, True, image_size=8)
    (place,) = [k for k, name in enumerate(images.names) if name.endswith("deep.pgm")]
    assert (images.pixels[place] == 200).all()
    Image.fromarray(np.full((8, 8), 200 * 256, np.int32)).save(of_more)
    with pytest.raises(UserError, match="deep.tiff.*32 bits"):
        data.load("folder", root, True)


def test_a_truncated_image_is_named(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "train" / "blue" / "000.png"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="blue/000.png"):
        data.load("folder", tmp_path, True)


@pytest.mark.parametrize("extension", ["gif", "webp", "bmp", "tiff", "TIF", "jpeg"])
def test_formats(root, extension):
    Image.new("RGB", (9, 9), (250, 10, 10)).save(root / "train" / "red" / f"new.{extension}")
    images = data.load("folder", root, True)
    assert len(images) == 25 and images.names[-1].endswith(f"new.{extension}")
    assert (images.pixels[-1, ..., 0] > 200).all() and (images.pixels[-1, ..., 1:] < 50).all()


def test_every_file_is_accounted_for(root, caplog):
    caplog.set_level(logging.INFO, "darts")
    (root / "train" / "red" / "notes.txt").write_text("x")
    (root / "train" / "list.csv").write_text("x")
    data.load("folder", root, True)
    assert f"train: 24 of 24 images, 3 classes ({root}/train)" in caplog.text
    left_out = f"2 files: {root}/train/list.csv, {root}/train/red/notes.txt"
    assert left_out in caplog.text


def test_links_that_lead_back_bring_no_image_twice(root, caplog):
    red = root / "train" / "red"
    for name, target in (("self", "."), ("up", ".."), ("root", root), ("other", "../green")):
        (red / name).symlink_to(target)
    (root / "train" / "blue" / "deep").mkdir()
    (root / "train" / "blue" / "deep" / "loop").symlink_to("..")
    assert labels(root) == [8, 8, 8]
    assert "5 files: " in caplog.text and "red/other" in caplog.text


def test_links_to_other_places_are_followed(root, tmp_path):
    shutil.move(root / "train" / "red", tmp_path / "elsewhere")
    (root / "train" / "red").symlink_to(tmp_path / "elsewhere")
    shutil.copytree(root / "test" / "red", tmp_path / "more")
    (tmp_path / "more" / "back").symlink_to(".")
    (tmp_path / "elsewhere" / "more").symlink_to(tmp_path / "more")
    assert labels(root) == [8, 8, 12]
    (root / "train" / "rot").symlink_to("red")
    with pytest.raises(UserError, match="train/red and .*train/rot are one and the same"):
        labels(root)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(root, caplog):
    os.mkfifo(root / "train" / "red" / "f.png")
    assert labels(root) == [8, 8, 8] and "red/f.png" in caplog.text


def test_broken_images_are_all_named_or_left_out(root, caplog):
    for k in range(8):
        (root / "train" / "red" / f"{k:03d}.png").write_bytes(b"no")
    for k in range(4):
        path = root / "train" / "green" / f"{k:03d}.png"
        path.unlink()
        path.symlink_to("nowhere")
    with pytest.raises(UserError) as caught:
        labels(root)
    for says in ("12 files: ", "green/000.png (No such file", "red/005.png", "and 2 more", "--skip_broken"):
        assert says in str(caught.value)
    assert "red/006.png" not in str(caught.value)
    images = data.load("folder", root, True, skip_broken=True)
    assert images.labels.bincount(minlength=3).tolist() == [8, 4, 0] and len(images.pixels) == 12
    assert "left out of the train images, being broken: 12 files" in caplog.text
    assert "; no image is left of red\n" in caplog.text
    for path in root.glob("train/*/*"):
        path.write_bytes(b"no")
    with pytest.raises(UserError, match="24 files"):
        data.load("folder", root, True, skip_broken=True)


@pytest.mark.parametrize("values", [np.full((4, 4), 0.5, np.float32), np.full((4, 4), 70_000, np.int32)])
def test_pixels_of_an_unknown_range_are_not_guessed_at(root, values):
    Image.fromarray(values).save(root / "train" / "red" / "000.tiff")
    with pytest.raises(UserError, match="000.tiff .its pixels"):
        labels(root)


def read_one(folder, image, size=8, fit="crop", **options):
    """The pixels (size, size, 3) of an image that is saved and read."""
    path = folder / options.pop("name", "image.png")
    image.save(path, **options)
    _, _, (pixels,) = image_folder.read([(str(path), 0)], size, fit, "train")
    return pixels.astype(int)


def stripes(width, height, left="red", right="blue"):
    image = Image.new("RGB", (width, height), left)
    image.paste(right, (width // 2, 0, width, height))
    return image


def test_the_middle_of_a_photograph_is_kept_or_all_of_it_squeezed(tmp_path):
    image = Image.new("RGB", (64, 16), "red")
    image.paste("blue", (24, 0, 40, 16))
    assert (read_one(tmp_path, image)[:, 1:-1] == [0, 0, 255]).all()  # the filter reaches over the edge
    squeezed = read_one(tmp_path, image, fit="squeeze")
    assert (squeezed[:, 0] == [255, 0, 0]).all() and squeezed[0, 3:5, 2].min() > 200


@pytest.mark.parametrize("name", ["turned.jpg", "turned.png", "turned.tiff", "turned.webp"])
def test_photographs_are_turned_as_the_camera_was(tmp_path, name):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: left is up
    pixels = read_one(tmp_path, stripes(64, 64), name=name, exif=exif)
    assert (pixels[0, :, 0] > 200).all() and (pixels[-1, :, 2] > 200).all()


def test_transparent_pixels_are_white(tmp_path):
    image = stripes(8, 8).convert("RGBA")
    image.putalpha(Image.new("L", (8, 8), 0))
    assert (read_one(tmp_path, image) == 255).all()
    image.putalpha(Image.new("L", (8, 8), 51))  # a fifth of the colour
    assert np.abs(read_one(tmp_path, image)[0, 0] - [255, 204, 204]).max() <= 1
    palette = stripes(8, 8).quantize(4)
    index = palette.getpixel((0, 0))
    pixels = read_one(tmp_path, palette, transparency=index)
    assert (pixels[0, 0] == 255).all() and (pixels[0, -1] == [0, 0, 255]).all()
    gray = Image.new("LA", (8, 8), (0, 0))
    assert (read_one(tmp_path, gray) == 255).all()


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "RGBA", "LA", "YCbCr"])
def test_modes(tmp_path, mode):
    """White and black, in colours, in a palette, in inks."""
    image = stripes(64, 64, "white", "black").convert(mode)
    name = {"CMYK": "image.jpg", "YCbCr": "image.jpg"}.get(mode, "image.png")
    pixels = read_one(tmp_path, image, name=name)
    assert (pixels[:, 0] > 240).all() and (pixels[:, -1] < 15).all()


def test_large_photographs_are_decoded_at_a_fraction_of_their_size(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    scene = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((640, 480), Image.BICUBIC)
    reduced = read_one(tmp_path, scene, size=24, name="scene.jpg", quality=95)
    monkeypatch.setattr(JpegImageFile, "draft", lambda *_: None)
    entire = read_one(tmp_path, scene, size=24, name="scene.jpg", quality=95)
    assert 0 < np.abs(reduced - entire).mean() < 0.5


def cut(path, left):
    path.write_bytes(path.read_bytes()[:left])


@pytest.mark.parametrize(
    "name, damage",
    [
        ("dawn/000.jpg", lambda path: cut(path, -2)),
        ("dawn/000.jpg", lambda path: cut(path, 300)),
        ("dawn/000.jpg", lambda path: path.write_bytes(b"")),
        ("dawn/002.png", lambda path: cut(path, -60)),
        ("dawn/004.gif", lambda path: cut(path, 200)),
        ("dawn/005.webp", lambda path: cut(path, -10)),
        ("dawn/006.png", lambda path: cut(path, -60)),
        ("dawn/008.bmp", lambda path: cut(path, -9)),
        ("dawn/009.tiff", lambda path: cut(path, 100)),
        ("dawn/009.tiff", lambda path: Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(path)),
        ("dawn/009.tiff", lambda path: Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(path)),
    ],
)
def test_a_check_finds_what_reading_would(photographs, tmp_path, name, damage):
    root = shutil.copytree(photographs, tmp_path / "images")
    assert len(data.load("folder", root, True, data_in="disk")) == 60
    damage(root / "train" / name)
    for where in ("disk", "memory"):
        with pytest.raises(UserError, match=f"broken image .*{name} "):
            data.load("folder", root, True, data_in=where)
        assert len(data.load("folder", root, True, data_in=where, skip_broken=True)) == 59


def test_bytes_after_the_end_of_a_photograph_do_no_harm(photographs, tmp_path):
    path = tmp_path / "000.jpg"
    path.write_bytes((photographs / "train" / "dawn" / "000.jpg").read_bytes() + bytes(10_000))
    assert len(image_folder.check([(str(path), 0)], "train")[0]) == 1


def test_a_file_that_broke_since_is_named(photographs, tmp_path):
    path = str(tmp_path / "gone.jpg")
    good = str(photographs / "train" / "dawn" / "000.jpg")
    assert image_folder.decode(8, "crop", [os.fsencode(good)] * 2).shape == (2, 8, 8, 3)
    failure = image_folder.decode(8, "crop", [os.fsencode(good), os.fsencode(path)])
    assert failure == f"cannot read {path} (No such file or directory) any more"


def test_what_is_found_of_pictures(root, tmp_path):
    """Files as they are given, whatever their names; of folders, the images in and below them."""
    notes = tmp_path / "notes.txt"
    notes.touch()
    hidden, empty = root / "train" / "red" / ".hidden", tmp_path / "empty"
    empty.mkdir()
    hidden.mkdir()
    (hidden / "000.png").touch()
    (root / "train" / "red" / "list.txt").touch()
    found = image_folder.find([str(notes), str(root / "train" / "red")])
    assert found == [str(notes), *(str(root / "train" / "red" / f"{k:03d}.png") for k in range(8))]
    assert len(image_folder.find([str(root)])) == 36
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        image_folder.find(["nowhere"])
    with pytest.raises(UserError, match="holds no image file"):
        image_folder.find([str(empty)])

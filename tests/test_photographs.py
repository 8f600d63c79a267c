"""The examples that make a folder of photographs, and say what is in one with ONNX Runtime."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import data
from images import image_folder
from utils import UserError

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def photographs_script(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import photographs

    return photographs


def test_training_and_test_details_share_no_pixel(photographs_script):
    numbered = np.arange(300 * 500).reshape(300, 500)
    parts = [set(), set()]
    for seen, part in zip(parts, ("train", "test"), strict=True):
        for detail in photographs_script.details(numbered, part, 50, np.random.default_rng(0)):
            assert 100 <= len(detail) <= 150 and detail.shape[1] >= 75
            seen.update(detail.ravel().tolist())
    assert len(parts[0]) > 90_000 and len(parts[1]) > 30_000 and not parts[0] & parts[1]


def test_the_folder_is_one_to_train_on(photographs_script, monkeypatch, tmp_path, capsys):
    scenes = {"sky": np.full((200, 400, 3), 200, np.uint8), "stone": np.full((200, 400), 90, np.uint8)}
    monkeypatch.setattr(photographs_script, "load_photographs", lambda: scenes)
    monkeypatch.setattr(sys, "argv", ["photographs.py", str(tmp_path / "new"), "--train", "3", "--test", "2"])
    photographs_script.main()
    assert "2 classes of 3 training and 2 test images" in capsys.readouterr().out
    for train, count in ((True, 6), (False, 4)):
        images = data.load("folder", tmp_path / "new", train, 8)
        assert len(images) == count and images.classes == ["sky", "stone"]
        assert abs(images.pixels[0].float().mean() - 200) < 3
    with pytest.raises(UserError, match="is there already"):
        photographs_script.main()


def test_without_scikit_image(photographs_script, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(UserError, match="pip install scikit-image"):
        photographs_script.load_photographs()


@pytest.mark.parametrize("fit", ["crop", "squeeze"])
def test_images_are_prepared_as_they_were_for_training(photographs_script, photographs, fit):
    predict = pytest.importorskip("predict", reason="ONNX Runtime is optional")
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]
    about = dict(image_size=8, fit=fit, mean=mean, std=std, with_preprocessing=False)
    for path in sorted((photographs / "train" / "noon").iterdir())[:10]:  # one of each kind
        _, _, pixels = image_folder.read([(str(path), 0)], 8, fit, "train")
        expected = (pixels / 255 - mean) / std
        assert np.abs(predict.prepare(path, about) - expected.transpose(0, 3, 1, 2)).max() < 1e-5
    with Image.open(path) as image:  # a graph that prepares images by itself gets all of one
        whole = predict.prepare(path, about | dict(with_preprocessing=True))
        assert whole.shape == (1, image.height, image.width, 3) and whole.dtype == np.uint8


def test_predictions_are_counted(photographs_script, photographs, monkeypatch, capsys):
    predict = pytest.importorskip("predict", reason="ONNX Runtime is optional")
    about = dict(image_size=8, fit="crop", mean=[0.5] * 3, std=[0.2] * 3, with_preprocessing=False)
    about["classes"] = ["dawn", "dusk", "noon"]
    metadata = SimpleNamespace(custom_metadata_map={name: json.dumps(value) for name, value in about.items()})
    run = lambda _, images: [np.log(np.float32([[0.1, 0.7, 0.2]]))]  # noqa: E731  of any image, the same
    session = SimpleNamespace(get_modelmeta=lambda: metadata, run=run)
    monkeypatch.setattr(predict.onnxruntime, "InferenceSession", lambda path: session)
    files = [str(photographs / "test" / name / "000.jpg") for name in about["classes"]]
    monkeypatch.setattr(sys, "argv", ["predict.py", "network.onnx", *files])
    predict.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{files[0]}: dusk (70.0 %)"
    assert lines[-1] == "1 of 3 are in the folder of their class (33.33 %)"

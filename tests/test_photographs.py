"""The example that makes a folder of photographs."""

import sys
from pathlib import Path

import numpy as np
import pytest

import data
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

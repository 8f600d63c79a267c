"""kernels/ stands by itself: imports run one way."""

import ast
import sys

import pytest

from scripts import ROOT

_FILES = sorted((ROOT / "kernels").glob("*.py"))
_OTHERS = {"torch", "triton"}


@pytest.mark.parametrize("file", _FILES, ids=lambda file: file.name)
def test_kernels_import_nothing_from_the_folder_above(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        else:
            continue
        packages = {name.partition(".")[0] for name in names}
        assert packages <= sys.stdlib_module_names | _OTHERS, f"{file.name}:{node.lineno}"


def test_there_are_kernels():
    assert len(_FILES) > 8

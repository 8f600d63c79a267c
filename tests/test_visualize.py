"""Drawing cells."""

import shutil

import pytest

import genotypes
import visualize
from conftest import assert_one_clear_line

needs_dot = pytest.mark.skipif(not shutil.which("dot"), reason="needs Graphviz's dot program")


def test_a_cell_has_an_arrow_for_every_edge():
    source = visualize.cell_graph(genotypes.DARTS.normal, genotypes.DARTS.normal_concat).source
    assert source.count("->") == 8 + 4
    assert '"c_{k-1}" -> 0 [label=" sep_invo_3x3 "]' in source
    assert '0 -> 2 [label=" skip_connect "]' in source
    assert '3 -> "c_{k}" [style=dashed]' in source


@needs_dot
@pytest.mark.parametrize("format, magic", [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_pictures(tmp_path, format, magic):
    pictures = visualize.draw(genotypes.DARTS_V2, tmp_path, format)
    assert [path.name for path in pictures] == [f"normal.{format}", f"reduction.{format}"]
    assert all(path.read_bytes().startswith(magic) for path in pictures)


@needs_dot
def test_the_printed_command_works(script, tmp_path):
    assert script("visualize.py", "DARTS").stdout.split() == ["normal.pdf", "reduction.pdf"]
    assert (tmp_path / "normal.pdf").exists()


@needs_dot
def test_expressions_and_run_folders(script, tmp_path):
    expression = genotypes.format(genotypes.DARTS_L20)
    assert script("visualize.py", expression, "--format", "svg", "--output", "a").returncode == 0
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "genotype.json").write_text(genotypes.to_json(genotypes.DARTS_L20))
    assert script("visualize.py", "run", "--format", "svg", "--output", "b").returncode == 0
    for name in ("normal.svg", "reduction.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_without_dot_the_source_is_kept(script, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert_one_clear_line(script("visualize.py", "DARTS"), "normal.gv", "install Graphviz")
    assert "digraph" in (tmp_path / "normal.gv").read_text()


@pytest.mark.parametrize(
    "name, says", [("DART", "did you mean DARTS"), ("Genotype(", "malformed"), (".", "has no genotype")]
)
def test_bad_input(script, tmp_path, name, says):
    assert_one_clear_line(script("visualize.py", name), says)
    assert not list(tmp_path.iterdir())

"""Exported files: they compute what the network computes, without this code, and are written whole or not at all."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from PIL import Image

import data
import export
import genotypes
import scripts
from conftest import only_run, vary_kernels
from genotypes import NAMED, SEARCH_SPACES
from images import image_folder
from involution import KERNEL_NORMS
from model import NETWORKS, NetworkCIFAR
from runtime import checkpoint
from test_model import of_primitives
from utils import UserError

needs_onnx = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, export.FORMATS["onnx"].needs)), reason="needs requirements-onnx.txt"
)
FORMATS = [pytest.param("onnx", marks=needs_onnx), "pt2"]
EDGES = "[('sep_invo_3x3', 0), ('skip_connect', 1)]"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run folder of an epoch on digits, of a single cell."""
    folder = tmp_path_factory.mktemp("trained")
    tiny = "--dataset digits --subset 48 --batch_size 16 --init_channels 4 --layers 1 --epochs 1"
    cell = f"Genotype(normal={EDGES}, normal_concat=[2], reduce={EDGES}, reduce_concat=[2])"
    result = scripts.run(folder, "train.py", *tiny.split(), "--arch", cell)
    assert result.returncode == 0, result.stderr
    return only_run(folder, "train")


@pytest.fixture
def run_export(trained, monkeypatch, tmp_path):
    """Call export.py in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, run=trained):
        monkeypatch.setattr("sys.argv", ["export.py", str(run), *map(str, arguments)])
        export.main()

    return run


def read(path):
    """Function, metadata and names of the operators of a file, as another program would have them."""
    if path.suffix == ".pt2":
        extra = {"metadata.json": ""}
        program = torch.export.load(path, extra_files=extra)
        operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        return program.module(), json.loads(extra["metadata.json"]), operators
    import onnx
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    operators = {f"{node.domain or 'aten'}.{node.op_type}" for node in onnx.load(path).graph.node}
    (input,) = session.get_inputs()
    assert input.name == "images" and input.shape[0] == "batch"
    run = lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])  # noqa: E731
    return run, {name: json.loads(value) for name, value in metadata.items()}, operators


@pytest.mark.parametrize("format, with_preprocessing", [
    pytest.param("onnx", True, marks=needs_onnx),
    pytest.param("onnx", False, marks=[needs_onnx, pytest.mark.slow]),
    pytest.param("pt2", True, marks=pytest.mark.slow),
    ("pt2", False),
])  # fmt: skip
def test_an_exported_file(run_export, trained, tmp_path, caplog, format, with_preprocessing):
    caplog.set_level("INFO", "darts")
    path = tmp_path / f"network.{format}"
    options = ["--with_preprocessing"] if with_preprocessing else []
    run_export("--format", format, "--output", path, "--check", 20, *options)
    function, metadata, operators = read(path)
    assert metadata["classes"] == list("0123456789") and metadata["image_size"] == 8
    assert all(name.split(".")[0] in ("aten", "<built-in function getitem>") for name in operators), operators
    assert "checked on 20 test images: all predictions equal" in caplog.text and "in this code" in caplog.text
    state = torch.load(trained / "checkpoint.pt", weights_only=True)
    network = NetworkCIFAR(4, 10, 1, False, genotypes.parse(metadata["genotype"])).eval()
    network.load_state_dict(state["model"])
    mean, std = (torch.tensor(metadata[name])[:, None, None] for name in ("mean", "std"))
    assert [metadata["mean"], metadata["std"]] == [list(values) for values in state["normalization"]]
    for count, height, width in ((1, 8, 8), (5, 8, 8)) + ((3, 13, 9), (2, 6, 30)) * with_preprocessing:
        pixels = torch.randint(256, (count, height, width, 3), dtype=torch.uint8)
        images = export.resized(pixels.permute(0, 3, 1, 2) / 255, 8, "crop")
        normalized = (images - mean) / std
        found = function(pixels if with_preprocessing else normalized.contiguous())
        assert torch.allclose(found, network(normalized)[0], atol=1e-4)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def written(format, network, size, tmp_path):
    """What `export.check` says about a network that was written and read again."""
    path, example = tmp_path / f"network.{format}", torch.randn(2, 3, size, size)
    write, load, _ = export.FORMATS[format]
    plain = export.Classifier(export.of_standard_operators(network), size).eval()
    with torch.no_grad():
        export._attempt("exported", write, plain, example, {}, path, 18)
        batches = torch.randn(1, 3, size, size), torch.randn(9, 3, size, size)
        return export.check(load(path), export.Classifier(network, size).eval(), batches)


@pytest.mark.parametrize("fit", ["crop", "squeeze"])
@pytest.mark.parametrize("height, width", [(8, 8), (21, 13), (5, 30), (6, 7)])
def test_images_are_resized_as_those_that_are_read(tmp_path, fit, height, width):
    """But for Pillow's rounding, once in each direction."""
    pixels = torch.randint(256, (height, width, 3), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "image.png")
    expected = torch.from_numpy(image_folder._read_image(8, fit, tmp_path / "image.png").copy())
    found = export.resized(pixels.permute(2, 0, 1)[None].float(), 8, fit)[0].permute(1, 2, 0)
    assert (found - expected).abs().max() < 1.5


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("format", FORMATS)
def test_every_named_genotype_is_exported(format, name, network, tmp_path):
    torch.manual_seed(0)
    net = vary_kernels(NETWORKS[network](4, 7, 3, True, NAMED[name])).eval()
    assert written(format, net, 40 if network == "imagenet" else 9, tmp_path) < 1e-4


@pytest.mark.parametrize("kernel_norm", KERNEL_NORMS)
def test_standard_operators_compute_what_ours_do(kernel_norm):
    primitives = [primitive for primitive in SEARCH_SPACES["involution"] if "invo" in primitive]
    torch.manual_seed(0)
    network = NetworkCIFAR(16, 5, 3, False, of_primitives(primitives, primitives), kernel_norm).double().eval()
    plain, images = export.of_standard_operators(vary_kernels(network)), torch.randn(3, 3, 9, 7).double()
    assert torch.allclose(plain(images)[0], network(images)[0], rtol=1e-9, atol=1e-12)


def test_a_file_that_computes_something_else_is_not_written(run_export, monkeypatch, tmp_path):
    def load(path):
        assert path.exists()
        return lambda images: torch.zeros(len(images), 10)

    (tmp_path / "network.pt2").write_text("of before")
    write, _, needs = export.FORMATS["pt2"]
    monkeypatch.setitem(export.FORMATS, "pt2", export._Format(lambda *args: args[3].touch(), load, needs))
    with pytest.raises(UserError, match="what was exported is not the network: on 1 images its logits differ by up to"):
        run_export("--format", "pt2", "--output", tmp_path / "network.pt2")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["of before"]


def test_logits_that_are_close_may_not_change_a_prediction():
    eager = lambda images: torch.tensor([[1.0, 1.0 - 1e-6]])  # noqa: E731
    assert export.check(eager, eager, [np.zeros(1)]) == 0
    with pytest.raises(UserError, match="and 1 of its predictions"):
        export.check(lambda images: eager(images).flip(1), eager, [np.zeros(1)])
    with pytest.raises(UserError, match="differ by up to nan"):
        export.check(lambda images: eager(images) * float("nan"), eager, [np.zeros(1)])


class Means(torch.nn.Module):
    def forward(self, images):
        return images.mean((2, 3)), None


@needs_onnx
def test_an_opset_that_lacks_operators(tmp_path, capfd):
    resizing = export.Classifier(Means(), 8, data.Normalization((0.5,) * 3, (0.2,) * 3))
    write = export.FORMATS["onnx"].write
    with pytest.raises(UserError, match="opset 7 lacks operators that it needs, opset 18 has them: --opset 18"):
        images = torch.zeros(2, 9, 9, 3, dtype=torch.uint8)
        export._attempt("exported", write, resizing, images, {}, tmp_path / "network.onnx", 7)
    assert not list(tmp_path.iterdir()) and not capfd.readouterr().err


def test_without_the_packages_of_onnx(run_export, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match="--format onnx needs onnx, onnxscript, onnxruntime: pip install -r requirements"
    ):
        run_export("--format", "onnx", "--output", "network.onnx")


@pytest.mark.parametrize(
    "flag, value, says",
    [
        ("--opset", 18, "--opset is for --format onnx, got --format pt2"),
        ("--subset", 9, "--check N says how many"),
        ("--data_in", "disk", "--data_in has no effect"),
    ],
)
def test_a_flag_that_would_do_nothing(run_export, tmp_path, flag, value, says):
    with pytest.raises(UserError, match=says):
        run_export("--format", "pt2", "--output", "network.pt2", flag, value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("output", [".", "missing/network.pt2"])
def test_an_output_that_cannot_be(run_export, output):
    with pytest.raises(UserError, match="must be a file in a folder that is there"):
        run_export("--format", "pt2", "--output", output)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda state: state.update(epoch=0, history=[]), "has not finished an epoch; go on with it"),
        (lambda state: state["model"].popitem(), "are not those of this network"),
        (lambda state: state.update(normalization=3), "is damaged: its normalization is 3"),
        (lambda state: [state.pop(name) for name in ("args", "classes")], "is no run of train.py"),
        (lambda state: state.update(arch_optimizer={}), "is a search: train what it found"),
    ],
)
def test_runs_that_cannot_be_exported(run_export, trained, tmp_path, change, says):
    state = torch.load(trained / "checkpoint.pt", weights_only=True)
    change(state)
    checkpoint.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match=says):
        run_export("--format", "pt2", "--output", tmp_path / "network.pt2", run=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]

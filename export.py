"""Export a trained network for other programs, and check the file by running it.

python export.py runs/train-EXP-20250101-120000 --format onnx --output network.onnx    # for ONNX Runtime and others
python export.py runs/train-EXP-20250101-120000 --format pt2 --output network.pt2      # for torch.export.load
python export.py RUN --format onnx --output network.onnx --with_preprocessing          # takes uint8 images of any size

The file is a graph of standard operators, for any number of images: it runs without this code. Its input `images` is
(N, 3, S, S) in float32, normalised: pixels from 0 to 1, less `mean`, divided by `std`; with preprocessing it is
(N, H, W, 3) in uint8; red, green and blue in both. Its output `logits` is (N, classes). The metadata has mean, std, S
(`image_size`), the names of the classes and the genotype, as JSON values by name (ONNX: metadata_props; pt2: the extra
file metadata.json).
"""

import contextlib
import copy
import importlib.util
import json
import logging
import statistics
import time
import warnings
from pathlib import Path
from typing import NamedTuple

from runtime import threads

if __name__ == "__main__":
    threads.choose_waiting()  # before PyTorch is imported

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import test
import train
import utils
from involution import Involution2d
from runtime import checkpoint, progress

logger = logging.getLogger("darts.export")

_TOLERANCE = 1e-4  # of logits, relative to the largest of a batch where that is above one
_METADATA = "metadata.json"
_BATCH = 32  # images, in the check and where time is taken
_ROUNDS = 10


# ----------------------------------------------------------------------------------------------- what is exported


class Classifier(nn.Module):
    """A network as other programs see it: images in, logits out, without the auxiliary head.

    Args:
        normalization: a `data.Normalization` where images are uint8 (N, H, W, 3) of any size, which are resized and
            normalised; None where they are prepared.
        image_size: pixels that they are resized to.
        fit: what makes them square, one of `image_folder.FITS`.
    """

    def __init__(self, network, image_size, normalization=None, fit="crop"):
        super().__init__()
        self.network, self.image_size, self.prepares, self.fit = network, image_size, normalization is not None, fit
        if normalization:
            self.register_buffer("mean", torch.tensor(normalization.mean)[:, None, None])
            self.register_buffer("std", torch.tensor(normalization.std)[:, None, None])

    def forward(self, images):
        if self.prepares:
            images = resized(images.permute(0, 3, 1, 2) / 255, self.image_size, self.fit)
            images = (images - self.mean) / self.std
        return self.network(images)[0]

    def dynamic_shapes(self):
        """The axes of `images` that may have any length, by number."""
        return {0: "batch", 1: "height", 2: "width"} if self.prepares else {0: "batch"}


def resized(images, size, fit):
    """Images (N, C, H, W) as (N, C, size, size), as `image_folder` reads them: by Pillow's BILINEAR, but not rounded.

    In tensors throughout, so that a graph takes images of any size.
    """
    rows, columns = (torch.arange(length, device=images.device) + 0.5 for length in images.shape[2:])
    height, width = rows[-1] + 0.5, columns[-1] + 0.5
    if fit == "crop":
        sides = (torch.minimum(height, width),) * 2
    else:
        sides = height, width
    along_rows, along_columns = _shares(rows, height, sides[0], size), _shares(columns, width, sides[1], size)
    return along_rows @ images @ along_columns.T


def _shares(pixels, length, side, size):
    """What part each of the pixels (P,), their centres, has in each of `size` new ones that cover the middle `side`."""
    scale = side / size
    centres = (length - side) / 2 + scale * (torch.arange(size, device=pixels.device) + 0.5)
    shares = F.relu(1 - (pixels - centres[:, None]).abs() / scale.clamp_min(1))  # wider where images become smaller
    return shares / shares.sum(1, keepdim=True)


class _UnfoldedInvolution2d(nn.Module):
    """An Involution2d by unfolded patches (Algorithm 1 of arXiv 2103.06255): few operators, known to every program."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        weight, layer = self.layer.kernels(x), self.layer
        padding = layer.dilation * (layer.kernel_size // 2)
        patches = F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)  # (N, C * K * K, Ho * Wo)
        patches = patches.unflatten(1, (layer.groups, -1, weight.shape[2])).unflatten(-1, weight.shape[3:])
        return (patches * weight.unsqueeze(2)).sum(3).flatten(1, 2)


def of_standard_operators(network):
    """A copy of a network that computes the same module by module and without operators of our own."""
    network = copy.deepcopy(network)
    network.fast = False
    layers = [(name, module) for name, module in network.named_modules() if isinstance(module, Involution2d)]
    for name, layer in layers:
        network.set_submodule(name, _UnfoldedInvolution2d(layer))
    return network


# ------------------------------------------------------------------------------------------------------- formats


def _write_onnx(classifier, example, metadata, path, opset):
    program = torch.onnx.export(
        classifier,
        (example,),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"images": classifier.dynamic_shapes()},
        opset_version=opset,
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    written = program.model.opset_imports[""]
    if written != opset:  # the exporter leaves it at what it could do
        raise ValueError(f"opset {opset} lacks operators that it needs, opset {written} has them: --opset {written}")
    program.model.metadata_props.update({name: json.dumps(value) for name, value in metadata.items()})
    program.save(path, external_data=False)


def _load_onnx(path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3  # errors alone
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _write_pt2(classifier, example, metadata, path, opset):
    axes = {axis: torch.export.Dim(name) for axis, name in classifier.dynamic_shapes().items()}
    program = torch.export.export(classifier, (example,), dynamic_shapes={"images": axes})
    with path.open("wb") as file:  # a path would have to end in .pt2
        torch.export.save(program, file, extra_files={_METADATA: json.dumps(metadata)})


def _load_pt2(path):
    with path.open("rb") as file:
        return torch.export.load(file).module()


class _Format(NamedTuple):
    write: object  # (classifier, example, metadata, path, opset)
    load: object  # path -> (images -> logits)
    needs: tuple  # packages


FORMATS = {
    "onnx": _Format(_write_onnx, _load_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "pt2": _Format(_write_pt2, _load_pt2, ()),
}


@contextlib.contextmanager
def _silence():
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


def _attempt(what, function, *args):
    """Call what has warnings for its developers, and what raises dozens of kinds.

    Raises:
        UserError: it did.
    """
    with _silence():
        try:
            return function(*args)
        except (OSError, MemoryError):
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise utils.UserError(f"the network cannot be {what} ({reason}); nothing was written") from None


# ------------------------------------------------------------------------------------------------ check and times


def check(exported, eager, batches):
    """The largest difference between the logits of two functions, over batches of images.

    Raises:
        UserError: a logit differs by more than the tolerance, or a prediction does.
    """
    largest = 0.0
    for images in batches:
        found, expected = exported(images), eager(images)
        difference = (found - expected).abs().max().item()
        allowed = _TOLERANCE * max(1.0, expected.abs().max().item())
        others = (found.argmax(1) != expected.argmax(1)).sum().item()
        if not difference <= allowed or others:  # as NaN never is
            raise utils.UserError(
                f"what was exported is not the network: on {len(images)} images its logits differ by up to "
                f"{difference:.3g} (allowed {allowed:.3g}), and {others} of its predictions; nothing was written"
            )
        largest = max(largest, difference)
    return largest


def measure(functions, images):
    """The median milliseconds of each function on a batch; they take turns, after one that does not count."""
    times = [[] for _ in functions]
    for _ in range(1 + _ROUNDS):
        for function, taken in zip(functions, times, strict=True):
            began = time.perf_counter()
            function(images)
            taken.append(1000 * (time.perf_counter() - began))
    return [statistics.median(taken[1:]) for taken in times]


def make_batches(images, normalization, prepares):
    """Test images as the file takes them: one alone, then all, with preprocessing also some of another size."""
    if not prepares:
        whole = torch.cat([input for input, _ in data.Batches(images, _BATCH, normalization, None)]).contiguous()
        return [whole[:1], *whole.split(_BATCH)]
    height, width = 3 * images.size // 2, images.size + 5
    larger = F.interpolate(images.pixels[:_BATCH].permute(0, 3, 1, 2), (height, width)).permute(0, 2, 3, 1)
    return [images.pixels[:1], *images.pixels.split(_BATCH), larger.contiguous()]


# ------------------------------------------------------------------------------------------------------- script


def build_parser():
    parser = utils.ArgumentParser(description="Export the network of a run of train.py, and check what was exported.")
    parser.add_argument("model_path", metavar="RUN", help="a run folder of train.py, or its checkpoint.pt")
    parser.add_argument("--format", choices=FORMATS, required=True, help="onnx, or pt2: torch.export's")
    parser.add_argument("--output", type=Path, required=True, help="the file to write")
    parser.add_argument(
        "--with_preprocessing",
        action="store_true",
        help="the file takes uint8 images (N, H, W, 3) of any size, and resizes and normalises them",
    )
    parser.add_argument("--opset", type=utils.number(int, low=1), default=18, help="of ONNX")
    parser.add_argument(
        "--check", metavar="N", type=utils.number(int, low=2), default=256, help="test images to run it on, at most"
    )
    group = utils.add_data_arguments(parser)
    group.add_argument("--seed", type=utils.number(int, low=0), default=0, help="draws the test images")
    return parser


def _check_flags(format, given):
    """Raise UserError for flags that would do nothing here."""
    for name, why in (
        ("subset", "--check N says how many test images are read"),
        ("data_in", "the test images of a check are kept in memory"),
    ):
        if name in given:
            raise utils.UserError(f"--{name} has no effect: {why}; leave it out")
    if "opset" in given and format != "onnx":
        raise utils.UserError(f"--opset is for --format onnx, got --format {format}: leave it out")


def load_network(parser, argv=None):
    """The arguments with the run's own, its network on the CPU, and its checkpoint.

    Raises:
        UserError: no run of train.py, or one that has not finished an epoch; no place for the output, a package that is
            missing, or a flag that would do nothing.
    """
    given = parser.parse_args(argv)
    _check_flags(given.format, parser.given(argv))
    missing = [name for name in FORMATS[given.format].needs if importlib.util.find_spec(name) is None]
    if missing:
        raise utils.UserError(
            f"--format {given.format} needs {', '.join(missing)}: pip install -r requirements-onnx.txt, "
            "or use --format pt2"
        )
    if given.output.is_dir() or not given.output.parent.is_dir():
        raise utils.UserError(f"--output {given.output}: must be a file in a folder that is there")
    args, weights, state = test.load_run(parser, argv)
    if not state:
        raise utils.UserError(f"{args.model_path} is no run of train.py: it has no settings, classes or normalization")
    if state["epoch"] == 0:
        raise utils.UserError(f"{args.model_path} has not finished an epoch; go on with it: train.py --resume")
    network = train.make_network(args, len(state["classes"]))
    checkpoint.load_weights(network, weights, args.model_path)
    return args, network.eval(), state


def main():
    args, network, state = load_network(build_parser())
    args.subset, args.data_in = args.check, "memory"
    images = data.load_as(args, False, "cpu")
    data.check_classes(images, state["classes"])
    normalization, size = data.Normalization(*state["normalization"]), data.image_size(args)
    prepared = normalization if args.with_preprocessing else None
    plain, eager = (
        Classifier(net, size, prepared, args.fit).eval() for net in (of_standard_operators(network), network)
    )
    eager.to(memory_format=torch.channels_last)
    batches = make_batches(images, normalization, args.with_preprocessing)
    metadata = dict(classes=list(images.classes), image_size=size, **normalization._asdict())
    metadata |= dict(fit=args.fit, with_preprocessing=args.with_preprocessing, genotype=args.arch)
    write, load, _ = FORMATS[args.format]
    progress.doing("writing the graph of the network")
    with torch.no_grad(), utils.replacing(args.output) as temporary:
        _attempt("exported", write, plain, batches[1][:2], metadata, temporary, args.opset)
        exported = _attempt("loaded", load, temporary)
        progress.doing("comparing what was written with the network")
        difference = check(exported, eager, batches)
        times = [(len(batch), *measure((exported, eager), batch)) for batch in batches[:2]]
    what = "checked on %d test images: all predictions equal, logits within %.2g"
    logger.info(what, len(images), difference)
    for count, theirs, ours in times:
        logger.info("a batch of %d takes %.1f ms, in this code %.1f ms (medians of %d)", count, theirs, ours, _ROUNDS)
    logger.info("%s: %.2f MB", args.output, args.output.stat().st_size / 1e6)


if __name__ == "__main__":
    utils.run_script(main)

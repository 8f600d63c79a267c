"""Evaluate a trained network on the test images.

python test.py --model_path runs/train-EXP-20250101-120000              # a run of train.py; results go to its test/
python test.py --model_path weights.pt --arch DARTS_V2 --auxiliary      # a published state dict
python test.py --model_path imagenet.pt --arch DARTS_V2 --auxiliary --init_channels 48 --layers 14 --image_size 224 \
    --dataset folder --data FOLDER                                      # the published one of ImageNet
python test.py --model_path RUN --images cat.png holiday/               # what it sees in pictures of one's own
"""

import argparse
import functools
import logging
from pathlib import Path

from runtime import threads

if __name__ == "__main__":
    threads.choose_waiting()  # before PyTorch is imported

import torch

import data
import report
import run_folder
import train
import utils
from runtime import checkpoint, settings
from watch import evaluation

logger = logging.getLogger("darts.test")

_WORST = 10  # images that are named at most
_TOP = 5  # classes that are printed of a picture


def build_parser():
    parser = utils.ArgumentParser(
        description="Evaluate a trained network. A run of train.py brings its own settings; those given here win."
    )
    group = parser.add_argument_group("model")
    group.add_argument("--model_path", required=True, help="a run folder, its checkpoint.pt, or a state dict")
    group.add_argument(
        "--output",
        metavar="FOLDER",
        help="folder for the tables and pictures of the results (default: test in the run folder; none for a file)",
    )
    group.add_argument(
        "--images",
        nargs="+",
        metavar="PICTURE",
        help="print the likeliest classes of these pictures, files or folders of them, instead of a test",
    )
    train.add_network_arguments(parser)
    group = utils.add_data_arguments(parser)
    group.add_argument("--batch_size", type=utils.number(int, low=1), default=96, help="images at once")
    group.add_argument("--seed", type=utils.number(int, low=0), default=0, help="draws the --subset")
    utils.add_device_arguments(parser)
    return parser


def load_run(parser, argv=None):
    """The settings (of a run all it has), the weights and, of a run of train.py, the whole checkpoint (else {})."""
    args = parser.parse_args(argv)
    path = Path(args.model_path)
    if path.is_dir():
        path = path / checkpoint.NAME
        if not path.exists():
            raise utils.UserError(f"--model_path {args.model_path}: no checkpoint.pt in that folder")
    state = checkpoint.load(path)
    if not isinstance(state, dict):
        raise utils.UserError(f"{path} holds a {type(state).__name__}, not a checkpoint or a state dict")
    if isinstance(state.get("state_dict"), dict):  # as the original's script for ImageNet saves it
        state = state["state_dict"]
    if "arch_optimizer" in state:
        raise utils.UserError(f"{path} is a search: train what it found (python train.py --arch {path.parent}) first")
    if not {"model", "args", "normalization", "classes"} <= set(state):
        return args, state, {}
    checkpoint.check(state, path)
    saved = settings.check(state["args"], train.build_parser(), path)
    return argparse.Namespace(**(vars(args) | saved | parser.given(argv))), state["model"], state


def main():
    parser = build_parser()
    args, weights, state = load_run(parser)
    train.choose_network(args)
    device = utils.pick_device(args)
    utils.log_device(device)
    if args.images:
        print_predictions(args, weights, state, device)
        return
    folder = results_folder(args)
    images = data.load_as(args, False, device)
    if state:
        data.check_classes(images, state["classes"])
        normalization = data.Normalization(*state["normalization"])
        if state["epoch"] == 0:
            logger.warning("%s comes from the first epoch of its run: it is hardly trained", args.model_path)
    else:
        everything = argparse.Namespace(**vars(args) | {"subset": None})
        normalization = data.Normalization.of(args.dataset, functools.partial(data.load_as, everything, True, "cpu"))
    if not state and "kernel_norm" not in parser.given() and "invo" in args.arch:
        logger.warning(
            "%s does not say what bounds the kernels of its involutions: --kernel_norm %s is assumed; weights of "
            "the involution authors' form need --kernel_norm none",
            args.model_path,
            args.kernel_norm,
        )
    model = make_model(args, weights, len(images.classes), device)
    batches = data.Batches(images, args.batch_size, normalization, augmentation=None)
    meter = train.infer(batches, model, meter=evaluation.Meter())
    logger.info("genotype = %s", args.arch)
    logger.info("%.2f M weights", utils.count_parameters_in_MB(model))
    log_results(meter, images)
    if folder:
        facts = dict(script="test.py", args=vars(parser.parse_args()), settings=vars(args), epoch=state.get("epoch"))
        save_results(folder, meter, images, facts | run_folder.environment(device))


def make_model(args, weights, classes, device):
    model = train.make_network(args, classes)
    checkpoint.load_weights(model, weights, args.model_path)
    return model.to(device, memory_format=torch.channels_last)


@torch.no_grad()
def print_predictions(args, weights, state, device):
    """Print a line for each of --images: its likeliest classes, with their probabilities."""
    if not state:
        raise utils.UserError(f"--images needs a run of train.py, which knows its classes; {args.model_path} is none")
    if args.output is not None:
        raise utils.UserError("--output is for the results of a test: leave it out with --images")
    classes = state["classes"]
    pictures = data.load_pictures(args.images, args, classes, device)
    model = make_model(args, weights, len(classes), device).eval()
    batches = data.Batches(pictures, args.batch_size, data.Normalization(*state["normalization"]), augmentation=None)
    names = iter(pictures.names)
    for input, _ in batches:
        for logits, name in zip(model(input)[0].cpu(), names):  # noqa: B905  the names go on with the next batch
            ranked = logits.softmax(0).sort(descending=True, stable=True)
            pairs = zip(ranked.values.tolist()[:_TOP], ranked.indices.tolist(), strict=False)
            found = ", ".join(f"{classes[k]} {100 * share:.1f}%" for share, k in pairs)
            print(f"{utils.readable(name)}: {found if logits.isfinite().all() else 'its logits are not finite'}")


def log_results(meter, images):
    """Log the numbers of a test, and the images that it does not go well with."""
    top5 = f", top-5 {meter.top5:.2f}%" if meter.has_top5 else ""
    logger.info("test loss %.4f, top-1 %.2f%%%s on %d images", meter.loss, meter.top1, top5, len(images))
    lost = (~meter.predictions.finite).nonzero()[0]
    if len(lost):
        what = "%d of %d test images have logits that are not finite, and count as misses:"
        logger.warning(what, len(lost), meter.images)
        for k in lost[:_WORST]:
            logger.info("  %s", utils.readable(images.names[k]))
    explosion = meter.explosion("test")
    if explosion:
        logger.warning("%s; the worst:", explosion)
        for k in meter.extreme()[:_WORST]:
            logger.info("  loss %.4g  %s", meter.losses[k], utils.readable(images.names[k]))


def results_folder(args):
    """Where the results of a test go, or None."""
    run = Path(args.model_path)
    if args.output is None and not run.is_dir():
        return None
    folder = run / report.TEST if args.output is None else Path(args.output)
    if folder.exists() and not folder.is_dir():
        raise utils.UserError(f"{folder} is no folder: name another with --output")
    if (folder / "config.json").exists():
        raise utils.UserError(f"--output {folder} is a run folder; results go to its {report.TEST}/: leave it out")
    return folder


def save_results(folder, meter, images, facts):
    """Write tables, pictures and a page; the page of a run has its test in it."""
    with utils.filling(folder):
        evaluation.write(folder, meter, images, facts | {"data": {"test": data.fingerprint(images)}})
    run = folder.parent if folder.name == report.TEST else folder
    of_run = run != folder and (run / "config.json").is_file()
    logger.info("tables and pictures: %s", folder)
    report.conclude(*((run, train.build_parser()) if of_run else (folder, build_parser())))


if __name__ == "__main__":
    utils.run_script(main)

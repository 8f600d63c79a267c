"""Evaluate a trained network on the test images.

python test.py --model_path runs/train-EXP-20250101-120000              # a run of train.py
python test.py --model_path weights.pt --arch DARTS_V2 --auxiliary      # a published state dict
"""

import argparse
import functools
import logging
from pathlib import Path

import threads

if __name__ == "__main__":
    threads.wait_asleep()  # before PyTorch is imported

import torch
import torch.nn as nn

import data
import genotypes
import run_folder
import utils
from model import NetworkCIFAR
from train import add_network_arguments, infer

logger = logging.getLogger("darts.test")


def build_parser():
    parser = utils.ArgumentParser(
        description="Evaluate a trained network. A run of train.py brings its own settings; those given here win."
    )
    group = parser.add_argument_group("model")
    group.add_argument("--model_path", required=True, help="a run folder, its checkpoint.pt, or a state dict")
    add_network_arguments(parser)
    group = utils.add_data_arguments(parser)
    group.add_argument("--batch_size", type=utils.number(int, low=1), default=96, help="images at once")
    group.add_argument("--seed", type=utils.number(int, low=0), default=0, help="draws the --subset")
    utils.add_device_arguments(parser)
    return parser


def load_run(parser, argv=None):
    """The settings, the weights and, of a run of train.py, the whole checkpoint (else an empty dict)."""
    args = parser.parse_args(argv)
    path = Path(args.model_path)
    if path.is_dir():
        path = path / "checkpoint.pt"
        if not path.exists():
            raise utils.UserError(f"--model_path {args.model_path}: no checkpoint.pt in that folder")
    state = utils.load_checkpoint(path)
    if not isinstance(state, dict):
        raise utils.UserError(f"{path} holds a {type(state).__name__}, not a checkpoint or a state dict")
    if "arch_optimizer" in state:
        raise utils.UserError(f"{path} is a search: train what it found (python train.py --arch {path.parent}) first")
    if not {"model", "args", "normalization", "classes"} <= set(state):
        return args, state, {}
    settings = vars(args) | {k: v for k, v in run_folder.settings(state["args"]).items() if hasattr(args, k)}
    return argparse.Namespace(**(settings | parser.given(argv))), state["model"], state


def main():
    parser = build_parser()
    args, weights, state = load_run(parser)
    device = utils.pick_device(args)
    utils.log_device(device)
    images = data.load(args.dataset, args.data, False, args.image_size, args.subset, args.seed, device)
    if state:
        data.check_classes(images, state["classes"])
        normalization = data.Normalization(*state["normalization"])
        if state["epoch"] == 0:
            logger.warning("%s comes from the first epoch of its run: it is hardly trained", args.model_path)
    else:
        load_train = functools.partial(data.load, args.dataset, args.data, True, args.image_size)
        normalization = data.Normalization.of(args.dataset, load_train)
    genotype = genotypes.parse(args.arch)
    if not state and "kernel_norm" not in parser.given() and "invo" in args.arch:
        logger.warning(
            "%s does not say what bounds the kernels of its involutions: --kernel_norm %s is assumed; weights of "
            "the involution authors' form need --kernel_norm none",
            args.model_path,
            args.kernel_norm,
        )
    classes = len(images.classes)
    model = NetworkCIFAR(args.init_channels, classes, args.layers, args.auxiliary, genotype, args.kernel_norm)
    utils.load_weights(model, weights, args.model_path)
    batches = data.Batches(images, args.batch_size, normalization, augmentation=None)
    meter = infer(batches, model.to(device, memory_format=torch.channels_last), nn.CrossEntropyLoss())
    logger.info("genotype = %s", genotypes.format(genotype))
    logger.info("%.2f M weights", utils.count_parameters_in_MB(model))
    logger.info(
        "test loss %.4f, top-1 %.2f%%, top-5 %.2f%% on %d images", meter.loss, meter.top1, meter.top5, len(images)
    )


if __name__ == "__main__":
    utils.run_script(main)

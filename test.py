"""Evaluate a trained network on the test images.

python test.py --model_path runs/train-EXP-20250101-120000              # a run of train.py
python test.py --model_path weights.pt --arch DARTS_V2 --auxiliary      # a published state dict
python test.py --model_path imagenet.pt --arch DARTS_V2 --auxiliary --init_channels 48 --layers 14 --image_size 224 \
    --dataset folder --data FOLDER                                      # the published one of ImageNet
"""

import argparse
import functools
import logging
from pathlib import Path

import threads

if __name__ == "__main__":
    threads.choose_waiting()  # before PyTorch is imported

import torch

import checkpoint
import data
import settings
import train
import utils

logger = logging.getLogger("darts.test")

_WORST = 10  # images that are named at most


def build_parser():
    parser = utils.ArgumentParser(
        description="Evaluate a trained network. A run of train.py brings its own settings; those given here win."
    )
    group = parser.add_argument_group("model")
    group.add_argument("--model_path", required=True, help="a run folder, its checkpoint.pt, or a state dict")
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
    images = data.load_as(args, False, device)
    if state:
        data.check_classes(images, state["classes"])
        normalization = data.Normalization(*state["normalization"])
        if state["epoch"] == 0:
            logger.warning("%s comes from the first epoch of its run: it is hardly trained", args.model_path)
    else:
        load_train = functools.partial(data.load, args.dataset, args.data, True, args.image_size)
        normalization = data.Normalization.of(args.dataset, load_train)
    if not state and "kernel_norm" not in parser.given() and "invo" in args.arch:
        logger.warning(
            "%s does not say what bounds the kernels of its involutions: --kernel_norm %s is assumed; weights of "
            "the involution authors' form need --kernel_norm none",
            args.model_path,
            args.kernel_norm,
        )
    classes = len(images.classes)
    model = train.make_network(args, classes)
    checkpoint.load_weights(model, weights, args.model_path)
    batches = data.Batches(images, args.batch_size, normalization, augmentation=None)
    meter = train.infer(batches, model.to(device, memory_format=torch.channels_last))
    logger.info("genotype = %s", args.arch)
    logger.info("%.2f M weights", utils.count_parameters_in_MB(model))
    top5 = f", top-5 {meter.top5:.2f}%" if meter.has_top5 else ""
    logger.info("test loss %.4f, top-1 %.2f%%%s on %d images", meter.loss, meter.top1, top5, len(images))
    if meter.finite_images < meter.images:
        lost = meter.images - meter.finite_images
        logger.warning("%d of %d test images have logits that are not finite, and count as misses", lost, meter.images)
    explosion = meter.explosion("test")
    if explosion:
        logger.warning("%s; the worst:", explosion)
        for k in meter.extreme()[:_WORST]:
            logger.info("  loss %.4g  %s", meter.losses[k], images.names[k])


if __name__ == "__main__":
    utils.run_script(main)

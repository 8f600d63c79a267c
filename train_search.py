"""Search for an architecture: train a supernet's weights and its alphas in turn (arXiv 1806.09055, Algorithm 1).

python train_search.py --unrolled                                       # CIFAR-10, second order
python train_search.py --unrolled --dataset digits --epochs 3           # a first try, no download
python train_search.py --resume runs/search-EXP-20250101-120000         # go on where a run was stopped
torchrun --nproc_per_node 8 train_search.py --unrolled                  # the same on eight GPUs
"""

import gc
import logging

import threads

if __name__ == "__main__":
    threads.choose_waiting()  # before PyTorch is imported

import torch
import torch.nn as nn

import data
import genotypes
import progress
import run_folder
import settings
import utils
from architect import Architect
from gradients import Gradients
from model_search import Network
from processes import Processes

logger = logging.getLogger("darts.search")


def train(run, train_batches, search_batches, architect, optimizer, args):
    """The steps that are left of an epoch: alphas on the search images, then weights on the training images."""
    gradients, weights = architect.gradients, architect.gradients.weights
    architect.model.train()
    lr = optimizer.param_groups[0]["lr"]
    for input, target in run.steps(train_batches):
        input_search, target_search = search_batches.batch(run.epoch, run.step)
        try:
            architect.step(input, target, input_search, target_search, lr, optimizer, args.unrolled)
        except FloatingPointError as error:
            raise run.diverged(error, run.step + 1) from None

        loss, logits, grads = gradients("weights", input, target)
        for w, grad in zip(weights, grads, strict=True):
            w.grad = grad
        nn.utils.clip_grad_norm_(weights, args.grad_clip)
        optimizer.step()
        run.record(loss, logits, target)


@torch.no_grad()
def infer(run, batches, model):
    """Loss and accuracy of the supernet on plain images, as a meter."""
    model.eval()
    meter = utils.Evaluation()
    for input, target in progress.counted(batches, "validation"):
        if len(target):
            meter.add(model(input), target)
        run.stop_if_asked()
    return meter.merged(batches.team, len(batches.labels))


def load_data(args, device, team):
    """Batches for the weights and for the alphas, two halves of the training images, class names, and a fingerprint.

    Test images are not read.
    """
    with team.in_turn():
        images = data.load_as(args, True, device)
    normalization = data.Normalization.of(args.dataset, lambda: images)
    cutout_length = args.cutout_length if args.cutout else 0
    augmentation = data.Augmentation.of(args.dataset, images.pixels.shape[1], cutout_length)
    parts = data.split(images, args.train_portion, args.seed)
    for part, of in zip(parts, ("train_portion", "rest of the training images"), strict=True):
        if args.batch_size > len(part):
            raise utils.UserError(f"--batch_size {args.batch_size} is larger than the {of}: {len(part)} images")
    train_batches, search_batches = (
        data.Batches(part, args.batch_size, normalization, augmentation, (args.seed, stream), team)
        for stream, part in enumerate(parts)
    )
    return train_batches, search_batches, images.classes, data.fingerprint(images)


def count_skips(genotype):
    """Skip connections in the normal cell, and a warning if they have taken it over (arXiv 1909.09656)."""
    skips = sum(primitive == "skip_connect" for primitive, _ in genotype.normal)
    if 2 * skips > len(genotype.normal):
        logger.warning(
            "%d of the %d operations of the normal cell are skip_connect: the search may be collapsing; "
            "fewer epochs or a larger --arch_weight_decay may help",
            skips,
            len(genotype.normal),
        )
    return skips


def build_parser():
    parser = utils.ArgumentParser(description="Search for an architecture with DARTS.")
    utils.add_data_arguments(parser)
    group = parser.add_argument_group("augmentation and split")
    group.add_argument("--cutout", action="store_true", help="cut a square out of every training image")
    group.add_argument("--cutout_length", type=utils.number(int, low=2), default=16, help="its side, in pixels")
    group.add_argument(
        "--train_portion",
        type=utils.number(float, above=0, below=1),
        default=0.5,
        help="share of the training images that trains the weights; the rest trains the alphas",
    )
    group = parser.add_argument_group("supernet")
    group.add_argument(
        "--init_channels", type=utils.number(int, low=1, high=4096), default=16, help="channels of the first cells"
    )
    group.add_argument(
        "--layers",
        type=utils.number(int, low=3, high=1000),  # with fewer cells, none is a normal one
        default=8,
        help="number of cells, two of which reduce",
    )
    group.add_argument("--search_space", choices=genotypes.SEARCH_SPACES, default="involution", help="primitives")
    utils.add_kernel_norm_argument(group)
    group = parser.add_argument_group("weights")
    group.add_argument("--epochs", type=utils.number(int, low=1), default=50, help="passes over the training images")
    group.add_argument("--batch_size", type=utils.number(int, low=2), default=64, help="images a step")
    group.add_argument("--learning_rate", type=utils.number(float, above=0), default=0.025, help="initial, of SGD")
    group.add_argument("--learning_rate_min", type=utils.number(float, low=0), default=0.001, help="final (cosine)")
    group.add_argument("--momentum", type=utils.number(float, low=0, below=1), default=0.9, help="of SGD")
    group.add_argument("--weight_decay", type=utils.number(float, low=0), default=3e-4, help="of SGD")
    group.add_argument("--grad_clip", type=utils.number(float, above=0), default=5.0, help="largest gradient norm")
    group = parser.add_argument_group("alphas")
    group.add_argument("--unrolled", action="store_true", help="second order: look one step of the weights ahead")
    group.add_argument("--arch_learning_rate", type=utils.number(float, above=0), default=3e-4, help="of Adam")
    group.add_argument("--arch_weight_decay", type=utils.number(float, low=0), default=1e-3, help="of Adam")
    group = utils.add_device_arguments(parser)
    group.add_argument("--amp", action="store_true", help="bfloat16 but for the finite differences and validation")
    group.add_argument("--cuda_graph", action="store_true", help="replay a step as CUDA graphs: no launch overhead")
    utils.add_process_arguments(parser)
    settings.add_arguments(parser, seed=2)
    return parser


def main():
    team = Processes.start()
    args = settings.parse_args(build_parser(), team.arguments())
    device = utils.pick_device(args, team)
    utils.check_processes(args, team, device)
    if args.cuda_graph and device.type != "cuda":
        if not args.resume:
            raise utils.UserError(f"--cuda_graph needs a CUDA device, and this run is on {device.type}: leave it out")
        logger.warning("no CUDA graphs on this device: going on without")
        args.cuda_graph = False
    team.join(device, args.timeout)
    torch.manual_seed(args.seed)
    train_batches, search_batches, classes, fingerprint = load_data(args, device, team)
    primitives = genotypes.SEARCH_SPACES[args.search_space]
    form = dict(primitives=primitives, kernel_norm=args.kernel_norm)
    model = Network(args.init_channels, len(classes), args.layers, nn.CrossEntropyLoss(), **form)
    model = team.share_batch_norm(model) if args.sync_bn else model
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), args.learning_rate, momentum=args.momentum, weight_decay=args.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs, eta_min=args.learning_rate_min)
    architect = Architect(model, args, Gradients(model, args.amp, args.cuda_graph, team))
    parts = dict(model=model, optimizer=optimizer, scheduler=scheduler, arch_optimizer=architect.optimizer)

    with run_folder.Run("search", args, device, parts, team, data={"train": fingerprint}) as run:
        logger.info("supernet of %.2f M weights, %s space", utils.count_parameters_in_MB(model), args.search_space)
        if run.history:
            run.report(genotypes.parse(run.history[-1]["genotype"]))  # a kill may have come before
        gc.freeze()  # as in train.py
        while run.epoch < args.epochs:
            train(run, train_batches, search_batches, architect, optimizer, args)
            valid = infer(run, search_batches, model)
            genotype = model.genotype()
            run.end_epoch(valid, skip_connects=count_skips(genotype), genotype=genotypes.format(genotype))
            run.report(genotype)
        logger.info("searched; now: %s", run_folder.command("train.py", "--arch", run.folder))
    team.leave()


if __name__ == "__main__":
    utils.run_script(main)

"""Search for an architecture: train a supernet's weights and its alphas in turn (arXiv 1806.09055, Algorithm 1).

python train_search.py --unrolled                                       # CIFAR-10, second order
python train_search.py --unrolled --dataset digits --epochs 3           # a first try, no download
python train_search.py --unrolled --dataset folder --data FOLDER --image_size 96    # cells see a quarter: 24 pixels
python train_search.py --resume runs/search-EXP-20250101-120000         # go on where a run was stopped
torchrun --nproc_per_node 8 train_search.py --unrolled                  # the same on eight GPUs
"""

import functools
import gc
import logging

from runtime import threads

if __name__ == "__main__":
    threads.choose_waiting()  # before PyTorch is imported

import torch
import torch.nn as nn

import data
import diagnostics
import genotypes
import report
import run_folder
import utils
from architect import Architect
from gradients import Gradients
from model_search import STEM_STRIDES, Network
from operations import LARGEST_SMALL_IMAGE
from runtime import schedule, settings
from runtime.processes import Processes

logger = logging.getLogger("darts.search")


def train(run, train_batches, search_batches, architect, optimizer, args):
    """The steps that are left of an epoch: alphas on the search images, then weights on the training images."""
    gradients, weights = architect.gradients, architect.gradients.weights
    architect.model.train()
    lr = optimizer.param_groups[0]["lr"]
    for input, target in run.steps(train_batches, search_batches):
        input_search, target_search = search_batches.batch(run.epoch, run.step)
        try:
            architect.step(input, target, input_search, target_search, lr, optimizer, args.unrolled)
        except FloatingPointError as error:
            raise run.diverged(error, run.step + 1) from None

        loss, logits, grads = gradients("weights", input, target)
        for w, grad in zip(weights, grads, strict=True):
            w.grad = grad
        norm = nn.utils.clip_grad_norm_(weights, args.grad_clip)
        optimizer.step()
        run.record(loss, logits, target, norm)


def load_data(args, device, team):
    """Batches for the weights and for the alphas, two halves of the training images, class names, and a fingerprint.

    Test images are not read.
    """
    with team.in_turn():
        images = data.load_as(args, True, device)
    normalization = data.Normalization.of(args.dataset, lambda: images)
    augmentation = data.Augmentation.of_flags(args)
    parts = data.split(images, args.train_portion, args.seed)
    for part, of in zip(parts, ("train_portion", "rest of the training images"), strict=True):
        if args.batch_size > len(part):
            raise utils.UserError(f"--batch_size {args.batch_size} is larger than the {of}: {len(part)} images")
    of_all = dict(batch_size=args.batch_size, normalization=normalization, augmentation=augmentation, team=team)
    train_batches = data.Batches(parts[0], key=(args.seed, 0), **of_all)
    search_batches = data.Batches(parts[1], key=(args.seed, 1), steps=len(train_batches), **of_all)
    return train_batches, search_batches, images.classes, data.fingerprint(images)


def measure_sharpness(run, search_batches, gradients):
    """The dominant and the largest eigenvalue of the Hessian of the alphas, as columns of metrics.csv."""
    groups = diagnostics.take_groups(search_batches)
    eigenvalue = diagnostics.dominant_eigenvalue(gradients, groups, run.stop_if_asked)
    logger.info("dominant eigenvalue of the Hessian of the validation loss by the alphas: %s", eigenvalue)
    return {"eigenvalue": eigenvalue.value, "eigenvalue_largest": eigenvalue.largest}


def choose_interval(args, steps):
    """Epochs between two eigenvalues, 0 for none.

    Raises:
        UserError: too few of them for --early_stop eigenvalue.
    """
    of_eigenvalue = args.early_stop == "eigenvalue"
    if of_eigenvalue and args.epochs < diagnostics.FIRST_STOP:
        logger.warning("--early_stop eigenvalue cannot stop a search before epoch %d", diagnostics.FIRST_STOP)
    if args.eigenvalue_every is None:
        return 1 if of_eigenvalue else diagnostics.usual_interval(steps, args.unrolled)
    if of_eigenvalue and not 1 <= args.eigenvalue_every <= diagnostics.WINDOW:
        raise utils.UserError(
            f"--early_stop eigenvalue compares means over {diagnostics.WINDOW} epochs: it needs --eigenvalue_every 1 "
            f"to {diagnostics.WINDOW}, got {args.eigenvalue_every}"
        )
    return args.eigenvalue_every


def is_measured_after(epoch, every):
    """Whether an eigenvalue is measured after an epoch (counted from 0)."""
    return every > 0 and (epoch + 1) % every == 0


def steps_after(batches, every, unrolled, epoch):
    """How many steps take as long as what comes after those of an epoch: a validation, an eigenvalue if it is due."""
    # a step passes 13 batches forward or back if unrolled, else 5; a validation passes each batch forward
    validation = batches / (13 if unrolled else 5)
    return validation + is_measured_after(epoch, every) * diagnostics.steps_of_eigenvalue(unrolled)


def report_genotype(run, args):
    """Write the genotype that the epochs so far end with, and say so if it is that of an early stop."""
    row = diagnostics.final_row(run.history)
    if run.stopped:
        what = "stopped early by --early_stop %s after epoch %d of %d; the genotype is that of epoch %d"
        logger.info(what, args.early_stop, run.epoch, args.epochs, row["epoch"])
    run.report(genotypes.parse(row["genotype"]))


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
    utils.add_augmentation_arguments(group)
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
    group.add_argument(
        "--stem_stride",
        type=int,
        choices=STEM_STRIDES,
        help="by which the stem reduces images before the cells, with strided convolutions where it is not 1 (default: "
        f"4 for images of more than {LARGEST_SMALL_IMAGE} pixels, else 1)",
    )
    utils.add_kernel_norm_argument(group)
    group = parser.add_argument_group("weights")
    group.add_argument("--epochs", type=utils.number(int, low=1), default=50, help="passes over the training images")
    group.add_argument("--batch_size", type=utils.number(int, low=2), default=64, help="images a step")
    group.add_argument("--learning_rate", type=utils.number(float, above=0), default=0.025, help="initial, of SGD")
    group.add_argument("--learning_rate_min", type=utils.number(float, low=0), default=0.001, help="final (cosine)")
    group.add_argument("--momentum", type=utils.number(float, low=0, below=1), default=0.9, help="of SGD")
    group.add_argument("--weight_decay", type=utils.number(float, low=0), default=3e-4, help="of SGD")
    group.add_argument("--grad_clip", type=utils.number(float, above=0), default=5.0, help="largest gradient norm")
    group.add_argument(
        "--drop_path_prob",
        type=utils.number(float, low=0, below=1),
        default=0.0,
        help="probability of dropping an edge of the supernet for an image, reached linearly over the epochs",
    )
    group = parser.add_argument_group("alphas")
    group.add_argument("--unrolled", action="store_true", help="second order: look one step of the weights ahead")
    group.add_argument("--arch_learning_rate", type=utils.number(float, above=0), default=3e-4, help="of Adam")
    group.add_argument("--arch_weight_decay", type=utils.number(float, low=0), default=1e-3, help="of Adam")
    group = parser.add_argument_group("watching and stopping")
    group.add_argument(
        "--eigenvalue_every",
        metavar="EPOCHS",
        type=utils.number(int, low=0),
        help="measure the sharpness of the minimum in the alphas after every so many epochs, 0: never (default: as "
        "often as takes about 5%% of the time; at the sizes of the paper 1, and 2 in first order)",
    )
    group.add_argument(
        "--early_stop",
        choices=diagnostics.RULES,
        default="none",
        help="eigenvalue: when the largest eigenvalue rises, with the genotype of before (RobustDARTS); skips: when "
        "the normal cell has two skip connections, with the genotype of the epoch before (DARTS+)",
    )
    group = utils.add_device_arguments(parser)
    group.add_argument("--amp", action="store_true", help="bfloat16 but for the finite differences and validation")
    group.add_argument("--cuda_graph", action="store_true", help="replay a step as CUDA graphs: no launch overhead")
    utils.add_process_arguments(parser)
    settings.add_arguments(parser, seed=2)
    return parser


def parse_args(argv=None):
    """The arguments, with the stem for images of this size.

    Raises:
        UserError: as settings.parse_args; an early stop by skip connections in a space without them; images of which
            the supernet leaves nothing.
    """
    args = settings.parse_args(build_parser(), argv)
    if args.early_stop == "skips" and "skip_connect" not in genotypes.SEARCH_SPACES[args.search_space]:
        raise utils.UserError(
            f"--early_stop skips counts skip connections, and space {args.search_space} has none: "
            "use --early_stop eigenvalue, or none"
        )
    size = data.image_size(args)
    if args.stem_stride is None:
        args.stem_stride = 4 if size > LARGEST_SMALL_IMAGE else 1
    smallest = 4 * args.stem_stride  # two cells halve what the stem leaves
    if size < smallest:
        raise utils.UserError(
            f"the supernet with --stem_stride {args.stem_stride} reduces images by {smallest}, which leaves nothing of "
            f"{size} pixels; use --image_size {smallest} or more"
        )
    return args


def check_cuda_graph(args, device):
    """Leave out --cuda_graph where a run is resumed without a GPU.

    Raises:
        UserError: a new run without a GPU; steps that a recording does not repeat.
    """
    if not args.cuda_graph:
        return
    if device.type != "cuda":
        if not args.resume:
            raise utils.UserError(f"--cuda_graph needs a CUDA device, and this run is on {device.type}: leave it out")
        logger.warning("no CUDA graphs on this device: going on without")
        args.cuda_graph = False
    elif args.drop_path_prob > 0 or "noise" in genotypes.SEARCH_SPACES[args.search_space]:
        raise utils.UserError("--cuda_graph records a step once: leave it out with --drop_path_prob, and in space s4")


def main():
    team = Processes.start()
    args = parse_args(team.arguments())
    device = utils.pick_device(args, team)
    utils.check_processes(args, team, device)
    check_cuda_graph(args, device)
    team.join(device, args.timeout)
    torch.manual_seed(args.seed)
    train_batches, search_batches, classes, fingerprint = load_data(args, device, team)
    primitives = genotypes.SEARCH_SPACES[args.search_space]
    form = dict(primitives=primitives, kernel_norm=args.kernel_norm, stem_stride=args.stem_stride)
    model = Network(args.init_channels, len(classes), args.layers, nn.CrossEntropyLoss(), **form)
    model = team.share_batch_norm(model) if args.sync_bn else model
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), args.learning_rate, momentum=args.momentum, weight_decay=args.weight_decay
    )
    scheduler = schedule.make(optimizer, args.epochs, lowest=args.learning_rate_min)
    architect = Architect(model, args, Gradients(model, args.amp, args.cuda_graph, team))
    every = choose_interval(args, len(train_batches))
    parts = dict(model=model, optimizer=optimizer, scheduler=scheduler, arch_optimizer=architect.optimizer)

    with run_folder.Run("search", args, device, parts, team, data={"train": fingerprint}) as run:
        logger.info("supernet of %.2f M weights, %s space", utils.count_parameters_in_MB(model), args.search_space)
        if run.history:
            report_genotype(run, args)  # a kill may have come before
        run.observer.pace.after = functools.partial(steps_after, len(search_batches), every, args.unrolled)
        gc.freeze()  # as in train.py
        while run.epoch < args.epochs and not run.stopped:
            if run.leads:
                report.update(run.folder, build_parser())
            model.drop_path_prob = args.drop_path_prob * run.epoch / args.epochs
            train(run, train_batches, search_batches, architect, optimizer, args)
            valid = utils.infer(search_batches, model, after_batch=run.stop_if_asked)
            genotype = model.genotype()
            more = dict(skip_connects=count_skips(genotype), **run.observer.entropies())
            if is_measured_after(run.epoch, every):
                more |= measure_sharpness(run, search_batches, architect.gradients)
            stop = diagnostics.early_stop(args.early_stop, [*run.history, more])
            if stop:
                logger.info("%s", stop.why)
                more["kept_epoch"] = stop.kept_epoch
            run.end_epoch(valid, **more, genotype=genotypes.format(genotype))
            report_genotype(run, args)
        run.observer.finish()
        if run.leads:
            report.conclude(run.folder, build_parser())
        logger.info("searched; now: %s", run_folder.command("train.py", "--arch", run.folder))
    team.leave()


if __name__ == "__main__":
    utils.run_script(main)

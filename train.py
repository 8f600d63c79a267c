"""Train a genotype from scratch.

python train.py --auxiliary --cutout --arch DARTS                       # CIFAR-10, as in the DARTS paper
python train.py --arch runs/search-EXP-20250101-120000                  # what a search found
python train.py --arch "Genotype(normal=[('sep_invo_3x3', 1), ...], ...)"
python train.py --dataset folder --data FOLDER --image_size 224 …        # the network for large images, see README
python train.py --resume runs/train-EXP-20250101-120000                 # go on where a run was stopped
torchrun --nproc_per_node 8 train.py --auxiliary --cutout --arch DARTS  # on eight GPUs
"""

import gc
import logging

from runtime import threads

if __name__ == "__main__":
    threads.choose_waiting()  # before PyTorch is imported

import torch
import torch.nn as nn

import data
import genotypes
import report
import run_folder
import utils
from gradients import running_statistics
from images import augment
from model import NETWORKS, default_network
from operations import LARGEST_SMALL_IMAGE
from runtime import memory, schedule, settings
from runtime.processes import ALONE, Processes

logger = logging.getLogger("darts.train")


def train(run, batches, model, forward, criterion, optimizer, args):
    """The steps that are left of an epoch; `forward` is the model, or what computes the same."""
    model.train()
    size = size_of_epoch(args, run.epoch)
    weights, statistics = [*model.parameters()], running_statistics(model)
    for input, target in run.steps(batches):
        input = augment.reduce(input, size)
        memory.clear_gradients(optimizer)
        with torch.autocast(input.device.type, torch.bfloat16, enabled=args.amp):
            logits, logits_aux = forward(input)
        logits = logits.float()
        loss = criterion(logits, target)
        if args.auxiliary:
            loss = loss + args.auxiliary_weight * criterion(logits_aux.float(), target)
        loss.backward()
        loss = loss.detach()
        grads = [w.grad for w in weights if w.grad is not None]
        run.team.mean_([loss, *grads, *statistics], len(target))
        norm = nn.utils.clip_grad_norm_(weights, args.grad_clip)
        optimizer.step()
        run.record(loss, logits.detach(), target, norm)


def infer(batches, model, after_batch=lambda: None, meter=None):
    """As utils.infer; the auxiliary head takes no part."""
    return utils.infer(batches, model, lambda output: output[0], after_batch, meter)


def load_data(args, device, team=ALONE):
    """Augmented batches of the training images, plain ones of those that are measured, what a checkpoint keeps.

    Measured are the test images; with --train_portion, the rest of the training images, and no test image is read.
    """
    with team.in_turn():
        images = train_images = data.load_as(args, True, device)
    fingerprints = {"train": data.fingerprint(images)}
    if args.train_portion < 1:
        train_images, measured = data.split(images, args.train_portion, args.seed)
    else:
        measured = data.load_as(args, False, device)
        data.check_classes(measured, images.classes)
        fingerprints["test"] = data.fingerprint(measured)
    count = len(train_images)
    if args.batch_size > count:
        raise utils.UserError(f"--batch_size {args.batch_size} is larger than the {count} training images")
    check_auxiliary(args)
    normalization = data.Normalization.of(args.dataset, lambda: images)
    augmentation = data.Augmentation.of_flags(args)
    of_all = dict(batch_size=args.batch_size, normalization=normalization, team=team)
    train_batches = data.Batches(train_images, augmentation=augmentation, key=(args.seed, 0), **of_all)
    batches = data.Batches(measured, augmentation=None, **of_all)
    facts = dict(normalization=tuple(normalization), classes=images.classes, data=fingerprints)
    return train_batches, batches, facts


def size_of_epoch(args, epoch):
    """The side of the training images, in pixels."""
    size = data.image_size(args)
    return schedule.image_size(epoch, args.epochs, args.first_image_size or size, size)


def check_auxiliary(args):
    """Raise UserError if the images are too small for the auxiliary head that is asked for."""
    size, smallest = data.image_size(args), NETWORKS[args.network].smallest_image(args.layers, args.auxiliary)
    if args.auxiliary and size < smallest:
        raise utils.UserError(
            f"--auxiliary needs images of at least {smallest} pixels with --network {args.network} and --layers "
            f"{args.layers}, got {size}; leave --auxiliary out or use --image_size {smallest}"
        )


def make_network(args, classes):
    """The network that the flags of a script ask for.

    Raises:
        UserError: images that are too small for it.
    """
    size, kind = data.image_size(args), NETWORKS[args.network]
    smallest = kind.smallest_image(args.layers)
    if size < smallest:
        instead = "--network cifar, or " if args.network == "imagenet" else ""
        raise utils.UserError(
            f"--network {args.network} with --layers {args.layers} reduces images by {smallest}, which leaves nothing "
            f"of {size} pixels; use {instead}--image_size {smallest} or more"
        )
    genotype = genotypes.parse(args.arch)
    return kind(args.init_channels, classes, args.layers, args.auxiliary, genotype, args.kernel_norm)


def make_criterion(args):
    """What is trained on; evaluation is without smoothing."""
    return nn.CrossEntropyLoss(label_smoothing=args.label_smooth)


def choose_network(args):
    """Fill in the --network that was not given: by the size of the images."""
    args.network = args.network or default_network(data.image_size(args))


def add_network_arguments(parser):
    """The arguments that say which network; returns their group."""
    group = add_form_arguments(parser)
    group.add_argument(
        "--arch",
        type=utils.user_value(lambda text: genotypes.format(genotypes.parse(text))),
        default="DARTS",
        help=f"a name ({', '.join(genotypes.NAMED)}), a Genotype(...) expression, a run folder (RUN@EPOCH: as it was "
        "after that epoch) or a genotype file; "
        f"{genotypes.WHICH_DARTS}",
    )
    return group


def add_form_arguments(parser):
    """The arguments that say what network is made of a genotype; returns their group."""
    group = parser.add_argument_group("network")
    group.add_argument(
        "--init_channels", type=utils.number(int, low=1, high=4096), default=36, help="channels of the first cells"
    )
    group.add_argument("--layers", type=utils.number(int, low=1, high=1000), default=20, help="number of cells")
    group.add_argument(
        "--network",
        choices=NETWORKS,
        help="cifar: cells see the whole image; imagenet: an eighth of it, after three strided convolutions (default: "
        f"imagenet for images of more than {LARGEST_SMALL_IMAGE} pixels)",
    )
    group.add_argument("--auxiliary", action="store_true", help="with the auxiliary head, used in training only")
    utils.add_kernel_norm_argument(group)
    return group


def _accept_random(group):
    """Let --arch be `random` too: a genotype that `parse_args` draws from --search_space by --seed."""
    arch = next(action for action in group._group_actions if action.dest == "arch")
    parse, arch.help = arch.type, f"{arch.help}; or random, one of --search_space by --seed"
    arch.type = lambda text: text if text == "random" else parse(text)
    group.add_argument(
        "--search_space", choices=genotypes.SEARCH_SPACES, default="involution", help="what --arch random draws from"
    )


def parse_args(argv=None):
    """The arguments, with the genotype that `--arch random` stands for and the network.

    Raises:
        UserError: as settings.parse_args; a warm-up that never ends.
    """
    args = settings.parse_args(build_parser(), argv)
    choose_network(args)
    if args.warmup_epochs >= args.epochs:
        raise utils.UserError(f"--warmup_epochs {args.warmup_epochs} must be less than --epochs {args.epochs}")
    _check_first_image_size(args)
    if args.arch == "random":
        args.arch = genotypes.format(genotypes.sample(genotypes.SEARCH_SPACES[args.search_space], args.seed))
    return args


def _check_first_image_size(args):
    first, last = args.first_image_size, data.image_size(args)
    smallest = NETWORKS[args.network].smallest_image(args.layers, args.auxiliary)
    if first and not min(smallest, last) <= first <= last:
        raise utils.UserError(
            f"--first_image_size {first} must be from {min(smallest, last)}, the least that this network takes, to the "
            f"{last} pixels of the images"
        )


def build_parser():
    parser = utils.ArgumentParser(description="Train a genotype from scratch.")
    group = utils.add_data_arguments(parser)
    group.add_argument(
        "--train_portion",
        type=utils.number(float, above=0, high=1),
        default=1.0,
        help="share of the training images that trains; the rest is measured after every epoch in place of the test "
        "images, which are then not read: for what chooses between genotypes or settings",
    )
    group = parser.add_argument_group("augmentation and regularization")
    utils.add_augmentation_arguments(group)
    group.add_argument(
        "--first_image_size",
        type=utils.number(int, low=1),
        help="train on images of this many pixels at first, that grow over three quarters of the epochs, in steps of 4 "
        "(default: on whole ones at once)",
    )
    group.add_argument(
        "--drop_path_prob",
        type=utils.number(float, low=0, below=1),
        default=0.2,
        help="probability of dropping a path, reached linearly over the epochs",
    )
    group.add_argument("--auxiliary_weight", type=utils.number(float, low=0), default=0.4, help="of its loss")
    group.add_argument(
        "--label_smooth",
        type=utils.number(float, low=0, below=1),
        default=0.0,
        help="share of a label that is spread over all classes, in training",
    )
    _accept_random(add_network_arguments(parser))
    group = parser.add_argument_group("weights")
    group.add_argument("--epochs", type=utils.number(int, low=1), default=600, help="passes over the training images")
    group.add_argument("--batch_size", type=utils.number(int, low=2), default=96, help="images a step")
    group.add_argument("--learning_rate", type=utils.number(float, above=0), default=0.025, help="initial, of SGD")
    group.add_argument(
        "--lr_scheduler", choices=schedule.SHAPES, default="cosine", help="how it falls to 0, by the epoch"
    )
    group.add_argument(
        "--warmup_epochs", type=utils.number(int, low=0), default=0, help="epochs over which it rises at first"
    )
    group.add_argument("--momentum", type=utils.number(float, low=0, below=1), default=0.9, help="of SGD")
    group.add_argument("--weight_decay", type=utils.number(float, low=0), default=3e-4, help="of SGD")
    group.add_argument("--grad_clip", type=utils.number(float, above=0), default=5.0, help="largest gradient norm")
    group = utils.add_device_arguments(parser)
    group.add_argument("--amp", action="store_true", help="train in bfloat16; evaluation is in float32")
    group.add_argument(
        "--compile",
        action="store_true",
        help="train what torch.compile makes of the network, after minutes of compiling; evaluation is as without. On "
        "a CPU it takes the place of the cells in C++",
    )
    utils.add_process_arguments(parser)
    settings.add_arguments(parser, seed=0)
    return parser


def compiled(model, args):
    """What torch.compile makes of a network, for each size of a batch by itself: what is computed does not depend on
    what came before.
    """
    sizes = {size_of_epoch(args, epoch) for epoch in range(args.epochs)}
    # of images of each size there are whole batches and a smaller last one; after so many, PyTorch gives up
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * len(sizes))
    return torch.compile(model, fullgraph=True, dynamic=False)


def _not_compiled(error):
    """What to raise for an error of a compiled step: a UserError if torch.compile gave up, else the error itself."""
    if not isinstance(error, torch._dynamo.exc.TorchDynamoException):
        return error
    return utils.UserError(f"torch.compile failed ({str(error).splitlines()[0]}): start a run without --compile")


def main():
    team = Processes.start()
    args = parse_args(team.arguments())
    device = utils.pick_device(args, team)
    utils.check_processes(args, team, device)
    team.join(device, args.timeout)
    torch.manual_seed(args.seed)
    train_batches, valid_batches, facts = load_data(args, device, team)
    classes = len(facts["classes"])
    model = make_network(args, classes)
    model = team.share_batch_norm(model) if args.sync_bn else model
    model.to(device, memory_format=torch.channels_last)
    criterion = make_criterion(args)
    own = dict(momentum=args.momentum, weight_decay=args.weight_decay)
    optimizer = torch.optim.SGD(model.parameters(), args.learning_rate, **own, fused=True)
    scheduler = schedule.make(optimizer, args.epochs, args.lr_scheduler, args.warmup_epochs)
    parts = dict(model=model, optimizer=optimizer, scheduler=scheduler)
    forward = compiled(model, args) if args.compile else model

    with run_folder.Run("train", args, device, parts, team, **facts) as run:
        genotype = genotypes.parse(args.arch)
        if genotype == genotypes.DARTS:
            logger.info(genotypes.WHICH_DARTS)
        run.report(genotype)
        logger.info("network of %.2f M weights", utils.count_parameters_in_MB(model))
        # a step passes forward, and back in twice the time; a validation forward
        run.observer.pace.after = lambda epoch: len(valid_batches) / 3
        run.observer.pace.work = lambda epoch: (size_of_epoch(args, epoch) / size_of_epoch(args, args.epochs)) ** 2
        gc.freeze()  # what is there by now stays: looking through it for garbage takes 5 % of a small step
        while run.epoch < args.epochs:
            if run.leads:
                report.update(run.folder, build_parser())
            model.drop_path_prob = args.drop_path_prob * run.epoch / args.epochs
            if args.compile and args.drop_path_prob > 0:
                model.drop_path_prob = torch.tensor(model.drop_path_prob, device=device)
            try:
                train(run, train_batches, model, forward, criterion, optimizer, args)
            except RuntimeError as error:
                raise (_not_compiled(error) if args.compile else error) from None
            valid = infer(valid_batches, model, run.stop_if_asked)  # as DARTS: the test images, if all others train
            run.end_epoch(valid, **({"valid_top5": valid.top5} if valid.has_top5 else {}))
        run.observer.finish()
        if run.leads:
            report.conclude(run.folder, build_parser())
        logger.info("trained; now: %s", run_folder.command("test.py", "--model_path", run.folder))
    team.leave()


if __name__ == "__main__":
    utils.run_script(main)

"""Train a genotype from scratch.

python train.py --auxiliary --cutout --arch DARTS                       # CIFAR-10, as in the DARTS paper
python train.py --arch runs/search-EXP-20250101-120000                  # what a search found
python train.py --arch "Genotype(normal=[('sep_invo_3x3', 1), ...], ...)"
python train.py --resume runs/train-EXP-20250101-120000                 # go on where a run was stopped
"""

import logging

import threads

if __name__ == "__main__":
    threads.wait_asleep()  # before PyTorch is imported

import torch
import torch.nn as nn

import data
import genotypes
import run_folder
import utils
from model import AuxiliaryHeadCIFAR, NetworkCIFAR

logger = logging.getLogger("darts.train")


def train(run, batches, model, criterion, optimizer, args):
    """The steps that are left of an epoch."""
    model.train()
    for input, target in run.steps(batches):
        optimizer.zero_grad()
        logits, logits_aux = model(input)
        loss = criterion(logits, target)
        if args.auxiliary:
            loss = loss + args.auxiliary_weight * criterion(logits_aux, target)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        optimizer.step()
        run.record(loss.detach(), logits.detach(), target)


@torch.no_grad()
def infer(batches, model, criterion, after_batch=lambda: None):
    """Loss and accuracy on plain images, as a meter; `after_batch` is called after every batch."""
    model.eval()
    meter = utils.AverageMeter()
    for input, target in batches:
        logits, _ = model(input)
        meter.update(criterion(logits, target).item(), logits, target)
        after_batch()
    return meter


def load_data(args, device):
    """Augmented batches of the training images, plain batches of the test images, normalization, class names."""
    images, test_images = (
        data.load(args.dataset, args.data, train, args.image_size, args.subset, args.seed, device)
        for train in (True, False)
    )
    data.check_classes(test_images, images.classes)
    size = images.pixels.shape[1]
    if args.batch_size > len(images):
        raise utils.UserError(f"--batch_size {args.batch_size} is larger than the {len(images)} training images")
    smallest = smallest_image(args.layers)
    if args.auxiliary and size < smallest:
        raise utils.UserError(
            f"--auxiliary needs images of at least {smallest} pixels with --layers {args.layers}, got {size}; "
            f"leave --auxiliary out or use --image_size {smallest}"
        )
    normalization = data.Normalization.of(args.dataset, lambda: images)
    augmentation = data.Augmentation.of(args.dataset, size, args.cutout_length if args.cutout else 0)
    train_batches = data.Batches(images, args.batch_size, normalization, augmentation, key=(args.seed, 0))
    test_batches = data.Batches(test_images, args.batch_size, normalization, augmentation=None)
    return train_batches, test_batches, normalization, images.classes


def smallest_image(layers):
    """Pixels that the auxiliary head needs: 8 after the reductions of the first two thirds of the cells."""
    reductions = len({layers // 3, 2 * layers // 3})
    return (AuxiliaryHeadCIFAR.smallest - 1) * 2**reductions + 1


def add_network_arguments(parser):
    group = parser.add_argument_group("network")
    group.add_argument(
        "--arch",
        type=utils.user_value(lambda text: genotypes.format(genotypes.parse(text))),
        default="DARTS",
        help=f"a name ({', '.join(genotypes.NAMED)}), a Genotype(...) expression, a run folder or a genotype file",
    )
    group.add_argument(
        "--init_channels", type=utils.number(int, low=1, high=4096), default=36, help="channels of the first cells"
    )
    group.add_argument("--layers", type=utils.number(int, low=1, high=1000), default=20, help="number of cells")
    group.add_argument("--auxiliary", action="store_true", help="with the auxiliary head, used in training only")
    utils.add_kernel_norm_argument(group)


def parse_args(argv=None):
    parser = utils.ArgumentParser(description="Train a genotype from scratch.")
    utils.add_data_arguments(parser)
    group = parser.add_argument_group("augmentation and regularization")
    group.add_argument("--cutout", action="store_true", help="cut a square out of every training image")
    group.add_argument("--cutout_length", type=utils.number(int, low=2), default=16, help="its side, in pixels")
    group.add_argument(
        "--drop_path_prob",
        type=utils.number(float, low=0, below=1),
        default=0.2,
        help="probability of dropping a path, reached linearly over the epochs",
    )
    group.add_argument("--auxiliary_weight", type=utils.number(float, low=0), default=0.4, help="of its loss")
    add_network_arguments(parser)
    group = parser.add_argument_group("weights")
    group.add_argument("--epochs", type=utils.number(int, low=1), default=600, help="passes over the training images")
    group.add_argument("--batch_size", type=utils.number(int, low=2), default=96, help="images a step")
    group.add_argument("--learning_rate", type=utils.number(float, above=0), default=0.025, help="initial, of SGD")
    group.add_argument("--momentum", type=utils.number(float, low=0, below=1), default=0.9, help="of SGD")
    group.add_argument("--weight_decay", type=utils.number(float, low=0), default=3e-4, help="of SGD")
    group.add_argument("--grad_clip", type=utils.number(float, above=0), default=5.0, help="largest gradient norm")
    utils.add_device_arguments(parser)
    run_folder.add_arguments(parser, seed=0)
    return run_folder.parse_args(parser, argv)


def main():
    args = parse_args()
    genotype = genotypes.parse(args.arch)
    device = utils.pick_device(args)
    torch.manual_seed(args.seed)
    train_batches, test_batches, normalization, classes = load_data(args, device)
    model = NetworkCIFAR(args.init_channels, len(classes), args.layers, args.auxiliary, genotype, args.kernel_norm)
    model.to(device, memory_format=torch.channels_last)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(
        model.parameters(), args.learning_rate, momentum=args.momentum, weight_decay=args.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    parts = dict(model=model, optimizer=optimizer, scheduler=scheduler)

    with run_folder.Run("train", args, device, parts, normalization=tuple(normalization), classes=classes) as run:
        run.report(genotype)
        logger.info("network of %.2f M weights", utils.count_parameters_in_MB(model))
        while run.epoch < args.epochs:
            model.drop_path_prob = args.drop_path_prob * run.epoch / args.epochs
            train(run, train_batches, model, criterion, optimizer, args)
            valid = infer(test_batches, model, criterion, run.stop_if_asked)  # as DARTS: the test images
            run.end_epoch(valid)
            logger.info("genotype = %s", genotypes.format(genotype))
        logger.info("trained; now: %s", run_folder.command("test.py", "--model_path", run.folder))


if __name__ == "__main__":
    utils.run_script(main)

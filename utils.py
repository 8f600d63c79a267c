"""What the scripts share: command lines, devices, meters, files that are replaced whole."""

import argparse
import logging
import logging.handlers
import math
import os
import platform
import re
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from tqdm import tqdm

import involution
import operations
from gradients import from_seed
from runtime import memory, processes, progress, threads

logger = logging.getLogger("darts")


class UserError(ValueError):
    """Something the user can mend; scripts show it as one line and exit with its code."""

    exit_code = 2


class Diverged(UserError):
    """Numbers of a run are no longer finite: a result of its settings, which has an exit code of its own."""

    exit_code = 3


# --------------------------------------------------------------------------------------------- command lines


class _DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """Shows defaults in --help; a wrong argument gets one line and exit code 2."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, formatter_class=_DefaultsFormatter, **kwargs)

    def error(self, message):
        sys.exit(_fail(f"{self.prog}: error: {message}", 2))

    def given(self, argv=None):
        """The arguments that the command line names, without the defaults, as a dict."""
        unset = object()
        blank = argparse.Namespace(**{action.dest: unset for action in self._actions})
        return {k: v for k, v in vars(self.parse_args(argv, blank)).items() if v is not unset}


_LARGEST = {int: 10**9, float: 1e30}  # an optimizer of float32 weights takes no larger number


def number(kind, low=-math.inf, high=math.inf, above=None, below=None):
    """An argparse type: an int or float within [low, high] and, where given, strictly within (above, below)."""
    most = _LARGEST[kind] if high == math.inf else high

    def rule(value=None):
        bounds = [f"at least {low}"] * (low > -math.inf)
        bounds += [f"at most {most}"] * (high < math.inf or (value is not None and value > most and below is None))
        bounds += [f"above {above}"] * (above is not None) + [f"below {below}"] * (below is not None)
        return " ".join(["must be", "an integer" if kind is int else "a number", " and ".join(bounds)]).rstrip()

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{rule()}, got {text[:40]!r}") from None
        within = low <= value <= most and (above is None or value > above) and (below is None or value < below)
        if not within:  # as NaN never is
            raise argparse.ArgumentTypeError(f"{rule(value)}, got {text[:40]}")
        return value

    return convert


def user_value(function):
    """An argparse type from a function that raises ValueError with a message for the user."""

    def convert(text):
        try:
            return function(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def add_data_arguments(parser):
    group = parser.add_argument_group("data")
    group.add_argument("--data", default="data", help="folder of the data set; CIFAR is downloaded to it when missing")
    group.add_argument(
        "--dataset",
        choices=("cifar10", "cifar100", "folder", "digits"),
        default="cifar10",
        help="folder: your own images in DATA/train/CLASS/* and DATA/test/CLASS/*; digits: 8x8 scans, no download",
    )
    group.add_argument(
        "--image_size",
        type=number(int, low=1, high=1024),
        help="pixels; images are resized to it (default: 8 for digits, else 32)",
    )
    group.add_argument("--subset", metavar="N", type=number(int, low=2), help="use at most N images of each set")
    group.add_argument(
        "--fit",
        choices=("crop", "squeeze"),
        default="crop",
        help="of images in a folder that are not square: keep their middle, or distort them",
    )
    group.add_argument("--skip_broken", action="store_true", help="leave out image files that cannot be read")
    group.add_argument(
        "--data_in",
        choices=("memory", "disk"),
        help="where images in a folder are kept; disk: decoded as they are needed (default: memory, up to 2 GiB)",
    )
    group.add_argument(
        "--workers",
        metavar="N",
        type=number(int, low=1, high=256),
        help="processes that decode images in a folder; a search has two at least (default: one for each core but one, "
        "at most 8)",
    )
    return group


def add_augmentation_arguments(group):
    group.add_argument("--cutout", action="store_true", help="cut a square out of every training image")
    group.add_argument("--cutout_length", type=number(int, low=2), default=16, help="its side, in pixels")
    group.add_argument(
        "--augment",
        choices=("crop", "resized_crop"),
        default="crop",
        help="crop: of the image padded by an eighth; resized_crop: 8 to 100 %% of the image, enlarged",
    )
    group.add_argument(
        "--color_jitter",
        type=number(float, low=0, high=1),
        default=0.0,
        help="change brightness, contrast and saturation by factors of up to 1 + this, hue by half of it in turns",
    )


def add_kernel_norm_argument(group):
    group.add_argument(
        "--kernel_norm",
        choices=involution.KERNEL_NORMS,
        default=operations.KERNEL_NORM,
        help="what bounds the kernels of involutions; none: the involution authors' form, which may overflow",
    )


def add_device_arguments(parser):
    group = parser.add_argument_group("device")
    group.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto: cuda, else cpu")
    group.add_argument("--gpu", type=number(int, low=0), help="CUDA device id (default: 0)")
    return group


def add_process_arguments(parser):
    group = parser.add_argument_group("several processes (torchrun)")
    group.add_argument(
        "--sync_bn", action="store_true", help="batch norm by the images of all GPUs, not by those of each"
    )
    group.add_argument(
        "--timeout",
        type=number(int, low=1),
        default=600,
        help="seconds that a process may keep the others waiting before they end",
    )


def check_processes(args, team, device):
    """Raise UserError where several processes cannot do what the command line says; `team` is a Processes."""
    if args.sync_bn and device.type != "cuda" and (team.count > 1 or not args.resume):
        raise UserError(f"--sync_bn needs CUDA devices, and this run is on {device.type}: leave it out")
    for flag in ("cuda_graph", "compile"):
        if args.sync_bn and getattr(args, flag, False):
            raise UserError(f"--sync_bn does not go with --{flag}: leave one of them out")
    if args.batch_size < 2 * team.count:
        raise UserError(
            f"--batch_size {args.batch_size} leaves some of {team.count} processes less than two images, which batch "
            f"norm needs: at least {2 * team.count}, or fewer processes"
        )


def run_script(main):
    """Call a script's `main`; what the user can mend ends in one line and exit code 2 (3: a run diverged)."""
    script = Path(sys.argv[0]).name
    try:
        _add_handlers()
        threading.excepthook = _thread_failed
        main()
    except processes.Lost as error:
        sys.exit(_fail(f"{script}: error: {error}; a restart by torchrun, or --resume, goes on", 1))
    except (UserError, processes.StartError) as error:
        message = " ".join(str(error).split())
        sys.exit(_fail(f"{script}: error: {message}", error.exit_code))
    except OSError as error:
        sys.exit(_fail(f"{script}: error: {error.filename or 'a file'}: {error.strerror or error}", 2))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        sys.exit(_fail(f"{script}: error: out of memory; lower --batch_size, --init_channels or --image_size", 2))
    except KeyboardInterrupt:
        sys.exit(_fail(f"{script}: stopped at once; --resume goes on from the last checkpoint of a run", 130))


def _thread_failed(failure):
    """As Python, but for what the main thread meets too, and tells in one line: TensorBoard's own on a full disk."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


def _add_handlers():
    """Send what is logged to the console, and keep it for a log.txt; of several processes, one speaks."""
    logger.setLevel(logging.DEBUG)
    if not processes.is_first():
        logging.getLogger().addHandler(logging.NullHandler())
        return
    handler = _ConsoleHandler()
    handler.setLevel(logging.INFO if sys.stdout.isatty() else logging.DEBUG)
    # what is said before a run has a log.txt is kept for it
    for each in (handler, logging.handlers.MemoryHandler(10**6, flushLevel=logging.CRITICAL), progress.Pulse()):
        logging.getLogger().addHandler(each)


def _fail(message, code):
    if processes.first_to_say(message):
        print(message, file=sys.stderr, flush=True)
    return code


class _ConsoleHandler(logging.Handler):
    """Prints log lines above the progress bar, if one is up."""

    def emit(self, record):
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        try:
            tqdm.write(f"{time.strftime('%H:%M:%S')} {prefix}{record.getMessage()}", file=sys.stdout)
            sys.stdout.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, "standard output") from None


def pick_device(args, team=processes.ALONE):
    """The torch.device that --device and --gpu ask for; of several processes, each has a GPU of its own.

    A run on a CPU keeps the memory that it frees from here on.

    Args:
        team: a Processes.

    Raises:
        UserError: a device that is not there, or an INVOLUTION_BACKEND that cannot run on it.
    """
    device = _pick_device(args, team)
    try:
        involution.backend(device)
    except ValueError as error:
        raise UserError(str(error)) from None
    if device.type == "cpu":
        memory.keep_freed()
    return device


def processor():
    """The processor of this machine, the number of its cores and the vector instructions PyTorch uses, in words."""
    info = Path("/proc/cpuinfo")  # of Linux, where `platform` does not know it
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def synchronize(device):
    """Wait until a device has done what it was asked to, so that a clock may be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def log_device(device):
    """Log what a script computes on: the numbers of a CPU depend on how many threads share it."""
    backend, count = involution.backend(device), torch.get_num_threads()
    how = ", which sleep while they wait for each other" if count > 1 and threads.are_asleep() else ""
    logger.info("device %s, involution backend %s, CPU threads: %d%s", device, backend, count, how)


def _pick_device(args, team):
    has_cuda = torch.cuda.is_available()
    if args.device == "cuda" and not has_cuda:
        raise UserError("--device cuda: PyTorch sees no CUDA device here; use --device cpu (or auto)")
    if args.device == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: PyTorch sees no MPS device here; use --device cpu (or auto)")
    if args.device == "mps" and team.count > 1:
        raise UserError("--device mps: several processes work together on CUDA devices or CPUs only")
    if args.device == "auto" and not has_cuda and args.gpu is not None:
        logger.warning("--gpu %d: no CUDA device here, going on with the CPU", args.gpu)
    elif args.device in ("cpu", "mps") and args.gpu is not None:
        logger.warning("--gpu %d has no effect with --device %s", args.gpu, args.device)
    if args.device == "cuda" or (args.device == "auto" and has_cuda):
        index, there = args.gpu or 0, torch.cuda.device_count()
        if team.count > 1:
            if args.gpu is not None:
                logger.warning("--gpu %d has no effect: each process has a GPU of its own", args.gpu)
            index = team.local_rank
            if index >= there:
                raise UserError(f"more processes than the {there} CUDA devices here: lower --nproc_per_node")
        elif index >= there:
            raise UserError(f"--gpu {index}: there are {there} CUDA devices, numbered from 0")
        torch.cuda.set_device(index)
        torch.backends.cudnn.benchmark = True
        return torch.device("cuda", index)
    return torch.device("cpu" if args.device == "auto" else args.device)


# ----------------------------------------------------------------------------------------- meters, small help


class AverageMeter:
    """Loss, top-1 and top-5 accuracy (percent), averaged over images; how many of them have finite logits."""

    def __init__(self, sums=(0, 0.0, 0.0, 0.0, 0)):
        self.sums = list(sums)  # images, loss, top-1, top-5, images with finite logits

    def update(self, loss, logits, target):
        """Add a batch: its mean loss (a number), logits (N, classes), target (N,)."""
        n = len(target)
        top1, top5 = accuracy(logits, target, topk=(1, 5))
        for k, value in enumerate((1, loss, top1, top5)):
            self.sums[k] += value * n
        self.sums[4] += int(logits.isfinite().all(dim=1).sum())

    def add_shares(self, sums, images):
        """Add a batch of `images` by what its shares sum up to, whether or not they have images in common."""
        part = images / sums[0]
        self.sums = [value + more for value, more in zip(self.sums, _whole([part * s for s in sums]), strict=True)]

    @property
    def images(self):
        return self.sums[0]

    @property
    def finite_images(self):
        return self.sums[4]

    @property
    def loss(self):
        return self.sums[1] / max(1, self.sums[0])

    @property
    def top1(self):
        return self.sums[2] / max(1, self.sums[0])

    @property
    def top5(self):
        return self.sums[3] / max(1, self.sums[0])

    def __str__(self):
        return f"loss {self.loss:.4f} acc {self.top1:.2f}%"


def _whole(sums):
    """The sums of an AverageMeter, with its counts as integers."""
    return [round(sums[0]), *sums[1:4], round(sums[4])]


class Evaluation(AverageMeter):
    """An AverageMeter of cross-entropies that keeps every image's: a mean does not tell that two images make it."""

    def __init__(self):
        super().__init__()
        self.losses = torch.empty(0, dtype=torch.float64)  # (images,)
        self.classes = 1

    def add(self, logits, target):
        """Add a batch: logits (N, classes), target (N,)."""
        losses = torch.nn.functional.cross_entropy(logits, target, reduction="none").cpu().double()
        self.losses = torch.cat([self.losses, losses])
        self.classes = logits.shape[1]
        self.update(losses.mean().item(), logits, target)

    def merged(self, team, images):
        """The evaluation of `images` images, of which each of a team's processes has added every N-th."""
        if team.count == 1:
            return self
        merged = Evaluation()
        losses = torch.zeros(images, dtype=torch.float64)
        losses[team.rank :: team.count] = self.losses
        sums = team.total([*self.sums, *losses.tolist()])
        merged.sums, merged.losses = _whole(sums[:5]), torch.tensor(sums[5:], dtype=torch.float64)
        merged.classes = self.classes
        return merged

    @property
    def has_top5(self):
        """Whether top-5 accuracy says anything."""
        return self.classes > 5

    def __str__(self):
        return super().__str__() + (f" top-5 {self.top5:.2f}%" if self.has_top5 else "")

    def extreme(self):
        """The images, worst first, that make more than half of the loss by losses far above its median; or none.

        Far above is ten times, and ten times what chance has: the median of a trained network is close to zero. Where
        the median itself is ten times what chance has, most images have exploded, and chance alone is the measure.
        """
        finite = self.losses[self.losses.isfinite()]
        if len(finite) == 0:
            return []
        chance = math.log(self.classes)  # the loss of a network that knows nothing
        median = finite.median().item()
        threshold = 10 * (median if chance < median <= 10 * chance else chance)
        far = self.losses.isfinite() & (self.losses > threshold)
        if self.losses[far].sum() <= finite.sum() / 2:
            return []
        order = self.losses.argsort(descending=True, stable=True)
        return order[far[order]].tolist()

    def explosion(self, part):
        """A line about what `extreme` finds, or None."""
        images = self.extreme()
        if not images:
            return None
        finite = self.losses[self.losses.isfinite()]
        share = 100 * (self.losses[images].sum() / finite.sum()).item()
        return (
            f"{len(images)} of {self.images} {part} images make {share:.1f}% of the loss, up to "
            f"{self.losses[images[0]]:.4g} each; the median over the images is {finite.median():.4g}"
        )


@torch.no_grad()
def infer(batches, model, logits_of=lambda output: output, after_batch=lambda: None, meter=None):
    """Loss and accuracy of a model on plain images, as a meter.

    Noise is the same every time, and the random states stay: a stop between two batches saves those of the last step.

    Args:
        logits_of: takes the logits (N, classes) from what the model puts out.
        after_batch: called after every batch.
        meter: an Evaluation to begin with.
    """
    model.eval()
    meter = meter or Evaluation()
    for k, (input, target) in enumerate(progress.counted(batches, "evaluation")):
        if len(target):
            with from_seed(input.device, k):
                meter.add(logits_of(model(input)), target)
        after_batch()
    return meter.merged(batches.team, len(batches.labels))


@torch.no_grad()
def accuracy(logits, target, topk=(1,)):
    """Percentages of the batch whose target is among the k largest logits (all of them, if there are fewer).

    Logits that are not all finite have no largest ones: a miss.
    """
    ranked = logits.topk(min(max(topk), logits.shape[1]), dim=1).indices
    hits = (ranked.eq(target[:, None]) & logits.isfinite().all(dim=1, keepdim=True)).cpu()
    return [100 * hits[:, :k].any(dim=1).double().mean().item() for k in topk]


def count_parameters(model):
    """The number of weights, without the auxiliary head."""
    return sum(p.numel() for name, p in model.named_parameters() if "auxiliary" not in name)


def duration(seconds):
    """Seconds as people say them: 42 s, 12 min, 3 h 05 min, 2 d 4 h."""
    minutes = round(seconds / 60)
    if seconds < 120:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def count_parameters_in_MB(model):
    """Millions of weights, without the auxiliary head."""
    return count_parameters(model) / 1e6


@contextmanager
def replacing(path):
    """Yield a temporary path; its file takes the place of `path` once it is complete.

    Raises:
        OSError: names `path`, where what went wrong (a full disk) does not name a file.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise error if error.filename else OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def filling(folder):
    """Make a folder for what a block writes; a new one that stays empty, as on a full disk, is removed again."""
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if made:
            with suppress(OSError):  # it holds something
                folder.rmdir()


def remove_temporaries(folder):
    """Remove what killed processes left below a folder while they were `replacing` files of it; none is at work now."""
    for path in Path(folder).rglob(".*"):
        if re.fullmatch(r"\..+\.(pt|json|csv|png|gv|gif|html)\.\d+", path.name) and path.is_file():
            path.unlink()


def write_text(path, text):
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")  # of file names that are no UTF-8


def readable(name):
    """The name of a file as it can be printed, whatever its bytes are."""
    return name.encode(errors="replace").decode()

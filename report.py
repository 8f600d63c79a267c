"""The page of a run: report.html in its folder, one file that needs neither a server nor a network.

python report.py runs/search-EXP-20250101-120000        # as the run stands, whatever its age; also of train.py
python report.py FOLDER                                 # what test.py --output FOLDER wrote

Everything in a page is read from the folder, and what a folder does not hold its page leaves out. What the page says
is gathered here; how it looks is watch/report.jinja, whose engine escapes every text that it is given.
"""

import base64
import csv
import hashlib
import json
import logging
import math
import shlex
import time
from pathlib import Path

import jinja2
from PIL import Image

import genotypes
import utils
from run_folder import judged_by
from runtime import checkpoint, settings

logger = logging.getLogger("darts.report")

NAME = "report.html"
TEST = "test"  # folder of a run in which test.py leaves its results
RESULTS = "test.json"  # file of them that says what they are
_TEMPLATE = Path(__file__).parent / "watch" / "report.jinja"
_MEDIA = {".png": "image/png", ".gif": "image/gif", ".webp": "image/webp", ".svg": "image/svg+xml"}
_KINDS = {"train_search.py": "search", "train.py": "train", "test.py": "test"}
_GROUPS = (  # sections of pictures: title, how the names of their files begin, in order
    ("Curves", ("curves",)),
    ("Cells", ("normal", "reduction")),
    ("Alphas", ("alphas_normal", "alphas_reduction", "alphas")),
    ("Sharpness", ("eigenvalue",)),
    ("Evolution", ("evolution",)),
)
_CAPTIONS = {
    "curves": "Accuracy and loss, epoch by epoch.",
    "normal": "Normal cell: dashed lines are concatenated into its output.",
    "reduction": "Reduction cell: halves height and width.",
    "alphas_normal": "Normal cell: the weight of every primitive on every edge, over the epochs.",
    "alphas_reduction": "Reduction cell: the weight of every primitive on every edge, over the epochs.",
    "alphas_heat_map": "The weights of the last epoch.",
    "evolution": "The cells from epoch to epoch, a picture wherever they changed.",
    "eigenvalue": "The dominant eigenvalue of the Hessian of the validation loss by the alphas: where it rises, and "
    "skip connections with it, the search may be collapsing (arXiv 1909.09656).",
    "confusion": "Confusion: of the images of a class (row), the share that was taken for each class (column).",
    "classes": "Accuracy of every class, with its 95% interval (Wilson).",
    "calibration": "Calibration: how often the network is right when it is so sure.",
    "mistakes": "The mistakes that the network was most sure of.",
}
_TESTED = ("classes", "confusion", "calibration", "mistakes")  # pictures of a test
_COLUMNS = {  # of metrics.csv, as people read them; {} is what the run is judged by
    "epoch": "epoch",
    "lr": "learning rate",
    "train_loss": "training loss",
    "train_acc": "training accuracy (%)",
    "valid_loss": "{} loss",
    "valid_acc": "{} accuracy (%)",
    "valid_top5": "{} top-5 accuracy (%)",
    "skip_connects": "skip connections",
    "eigenvalue": "dominant eigenvalue",
    "eigenvalue_largest": "largest eigenvalue",
    "kept_epoch": "stopped: genotype of epoch",
    "entropy_normal": "entropy, normal cell (nats)",
    "entropy_reduce": "entropy, reduction cell (nats)",
}
_PAUSE = 60  # seconds without a line in the log: the run was not at work


def write(folder, parser):
    """Write the page of a folder and return its path.

    Args:
        parser: of the script that made the folder: knows the defaults.

    Raises:
        UserError: a folder that holds neither a run nor test results, or damaged ones.
    """
    folder = Path(folder)
    path = folder / NAME
    utils.write_text(path, render(describe(folder, parser)))
    return path


def update(folder, parser):
    """`write` for a script at work, which goes on if the page cannot be made."""
    try:
        return write(folder, parser)
    except utils.UserError as error:
        logger.warning("no page of %s: %s", folder, error)


def conclude(folder, parser):
    """`update` for a script that is done: it says where the page is."""
    path = update(folder, parser)
    if path:
        logger.info("its page: %s", path)


def script_of(folder):
    """The name of the script that made a folder."""
    for name in ("config.json", RESULTS):
        if (folder / name).is_file():
            script = _read_json(folder / name).get("script")
            if not isinstance(script, str) or script not in _KINDS:
                raise utils.UserError(f"{folder / name} is damaged: its script is {checkpoint.shown(script)}")
            return script
    raise utils.UserError(f"{folder} is no run folder (no config.json in it) and holds no test results ({RESULTS})")


def render(page):
    """The HTML of what `describe` returns."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["digest"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(page)


def describe(folder, parser):
    """What the page of a folder says: a dict of plain values for the template."""
    script = script_of(folder)
    kind = _KINDS[script]
    page = dict(kind=kind, name=folder.resolve().name, written=time.strftime("%Y-%m-%d %H:%M"), tests=None)
    if kind == "test":
        page |= _of_test(folder, parser)
    else:
        page |= _of_run(folder, parser, kind)
    return page


def _of_run(folder, parser, kind):
    config = _read_config(folder / "config.json")
    saved = _settings(config, "args", parser, folder / "config.json")
    history = _read_history(folder / "metrics.csv")
    tests = _results(folder / TEST) if (folder / TEST / RESULTS).is_file() else None
    summary, at_work = _summary(folder), seconds(folder)
    judge, done, epochs = judged_by(kind, saved), len(history), saved["epochs"]
    kept = history[-1].get("kept_epoch") if history else None  # of an early stop
    over = done == epochs or bool(kept)
    return dict(
        status=f"{done} of {epochs} epochs" + (f", stopped early with the genotype of epoch {kept}" if kept else ""),
        over=over,
        tiles=_tiles(judge, history, tests, at_work),
        command=_command(config["script"], parser, saved),
        next=_next(folder, kind, over, tests is not None),
        sections=_sections(folder / "figures", _genotype(folder)),
        tests=tests,
        settings=[(name, *map(_value, pair)) for name, *pair in settings.differing(saved, parser)],
        rest=_rest(saved, parser),
        data=_data(saved, config.get("data", {})),
        machine=_machine(config),
        cost=_cost(summary) or ([("time at work, from the log", utils.duration(at_work))] if at_work else []),
        table=_table(history, judge),
    )


def _of_test(folder, parser):
    tests = _results(folder)
    saved, used = (_settings(tests, name, parser, folder / RESULTS) for name in ("args", "settings"))
    return dict(
        status=f"{tests['images']:,} test images",
        over=True,
        tiles=tests["tiles"],
        command=_command(tests["script"], parser, saved),
        next=None,
        sections=_sections(folder / "figures", used["arch"]),
        tests=tests,
        settings=[(name, *map(_value, pair)) for name, *pair in settings.differing(saved, parser)],
        rest=_rest(saved, parser),
        data=_data(used, tests.get("data", {})),
        machine=_machine(tests),
        cost=[],
        table=None,
    )


# ------------------------------------------------------------------------------------------ what the folder holds


def _read_json(path):
    try:
        return _dict(json.loads(path.read_text()), path)
    except (OSError, ValueError, RecursionError) as error:
        raise utils.UserError(f"{path} is missing or damaged ({error})") from None


def _dict(value, path):
    if not isinstance(value, dict):
        raise utils.UserError(f"{path} is damaged: it should hold names and values, not {checkpoint.shown(value)}")
    return value


def _read_config(path):
    """What config.json or test.json says of a run, its images and its machine."""
    config = _read_json(path)
    _dict(config.get("versions", {}), path)
    if not checkpoint.are_fingerprints(config.get("data", {})):
        raise utils.UserError(f"{path} is damaged: its data is {checkpoint.shown(config['data'])}")
    return config


def _settings(config, name, parser, path):
    """The settings of a run that this version knows; older ones had others as well."""
    known = {action.dest for action in parser._actions}
    saved = {key: value for key, value in _dict(config.get(name), path).items() if key in known}
    return settings.check(saved, parser, path)


def _read_history(path):
    """The rows of metrics.csv; a run that has ended no epoch has none."""
    if not path.is_file():
        return []
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
    except (ValueError, csv.Error) as error:
        raise utils.UserError(f"{path} is damaged ({error})") from None
    for row in rows:
        if None in row or None in row.values():
            raise utils.UserError(f"{path} is damaged: its rows have not all one length")
        for name in ("epoch", "train_acc", "train_loss", "valid_acc", "valid_loss"):
            if _number(row.get(name)) is None:
                raise utils.UserError(f"{path} is damaged: {name} is {row.get(name)!r}")
    return rows


def _number(text):
    """A float, or None for what is no number; NaN and infinities are numbers."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def _genotype(folder):
    path = folder / "genotype.json"
    if not path.is_file():
        return None
    try:
        return genotypes.format(genotypes.parse(str(path)))
    except ValueError as error:
        raise utils.UserError(str(error)) from None


def _summary(folder):
    path = folder / "summary.json"
    return _read_json(path) if path.is_file() else {}


def seconds(folder):
    """How long a run has worked, as its summary says; by its log, where there is none yet."""
    hours = _summary(folder).get("hours")
    return 3600 * hours if isinstance(hours, (int, float)) else _seconds_of(folder / "log.txt")


def _seconds_of(log):
    """How long a run has worked, by the times of its log; the pauses between an interruption and a resume are none."""
    if not log.is_file():
        return 0
    times = []
    for line in log.read_text(errors="replace").splitlines():
        try:
            times.append(time.mktime(time.strptime(line[:19], "%Y-%m-%d %H:%M:%S")))
        except (ValueError, OverflowError):  # a further line of a message
            continue
    steps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    return sum(step for step in steps if 0 <= step <= _PAUSE)


def _pictures(paths):
    """Pictures as the template shows them: data as a URL, width in CSS pixels, caption; what is none is left out."""
    found = []
    for path in paths:
        try:
            width = None if path.suffix == ".svg" else _width(path)
        except OSError as error:
            logger.warning("left out of the page: %s (%s)", path, error)
            continue
        data = base64.b64encode(path.read_bytes()).decode()
        name = path.stem.replace("_", " ")
        url = f"data:{_MEDIA[path.suffix]};base64,{data}"
        found.append(dict(url=url, width=width, name=name, caption=_CAPTIONS.get(path.stem, name)))
    return found


def _width(path):
    """Pixels of 1/96 inch: pictures have their sizes beside each other that they have on paper."""
    with Image.open(path) as image:
        return round(image.width * 96 / (image.info.get("dpi", (96,))[0] or 96))


def _sections(folder, genotype):
    """The pictures of a folder by subject, those of no known subject last; the genotype is with its cells."""
    paths = sorted(path for path in folder.glob("*") if path.suffix in _MEDIA and path.name[0] != ".")
    groups = {}
    for title, stems in _GROUPS:
        groups[title] = [*dict.fromkeys(path for stem in stems for path in paths if path.name.startswith(stem))]
        paths = [path for path in paths if path not in groups[title]]
    groups["More pictures"] = paths
    sections = [
        dict(title=title, pictures=_pictures(own), genotype=genotype if title == "Cells" else None)
        for title, own in groups.items()
    ]
    return [section for section in sections if section["pictures"] or section["genotype"]]


# ------------------------------------------------------------------------------------------------ what it says of it


def _tiles(judge, history, tests, seconds):
    """The figures that a reader wants first: (what, value)."""
    tested = tests and tests["epoch"] == len(history)  # and not extended since
    tiles = list(tests["tiles"]) if tested else []
    if history:
        last = history[-1]
        if not tested:
            tiles.append((f"{judge} accuracy", f"{float(last['valid_acc']):.2f}%"))
            tiles.append((f"{judge} loss", f"{float(last['valid_loss']):.3f}"))
        tiles.append(("training accuracy", f"{float(last['train_acc']):.2f}%"))
        for name in ("skip_connects", "eigenvalue"):
            values = [value for row in history if (value := _number(row.get(name))) is not None]
            if values:  # not every epoch measures an eigenvalue
                tiles.append((_COLUMNS[name], f"{values[-1]:.4g}"))
    if seconds:
        tiles.append(("time at work", utils.duration(seconds)))
    return tiles


def _command(script, parser, saved):
    """The line that begins the same run, for anyone who has the images."""
    words = settings.flags(saved | {"folder": None}, parser)  # a folder that holds a run is no place for another
    return _line(["python", script, *words])


def _next(folder, kind, over, tested):
    """What to do now: (why, command)."""
    path = f"./{folder}" if len(folder.parts) == 1 else str(folder)  # it may have the name of a genotype
    script = {"search": "train_search.py", "train": "train.py"}[kind]
    if not over:
        why, words = "Go on, if nothing is at work on it", [script, "--resume", path]
    elif kind == "search":
        why, words = "Train what was found", ["train.py", "--arch", path]
    elif not tested:
        why, words = "Test it", ["test.py", "--model_path", path]
    else:
        why, words = "Try it on pictures of your own", ["test.py", "--model_path", path, "--images", "PICTURES"]
    return why, _line(["python", *words])


def _line(words):
    """A command line; genotypes are full of single quotes, and stay readable in double ones."""
    plain = {word for word in words if "'" in word and not set(word) & set('"$`\\!')}
    return " ".join(f'"{word}"' if word in plain else shlex.quote(word) for word in words)


def _rest(saved, parser):
    differing = {name for name, _, _ in settings.differing(saved, parser)}
    names = [name for name in saved if name not in differing and name != "resume"]
    return [(f"--{name}", _value(saved[name])) for name in names]


def _value(setting):
    if isinstance(setting, bool):
        return "yes" if setting else "no"
    return "–" if setting is None else setting


def _data(saved, fingerprints):
    """What the images are: (what, value)."""
    pairs = [("data set", saved.get("dataset"))]
    if saved.get("dataset") == "folder":
        pairs.append(("folder", saved.get("data")))
    for part, of in fingerprints.items():
        least, most = min(of["counts"]), max(of["counts"])
        each = f"{least}" if least == most else f"{least} to {most}"
        pairs.append((f"{part} images", f"{sum(of['counts']):,}, {each} of each class"))
        digest = "sha256" if "sha256" in of else "files"  # of the pixels, or of the files that are read from the disk
        pairs.append((f"{part} images, SHA-256 of their {'pixels' if digest == 'sha256' else 'files'}", of[digest]))
    if fingerprints:
        names = next(iter(fingerprints.values()))["classes"]
        pairs.append((f"{len(names)} classes", ", ".join(names)))
    return pairs + [(name.replace("_", " "), saved[name]) for name in ("image_size", "subset") if saved.get(name)]


def _machine(config):
    pairs = [("device", config.get("device")), ("processor", config.get("processor"))]
    pairs += [("CPU threads", config.get("threads")), ("involution backend", config.get("involution_backend"))]
    pairs += list(config.get("versions", {}).items())
    pairs.append(("git commit", config.get("git_commit")))
    return [(name, value) for name, value in pairs if value is not None]


def _cost(summary):
    """What summary.json has, but for what is zero or elsewhere on the page: names in words, readable numbers."""
    elsewhere = ("kind", "epochs", "command", "genotype")
    return [
        (name.replace("_GB", " (GB)").replace("_", " "), _shown(value))
        for name, value in summary.items()
        if value not in (None, 0) and name not in elsewhere and not name.endswith("_accuracy")
    ]


def _shown(value):
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _table(history, judge):
    """The epochs: titles and rows of texts; genotypes, which are too long for a table, are left to metrics.csv."""
    if not history:
        return None
    names = [name for name in history[0] if name != "genotype"]
    titles = [_COLUMNS.get(name, name.replace("_", " ")).format(judge) for name in names]
    return dict(titles=titles, rows=[[_cell(row[name]) for name in names] for row in history])


def _cell(text):
    value = _number(text)
    if value is None:
        return text or ""
    return text if not math.isfinite(value) or value == int(value) else f"{value:.4g}"


def _results(folder):
    """What test.py has left in a folder: its numbers, what they say, and its pictures."""
    found = _read_config(folder / RESULTS)
    try:
        if not isinstance(found["epoch"], (int, type(None))):
            raise TypeError(f"epoch is {checkpoint.shown(found['epoch'])}")
        error, bins = found["expected_calibration_error"], found["calibration_bins"]
        tiles = [("test accuracy", f"{found['top1']:.2f}%"), ("test loss", f"{found['loss']:.3f}")]
        tiles.append(("calibration error", f"{100 * error:.1f}%"))
        facts = [("images", f"{found['images']:,}"), ("accuracy", f"{found['top1']:.2f}%")]
        facts += [("among the five likeliest", f"{found['top5']:.2f}%")] if found["top5"] is not None else []
        facts += [("loss (cross-entropy)", f"{found['loss']:.4f}")]
        facts += [("expected calibration error", f"{100 * error:.2f}%, {bins} bins (arXiv 1706.04599)")]
        facts += [("without finite logits", f"{found['without_finite_logits']:,} images, counted as mistakes")]
        pairs = [(*pair[:2], f"{pair[2]:,}", f"{100 * pair[3]:.1f}%") for pair in found["most_confused"]]
    except (KeyError, TypeError, ValueError) as error:
        raise utils.UserError(f"{folder / RESULTS} is damaged ({error!r})") from None
    pictures = _pictures(path for name in _TESTED if (path := folder / f"{name}.png").is_file())
    return found | dict(tiles=tiles, facts=facts, pictures=pictures, pairs=pairs)


# ------------------------------------------------------------------------------------------------------- as a script


def parse_args(argv=None):
    parser = utils.ArgumentParser(description="Write report.html, the page of a run, into its folder.")
    parser.add_argument("folder", type=Path, help="a run folder, or one that test.py --output wrote")
    return parser.parse_args(argv)


def main():
    import test  # these import this module
    import train
    import train_search

    folder = parse_args().folder
    if not folder.is_dir():
        raise utils.UserError(f"{folder}: no such folder")
    script = script_of(folder)
    scripts = {"train_search.py": train_search, "train.py": train, "test.py": test}
    print(write(folder, scripts[script].build_parser()))


if __name__ == "__main__":
    utils.run_script(main)

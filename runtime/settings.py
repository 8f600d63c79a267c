"""The settings of a run: its flags, and the rules for what config.json and a checkpoint hold of them.

A flag's own parser knows its type, choices and range; a saved value is right if the command line could give it.
"""

import argparse
import json
from pathlib import Path

from runtime import checkpoint
from utils import UserError, number, user_value

# settings that may differ between a run and its continuation: they do not change what is computed
PORTABLE = ("data", "data_in", "workers", "device", "gpu", "report_freq", "cuda_graph", "timeout")
# what runs did that are older than the setting
_BEFORE = {
    "kernel_norm": "none",
    "skip_broken": False,
    "fit": "squeeze",
    "data_in": None,
    "workers": None,
    "amp": False,
    "cuda_graph": False,
    "compile": False,
    "search_space": "involution",
    "sync_bn": False,
    "timeout": 600,
    "folder": None,
    "train_portion": 1.0,
    "augment": "crop",
    "color_jitter": 0.0,
    "network": "cifar",
    "stem_stride": 1,
    "label_smooth": 0.0,
    "lr_scheduler": "cosine",
    "warmup_epochs": 0,
    "first_image_size": None,
    "eigenvalue_every": 0,
    "early_stop": "none",
    "drop_path_prob": 0.0,
}


def add_arguments(parser, seed):
    group = parser.add_argument_group("run")
    group.add_argument("--save", default="EXP", type=user_value(_run_name), help="name of the run folder, in runs/")
    group.add_argument(
        "--folder",
        type=user_value(_not_empty),
        help="the run folder itself, instead of a new one in runs/ with the time in its name",
    )
    group.add_argument(
        "--resume",
        metavar="RUN_FOLDER",
        type=user_value(_not_empty),
        help="go on with an interrupted run, with its own settings; with more --epochs, extend it",
    )
    group.add_argument("--seed", type=number(int, low=0, high=2**63 - 1), default=seed, help="random seed")
    group.add_argument("--report_freq", type=number(int, low=1), default=50, help="steps between two report lines")


def _not_empty(text):
    if not text:
        raise ValueError("must be the path of a run folder, got ''")
    return text


def _run_name(text):
    if Path(text).name != text or not 1 <= len(text) <= 100 or text == "..":
        raise ValueError(f"must be a name, not a path, of 1 to 100 characters, got {text[:110]!r}")
    return text


def parse_args(parser, argv=None):
    """The arguments of a script; with --resume, those of the run.

    Raises:
        UserError: a folder that is no run, is damaged, or has a setting that differs from the command line's.
    """
    args = parser.parse_args(argv)
    if args.resume is None:
        return args
    saved = _read(Path(args.resume), parser)
    for name, value in parser.given(argv).items():
        if name in PORTABLE or (name == "epochs" and value > saved["epochs"]):
            saved[name] = value
        elif (name, value) == ("arch", "random"):  # of which the run has kept what was drawn
            continue
        elif name != "resume" and value != saved[name]:
            more = "; more epochs would extend it" if name == "epochs" else ""
            raise UserError(
                f"--resume {args.resume}: --{name} is {saved[name]} in that run, not {value}; leave --{name} out, "
                f"or start a new run{more}"
            )
    return argparse.Namespace(**saved | {"resume": args.resume})


def _read(folder, parser):
    """The settings that config.json and checkpoint.pt agree on; of the epochs, those that the run is extended to."""
    if not folder.is_dir():
        raise UserError(f"--resume {folder}: no such folder")
    path = folder / checkpoint.NAME
    if not path.is_file():
        raise UserError(f"--resume {folder}: no {checkpoint.NAME} in it; nothing to go on with")
    if (folder / "config.json").exists() and not (folder / "config.json").is_file():
        raise UserError(f"--resume {folder}: its config.json is no file")
    try:
        config = json.loads((folder / "config.json").read_text())
        script, saved = config["script"], config.get("args")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"--resume {folder}: config.json is missing or damaged ({error})") from None
    if script != parser.prog:
        raise UserError(f"--resume {folder}: that run is one of {checkpoint.shown(script)}, not of {parser.prog}")
    saved = check(saved, parser, folder / "config.json")
    state = checkpoint.check(checkpoint.load(path), path)
    if not state["optimizer"]:
        raise UserError(
            f"--resume {folder}: it has the weights alone, not what a training needs; --arch {folder} starts one"
        )
    kept = check(state["args"], parser, path)
    for name, value in saved.items():
        extends = name == "epochs" and value > kept[name]
        if name not in PORTABLE and value != kept[name] and not extends:
            one, other = checkpoint.shown(value), checkpoint.shown(kept[name])
            raise UserError(
                f"--resume {folder}: {name} is {one} in config.json, but {other} in {checkpoint.NAME}, which was "
                "computed with it: put it back"
            )
    return saved


def check(saved, parser, where):
    """The settings (a dict) that a file holds, with those that are younger than it.

    Raises:
        UserError: a setting that is missing, unknown, or not what the command line could give it.
    """
    if not isinstance(saved, dict):
        raise UserError(f"{where} is damaged: its settings are {checkpoint.shown(saved)}")
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    for name in saved:
        if name not in actions:
            raise UserError(f"{where} has a setting {checkpoint.shown(name)} that this version does not know")
    saved = {name: value for name, value in _BEFORE.items() if name in actions} | saved
    for name, action in actions.items():
        if name not in saved and name != "resume":
            raise UserError(f"{where} is damaged: it has no setting {name!r}")
        if name in saved and not _is_setting(action, saved[name]):
            raise UserError(f"{where} is damaged: {name} is {checkpoint.shown(saved[name])}")
    return {name: saved[name] for name in actions if name in saved}


def differing(saved, parser):
    """The settings of a run that are not what its script does by itself: (name, value, default), in the parser's order.

    Those that the run is older than have the value of `_BEFORE`; those that this version does not know are left out.
    """
    saved = _BEFORE | saved
    return [
        (action.dest, saved[action.dest], action.default)
        for action in parser._actions
        if action.dest in saved and action.dest not in ("help", "resume") and saved[action.dest] != _default(action)
    ]


def _default(action):
    """What a command line without this flag has; texts are converted, as argparse does it."""
    return action.type(action.default) if isinstance(action.default, str) and action.type else action.default


def flags(saved, parser):
    """The words of a command line that has these settings."""
    actions = {action.dest: action for action in parser._actions}
    words = []
    for name, value, _ in differing(saved, parser):
        options = [option for option in actions[name].option_strings if option.startswith("--no-") == (value is False)]
        if value is None or not options:
            continue  # no command line says so
        values = value if isinstance(value, (list, tuple)) else [] if isinstance(value, bool) else [value]
        joined = len(values) == 1 and str(values[0]).startswith("-")  # it would be taken for a flag
        words += [f"{options[0]}={values[0]}"] if joined else [options[0], *map(str, values)]
    return words


def _is_setting(action, value):
    """Whether the command line can give `action` this value."""
    if value is None or isinstance(value, bool):
        return type(value) is type(action.default)
    if type(value) not in (int, float, str):
        return False
    try:
        return (action.type or str)(str(value)) == value and (action.choices is None or value in action.choices)
    except (ValueError, argparse.ArgumentTypeError):
        return False

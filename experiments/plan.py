"""A plan: which searches, random genotypes and published ones an experiment compares, and how it trains them.

A TOML file:

    [flags]                  flags of every command below, by their names without the dashes
    [search]                 flags of every search (train_search.py)
    [searches.GROUP]         a group of searches: `seeds`, and flags of its own
    [random.GROUP]           random genotypes: `seeds` that draw them, `search_space`; with `parameters_of`, the name of
                             a group of searches, each has the parameters of a cell found there, within `tolerance`
    [named]                  `genotypes`: published ones, by their names
    [short]                  flags of the short training (train.py) that ranks the genotypes, `seeds`
    [final]                  flags of the final training, `seeds`; `best`: how many genotypes of each group take it

A candidate is one genotype that is compared: GROUP-SEED, or its name. A job is one run of one script; its name is that
of its run folder. Nothing here reads a run: what of a plan has been done is jobs.py's to see.
"""

import difflib
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

import genotypes
import run_folder
import train
import train_search
from utils import UserError

STAGES = ("search", "short", "final")
NAME = "plan.toml"  # of the copy in the folder of an experiment
NAMED = "named"  # the group of the published genotypes
_SCRIPTS = {"train_search.py": train_search, "train.py": train}
_OURS = ("save", "folder", "resume", "seed", "arch")  # flags that are not the plan's to set


@dataclass(frozen=True)
class Job:
    """One run of a script."""

    name: str
    stage: str  # one of STAGES
    candidate: str
    seed: int
    flags: tuple  # of the command line, without --folder

    @property
    def script(self):
        return "train_search.py" if self.stage == "search" else "train.py"

    @property
    def measured_on(self):
        """The images that its accuracy is of."""
        return run_folder.judged_by(self.stage, vars(self.args))

    @property
    def parser(self):
        return _SCRIPTS[self.script].build_parser()

    @cached_property
    def args(self):
        """The settings that the script makes of the flags."""
        return _SCRIPTS[self.script].parse_args(self.flags)


class Candidate(NamedTuple):
    """A genotype that is compared with others."""

    name: str
    group: str
    kind: str  # "searched", "random" or "named"
    seed: int = 0  # of the search, or of the draw; not of a named one
    search_space: str = ""  # of a random one
    budget: str = ""  # of a random one: the candidate that it has the number of parameters of
    tolerance: float = 0.0  # as a share of that number


class Plan(NamedTuple):
    """What a file of a plan says, checked."""

    name: str
    flags: dict  # of the stages: "short" and "final"
    seeds: dict  # of the stages; none where there is no such stage
    best: int  # so many genotypes of each group take the final training
    searches: dict  # candidate -> Job
    candidates: list

    @property
    def network(self):
        """The settings of the network that candidates are compared as: that of the final training, if there is one."""
        return train.parse_args(self.flags["final" if self.seeds["final"] else "short"])

    def source(self, candidate):
        """The search that a candidate depends on, as a Job; None for one that depends on none."""
        return self.searches.get(candidate.budget or candidate.name)

    def epochs(self):
        """Of each stage, the epochs of every one of its jobs, those included that cannot be named yet."""
        members = Counter(candidate.group for candidate in self.candidates)
        finalists = sum(n if group == NAMED else min(n, self.best) for group, n in members.items())
        trainings = {"short": len(self.candidates), "final": finalists}
        found = {"search": [job.args.epochs for job in self.searches.values()]}
        for stage, genotypes_ in trainings.items():
            if self.seeds[stage]:
                found[stage] = [train.parse_args(self.flags[stage]).epochs] * genotypes_ * len(self.seeds[stage])
        return found

    def training(self, stage, candidate, arch):
        """The jobs of a stage, "short" or "final", of one candidate; `arch` is what --arch says."""
        for seed in self.seeds[stage]:
            name = f"{stage}-{candidate.name}-seed{seed}"
            flags = ("--arch", str(arch), *self.flags[stage], "--seed", str(seed))
            yield Job(name, stage, candidate.name, seed, flags)


# ------------------------------------------------------------------------------------------------- reading


def load(path):
    """Read a plan.

    Raises:
        UserError: a file that is missing or no TOML, or a value that is wrong; says which, and what it may be.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the plan {path}: {getattr(error, 'strerror', None) or error}") from None
    return parse(text, path.stem, path)


def parse(text, name, where):
    """The Plan of a TOML text; `where` is what messages call it."""
    try:
        tables = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{where}: not a TOML file: {error}") from None
    try:
        return _plan(tables, name)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _plan(tables, name):
    _known(tables, ("flags", "search", "searches", "random", NAMED, "short", "final"), "the plan")
    for key, table in tables.items():
        if not isinstance(table, dict):
            raise UserError(f"{key} must be a table ([{key}]), got {table!r}")
    shared = tables.get("flags", {})
    if "short" not in tables:
        raise UserError("[short] is missing: how the genotypes are trained that are to be ranked")
    flags, seeds, best = {}, {"short": [], "final": []}, 1
    for stage in [stage for stage in seeds if stage in tables]:
        own = dict(tables[stage])
        seeds[stage] = _seeds(own.pop("seeds", [0]), f"[{stage}]")
        best = own.pop("best", 1) if stage == "final" else best
        flags[stage] = _flags("train.py", shared | own, f"[{stage}]")
    if (shared | tables["short"]).get("train_portion", 1) == 1:
        raise UserError("[short] ranks, and not by the test images: train_portion, such as 0.9, must hold some back")
    if "final" in tables and (shared | tables["final"]).get("train_portion", 1) != 1:
        raise UserError("[final] trains on all images and is tested: put train_portion = 1 there, or in [short] alone")
    if type(best) is not int or best < 1:
        raise UserError(f"[final] best must be a number of genotypes of each group, at least 1, got {best!r}")
    searches = {}
    candidates = list(_searched(tables, shared, searches))
    candidates += _random(tables, candidates)
    candidates += [Candidate(name, NAMED, "named") for name in _named(tables.get(NAMED, {}))]
    if not candidates:
        raise UserError("nothing to compare: it needs [searches.GROUP], [random.GROUP] or [named]")
    names = [candidate.name for candidate in candidates]
    if len({*names}) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"two genotypes would be called {twice}: rename a group")
    return Plan(name, flags, seeds, best, searches, candidates)


def _searched(tables, shared, searches):
    """The candidates of [searches], and in `searches` the jobs that find them."""
    for group, _, seed, own in _members(tables, "searches"):
        candidate = Candidate(f"{group}-{seed}", group, "searched", seed)
        flags = _flags("train_search.py", shared | tables.get("search", {}) | own, f"[searches.{group}]")
        searches[candidate.name] = Job(
            f"search-{candidate.name}", "search", candidate.name, seed, (*flags, "--seed", str(seed))
        )
        yield candidate


def _members(tables, key):
    """(group, which of its seeds, the seed, its other keys), for the groups of [searches] or [random]."""
    for group, own in tables.get(key, {}).items():
        where = f"[{key}.{group}]"
        if not isinstance(own, dict):
            raise UserError(f"[{key}] holds groups ([{key}.NAME]), got {group} = {own!r}")
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,49}", group) or group == NAMED:
            raise UserError(f"{where}: a group is named by up to 50 letters, digits, _, . and -, and not '{NAMED}'")
        own = dict(own)
        if "seeds" not in own:
            raise UserError(f"{where}: seeds is missing, such as seeds = [0, 1, 2]")
        for index, seed in enumerate(_seeds(own.pop("seeds"), where)):
            yield group, index, seed, own


def _random(tables, searched):
    """The candidates of [random]; those of a budget take the searched cells of a group in turn."""
    for group, index, seed, own in _members(tables, "random"):
        where = f"[random.{group}]"
        _known(own, ("search_space", "parameters_of", "tolerance"), where)
        space, of = own.get("search_space", "involution"), own.get("parameters_of")
        tolerance = own.get("tolerance", 0.05)
        if space not in genotypes.SEARCH_SPACES:
            raise UserError(f"{where} search_space must be one of {', '.join(genotypes.SEARCH_SPACES)}, got {space!r}")
        if type(tolerance) not in (int, float) or not 0 < tolerance < 1:
            raise UserError(f"{where} tolerance must be a share of the parameters, between 0 and 1, got {tolerance!r}")
        budgets = [candidate.name for candidate in searched if candidate.group == of]
        if of is not None and not budgets:
            raise UserError(f"{where} parameters_of must name a group of searches, got {of!r}")
        budget = budgets[index % len(budgets)] if budgets else ""
        yield Candidate(f"{group}-{seed}", group, "random", seed, space, budget, tolerance)


def _named(table):
    _known(table, ("genotypes",), f"[{NAMED}]")
    names = table.get("genotypes", [])
    if not isinstance(names, list):
        raise UserError(f"[{NAMED}] genotypes must be a list of names, got {names!r}")
    for name in names:
        if name not in genotypes.NAMED:
            raise UserError(f"[{NAMED}] genotypes: {name!r} is none of {', '.join(genotypes.NAMED)}")
    return names


def _known(table, keys, where):
    for key in table:
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1)
            did_you_mean = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"{where} has {key!r}, which is none of {', '.join(keys)}{did_you_mean}")


def _seeds(seeds, where):
    if not isinstance(seeds, list) or not seeds or any(type(s) is not int or not 0 <= s < 2**63 for s in seeds):
        raise UserError(f"{where} seeds must be a list of integers from 0 on, such as [0, 1, 2], got {seeds!r}")
    if len({*seeds}) < len(seeds):
        raise UserError(f"{where} seeds has one seed twice: {seeds}")
    return seeds


def _flags(script, values, where):
    """Flags of a command line, which its parser has accepted."""
    parser = _SCRIPTS[script].build_parser()
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", *_OURS)}
    flags = []
    for key, value in values.items():
        if key in _OURS:
            raise UserError(f"{where}: --{key} is not for a plan to set" + "; use seeds" * (key == "seed"))
        if key not in actions:
            near = difflib.get_close_matches(key, actions, n=1)
            raise UserError(f"{where}: {script} has no flag --{key}" + "".join(f"; did you mean {n}?" for n in near))
        if actions[key].nargs == 0:
            if not isinstance(value, bool):
                raise UserError(f"{where}: --{key} takes no value: {key} must be true or false, got {value!r}")
            flags += [f"--{key}"] * value
        elif type(value) not in (int, float, str):
            raise UserError(f"{where}: {key} must be a number or a text, got {value!r}")
        else:
            flags += [f"--{key}", str(value)]

    def fail(message):
        raise UserError(f"{where}: {message}")

    parser.error = fail
    parser.parse_args(flags)
    try:
        _SCRIPTS[script].parse_args(flags)  # which has rules of its own
    except UserError as error:
        fail(error)
    return tuple(flags)

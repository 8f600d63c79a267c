"""The vocabulary of the search: genotypes, primitives, search spaces, and how they are read and written.

Glossary (the terms of DARTS, arXiv 1806.09055, used all through this code):

    primitive   the name of a candidate operation, such as `sep_invo_3x3`; `operations.OPS` builds it
    cell        a small directed graph of nodes; `normal` cells keep the resolution, `reduce` cells halve it
    node        a feature map of a cell: 0 and 1 are the outputs of the two cells before, 2, 3, … its own (`steps`)
    edge        an operation from an earlier node to a later one; a node is the sum of its edges
    alphas      the architecture parameters: one number an edge and a primitive; a softmax over the primitives
    genotype    a discrete cell: two (primitive, input node) pairs for every own node, in order, and the nodes
                whose concatenation is the output of the cell
"""

import ast
import csv
import difflib
import json
import random
import re
import warnings
from collections import namedtuple
from pathlib import Path

Genotype = namedtuple("Genotype", "normal normal_concat reduce reduce_concat")

_SHARED = ["none", "max_pool_3x3", "avg_pool_3x3", "skip_connect"]
_INVOLUTIONS = ["sep_invo_3x3", "sep_invo_5x5", "sep_invo_7x7", "dil_invo_3x3", "dil_invo_5x5"]
_CONVOLUTIONS = ["sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5"]

SEARCH_SPACES = {
    "involution": _SHARED + _INVOLUTIONS,
    "darts": _SHARED + _CONVOLUTIONS,
    "mixed": _SHARED + _INVOLUTIONS + _CONVOLUTIONS,
    # S2 to S4 of arXiv 1909.09656, section 3, in which DARTS collapses; its S1 has other primitives on every edge
    "s2": ["skip_connect", "sep_conv_3x3"],
    "s3": ["none", "skip_connect", "sep_conv_3x3"],
    "s4": ["noise", "sep_conv_3x3"],
}
PRIMITIVES = SEARCH_SPACES["involution"]

_ALIASES = {"zero": "none", "no_op": "none", "skip_conn": "skip_connect", "identity": "skip_connect"}
_ALIASES.update(
    (alias + primitive[8:], primitive)
    for primitive in _INVOLUTIONS
    for alias in (("dil_invo2d", "dil_involution") if primitive[:3] == "dil" else ("invo2d", "invo", "involution"))
)

_TOO_DEEP = "malformed genotype: nested too deep"
_LONGEST_MESSAGE = 500  # characters
_LONGEST_TEXT = 20_000  # characters; a genotype of 100 steps has about 10,000

# ------------------------------------------------------------------------------------------- named genotypes

# arXiv 1707.07012
NASNet = Genotype(
    normal=[
        ("sep_conv_5x5", 1), ("sep_conv_3x3", 0),
        ("sep_conv_5x5", 0), ("sep_conv_3x3", 0),
        ("avg_pool_3x3", 1), ("skip_connect", 0),
        ("avg_pool_3x3", 0), ("avg_pool_3x3", 0),
        ("sep_conv_3x3", 1), ("skip_connect", 1),
    ],
    normal_concat=[2, 3, 4, 5, 6],
    reduce=[
        ("sep_conv_5x5", 1), ("sep_conv_7x7", 0),
        ("max_pool_3x3", 1), ("sep_conv_7x7", 0),
        ("avg_pool_3x3", 1), ("sep_conv_5x5", 0),
        ("skip_connect", 3), ("avg_pool_3x3", 2),
        ("sep_conv_3x3", 2), ("max_pool_3x3", 1),
    ],
    reduce_concat=[4, 5, 6],
)  # fmt: skip

# arXiv 1802.01548
AmoebaNet = Genotype(
    normal=[
        ("avg_pool_3x3", 0), ("max_pool_3x3", 1),
        ("sep_conv_3x3", 0), ("sep_conv_5x5", 2),
        ("sep_conv_3x3", 0), ("avg_pool_3x3", 3),
        ("sep_conv_3x3", 1), ("skip_connect", 1),
        ("skip_connect", 0), ("avg_pool_3x3", 1),
    ],
    normal_concat=[4, 5, 6],
    reduce=[
        ("avg_pool_3x3", 0), ("sep_conv_3x3", 1),
        ("max_pool_3x3", 0), ("sep_conv_7x7", 2),
        ("sep_conv_7x7", 0), ("avg_pool_3x3", 1),
        ("max_pool_3x3", 0), ("max_pool_3x3", 1),
        ("conv_7x1_1x7", 0), ("sep_conv_3x3", 5),
    ],
    reduce_concat=[3, 4, 6],
)  # fmt: skip

# the first-order and the second-order result of DARTS (arXiv 1806.09055)
DARTS_V1 = Genotype(
    normal=[
        ("sep_conv_3x3", 1), ("sep_conv_3x3", 0),
        ("skip_connect", 0), ("sep_conv_3x3", 1),
        ("skip_connect", 0), ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 0), ("skip_connect", 2),
    ],
    normal_concat=[2, 3, 4, 5],
    reduce=[
        ("max_pool_3x3", 0), ("max_pool_3x3", 1),
        ("skip_connect", 2), ("max_pool_3x3", 0),
        ("max_pool_3x3", 0), ("skip_connect", 2),
        ("skip_connect", 2), ("avg_pool_3x3", 0),
    ],
    reduce_concat=[2, 3, 4, 5],
)  # fmt: skip
DARTS_V2 = Genotype(
    normal=[
        ("sep_conv_3x3", 0), ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 0), ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 1), ("skip_connect", 0),
        ("skip_connect", 0), ("dil_conv_3x3", 2),
    ],
    normal_concat=[2, 3, 4, 5],
    reduce=[
        ("max_pool_3x3", 0), ("max_pool_3x3", 1),
        ("skip_connect", 2), ("max_pool_3x3", 1),
        ("max_pool_3x3", 0), ("skip_connect", 2),
        ("skip_connect", 2), ("max_pool_3x3", 1),
    ],
    reduce_concat=[2, 3, 4, 5],
)  # fmt: skip

# found with supernets of 8, 10 and 20 cells, in spaces with involution; L8 came out convolutional
DARTS_L8 = Genotype(
    normal=[
        ("dil_conv_3x3", 0), ("skip_connect", 1),
        ("skip_connect", 0), ("skip_connect", 2),
        ("sep_conv_3x3", 2), ("dil_conv_5x5", 0),
        ("skip_connect", 0), ("skip_connect", 2),
    ],
    normal_concat=range(2, 6),
    reduce=[
        ("sep_conv_3x3", 0), ("sep_conv_5x5", 1),
        ("avg_pool_3x3", 1), ("skip_connect", 2),
        ("skip_connect", 2), ("skip_connect", 3),
        ("dil_conv_3x3", 3), ("skip_connect", 1),
    ],
    reduce_concat=range(2, 6),
)  # fmt: skip
DARTS_L10 = Genotype(
    normal=[
        ("sep_invo_3x3", 1), ("sep_invo_3x3", 0),
        ("sep_invo_3x3", 2), ("dil_invo_3x3", 1),
        ("skip_connect", 0), ("skip_connect", 2),
        ("skip_connect", 2), ("skip_connect", 3),
    ],
    normal_concat=range(2, 6),
    reduce=[
        ("avg_pool_3x3", 0), ("sep_invo_5x5", 1),
        ("sep_invo_5x5", 2), ("skip_connect", 0),
        ("avg_pool_3x3", 0), ("dil_invo_5x5", 3),
        ("skip_connect", 4), ("sep_invo_5x5", 0),
    ],
    reduce_concat=range(2, 6),
)  # fmt: skip
DARTS_L20 = Genotype(
    normal=[
        ("sep_invo_3x3", 0), ("sep_invo_3x3", 1),
        ("skip_connect", 0), ("skip_connect", 1),
        ("skip_connect", 0), ("skip_connect", 2),
        ("skip_connect", 0), ("sep_invo_3x3", 1),
    ],
    normal_concat=range(2, 6),
    reduce=[
        ("avg_pool_3x3", 0), ("sep_invo_3x3", 1),
        ("skip_connect", 2), ("avg_pool_3x3", 0),
        ("skip_connect", 2), ("avg_pool_3x3", 0),
        ("avg_pool_3x3", 0), ("skip_connect", 2),
    ],
    reduce_concat=range(2, 6),
)  # fmt: skip
DARTS = DARTS_L10

WHICH_DARTS = "DARTS is DARTS_L10, of involutions; the convolutional result of the DARTS paper is DARTS_V2"
NAMED = {name: value for name, value in list(globals().items()) if isinstance(value, Genotype)}

# --------------------------------------------------------------------------- derived and random genotypes


def derive(weights, primitives):
    """The cell that a softmax of the alphas stands for: (primitive, input node) pairs (arXiv 1806.09055, section 2.4).

    Every node keeps the two incoming edges whose best primitive weighs most, and on each the best primitive; `none`
    takes part in neither choice.

    Args:
        weights: a list of numbers for every edge, one a primitive.
    """
    candidates = [k for k, primitive in enumerate(primitives) if primitive != "none"]
    best = [max(candidates, key=row.__getitem__) for row in weights]  # of equal ones, the first
    gene, offset = [], 0
    while offset < len(weights):
        inputs = 2 + len(gene) // 2
        edges = range(offset, offset + inputs)
        for edge in sorted(edges, key=lambda edge: -weights[edge][best[edge]])[:2]:
            gene.append((primitives[best[edge]], edge - offset))
        offset += inputs
    return gene


def sample(primitives, seed, steps=4):
    """A random genotype, the baseline of a search: uniform over what a search with these primitives can find.

    Every own node reads two different earlier nodes, by primitives other than `none`. The same seed gives the same
    genotype with every version of Python.
    """
    choose = random.Random(seed)
    primitives = [primitive for primitive in primitives if primitive != "none"]

    def edges():
        for node in range(2, 2 + steps):
            first, second = _below(choose, node), _below(choose, node - 1)
            for input in (first, second + (second >= first)):
                yield primitives[_below(choose, len(primitives))], input

    concat = range(2, 2 + steps)
    return Genotype(list(edges()), concat, list(edges()), concat)


def _below(choose, n):
    """An integer of 0 to n - 1; of the generators that random.Random has, `random` alone is promised to stay."""
    return int(choose.random() * n)


# ------------------------------------------------------------------------------------------ reading, writing


def canonical(primitive):
    """The name that `operations.OPS` knows a primitive by: aliases such as `invo2d_3x3` are resolved."""
    return _ALIASES.get(primitive, primitive)


def parse(text):
    """Read a genotype from what a user gives: text is never evaluated, only read as literals.

    Args:
        text: a name in `NAMED`; a `Genotype(...)` expression, with ranges or lists, straight or curly quotes, line
            breaks, any accepted spelling of the primitives; the path of a run folder or of a genotype file (JSON as a
            run writes it, or an expression); or RUN_FOLDER@EPOCH, what a search had found after that epoch.

    Raises:
        ValueError: says in one line what is wrong and where, and offers near names.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's, about the syntax of a text that is then refused
            return _parse(str(text).strip())
    except (RecursionError, MemoryError):
        raise ValueError(_TOO_DEEP) from None
    except ValueError as error:
        raise ValueError(_shorten(" ".join(str(error).split()), _LONGEST_MESSAGE)) from None


def _parse(text):
    if text in NAMED:
        return NAMED[text]
    if text and _exists(text):
        return _read_file(Path(text))
    run, at, epoch = text.rpartition("@")
    if at and run and _exists(run):
        return _read_epoch(Path(run), epoch)
    if "(" in text:
        return _parse_expression(text)
    raise ValueError(
        f"unknown genotype {text[:80]!r}{_did_you_mean(text[:80], NAMED)} (a genotype is one of {', '.join(NAMED)}, "
        "a Genotype(...) expression, the path of a run folder or genotype file, or RUN_FOLDER@EPOCH)"
    )


def format(genotype):
    """One line `Genotype(...)` that `parse` reads back to an equal genotype."""
    fields = (f"{name}={value!r}" for name, value in zip(Genotype._fields, genotype, strict=True))
    return f"Genotype({', '.join(fields)})"


def to_json(genotype):
    """The genotype as JSON text: what a run folder keeps in `genotype.json`."""
    return json.dumps({name: list(value) for name, value in genotype._asdict().items()}, indent=2) + "\n"


def _exists(text):
    try:
        return Path(text).exists()
    except PermissionError:
        return True  # reading it says so
    except (OSError, ValueError):  # a name too long, or with a null byte
        return False


def _read_file(path):
    try:
        if path.is_dir():
            path = path / "genotype.json"
        if not path.is_file():
            if path.with_name("checkpoint.pt").is_file():
                raise ValueError(f"{path.parent} has no genotype yet: the first epoch of that search has not ended")
            raise ValueError(f"{path.parent} has no genotype.json: is it the folder of a run?")
        with path.open(errors="replace") as file:
            text = file.read(_LONGEST_TEXT + 1).strip()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    if not text:
        raise ValueError(f"{path} is empty: it holds no genotype")
    try:
        return _parse_json(text) if text.startswith("{") else _parse_expression(text)
    except (ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{path}: {error if isinstance(error, ValueError) else _TOO_DEEP}") from None


def _read_epoch(folder, epoch):
    """The genotype that a search had after an epoch: of the row of its metrics.csv."""
    path = folder / "metrics.csv"
    try:
        with path.open(newline="", errors="replace") as file:
            found = {row.get("epoch"): row.get("genotype") for row in csv.DictReader(file)}
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{folder} has no metrics.csv: no epoch of it has ended, or it is no run") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except csv.Error as error:
        raise ValueError(f"{path}: {error}") from None
    if not found or None in found.values():
        raise ValueError(f"{path} has no genotypes: those of epochs are kept by searches alone")
    if epoch not in found:
        first, *_, last = *found, *found
        raise ValueError(f"{folder} has no epoch {epoch[:20]!r}; its epochs are {first} to {last}")
    try:
        return _parse_expression(found[epoch])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _parse_json(text):
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not a JSON genotype: {error}") from None
    if not isinstance(fields, dict) or set(fields) != set(Genotype._fields):
        raise ValueError(f"a genotype has the fields {', '.join(Genotype._fields)}, got {_shorten(text)}")
    for name in ("normal_concat", "reduce_concat"):
        nodes = fields[name]
        if isinstance(nodes, list) and nodes and type(nodes[0]) is int:
            consecutive = range(nodes[0], nodes[0] + len(nodes))
            fields[name] = consecutive if nodes == list(consecutive) else nodes  # as `Network.genotype()` makes it
    return _validate(fields)


def _parse_expression(text):
    if len(text) > _LONGEST_TEXT:
        raise ValueError(f"a genotype text has at most {_LONGEST_TEXT} characters, got {len(text)} or more")
    text = re.sub("[‘’‚‛′`]", "'", re.sub("[“”„‟″]", '"', text))
    text = re.sub(r"^\w+\s*=\s*(?=Genotype)", "", text.replace("\u00a0", " ").strip())  # a whole line of a log
    if len(text) > 1 and text[0] in "'\"" and text[-1] == text[0]:
        text = text[1:-1].strip()
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        near = (error.text or "").rstrip()[max(0, (error.offset or 1) - 20) :][:40]
        raise ValueError(f"malformed genotype: {error.msg} (line {error.lineno}, near {near!r})") from None
    except ValueError as error:
        raise ValueError(f"malformed genotype: {error}") from None
    if not (isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id == "Genotype"):
        raise ValueError(f"a genotype expression must be Genotype(...), got {_shorten(text)!r}")
    names = [*Genotype._fields[: len(tree.args)], *(keyword.arg for keyword in tree.keywords)]
    nodes = [*tree.args, *(keyword.value for keyword in tree.keywords)]
    if sorted(map(str, names)) != sorted(Genotype._fields) or len(nodes) != len(names):
        got = _shorten(", ".join(map(str, names)))
        raise ValueError(f"Genotype takes {', '.join(Genotype._fields)}, each once; got {got}")
    return _validate({name: _literal(node, name) for name, node in zip(names, nodes, strict=True)})


def _literal(node, where):
    """The value of a syntax tree made of lists, tuples, strings, integers and range(...) alone."""
    if isinstance(node, ast.Constant) and type(node.value) is str:
        return node.value
    if isinstance(node, ast.Constant) and type(node.value) is int and node.value < _LONGEST_TEXT:
        return node.value
    if isinstance(node, (ast.List, ast.Tuple)):
        values = [_literal(element, where) for element in node.elts]
        return values if isinstance(node, ast.List) else tuple(values)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range":
        bounds = [_literal(argument, where) for argument in node.args]
        if 1 <= len(bounds) <= 3 and not node.keywords and all(type(b) is int for b in bounds) and bounds[2:] != [0]:
            return range(*bounds)
    source = _shorten(ast.unparse(node))
    raise ValueError(f"{where} may hold lists, tuples, strings, integers and range(...), got {source!r}")


def _validate(fields):
    """The fields as a Genotype with canonical primitives, every index of which exists."""
    steps = {}
    for cell in ("normal", "reduce"):
        fields[cell] = _validate_edges(cell, fields[cell])
        steps[cell] = len(fields[cell]) // 2
        name = f"{cell}_concat"
        nodes = fields[name]
        if not isinstance(nodes, (list, tuple, range)) or len(nodes) == 0 or len(nodes) > steps[cell] + 2:
            raise ValueError(f"{name} must list between 1 and {steps[cell] + 2} nodes, got {_shorten(repr(nodes))}")
        for node in nodes:
            first = 2 if cell == "reduce" else 0  # the inputs of a reduction cell are not halved
            if type(node) is not int or not first <= node < steps[cell] + 2:
                raise ValueError(f"{name}: node {node!r} does not exist; it may list {first} to {steps[cell] + 1}")
        fields[name] = list(nodes) if isinstance(nodes, tuple) else nodes
    return Genotype(**fields)


def _validate_edges(cell, edges):
    if not isinstance(edges, (list, tuple)) or len(edges) == 0 or len(edges) % 2:
        raise ValueError(f"{cell} must list two (primitive, node) pairs for every node, got {_shorten(repr(edges))}")
    result = []
    for k, edge in enumerate(edges):
        if not isinstance(edge, (list, tuple)) or len(edge) != 2:
            raise ValueError(f"{cell}[{k}] must be a (primitive, node) pair, got {_shorten(repr(edge))}")
        primitive, node = canonical(edge[0]) if isinstance(edge[0], str) else edge[0], edge[1]
        if primitive not in known_primitives():
            near = _did_you_mean(primitive, [*known_primitives(), *_ALIASES])
            raise ValueError(f"{cell}[{k}]: unknown primitive {_shorten(repr(primitive))}{near}")
        if type(node) is not int or not 0 <= node < 2 + k // 2:
            raise ValueError(
                f"{cell}[{k}]: input node {node!r} does not exist yet; node {2 + k // 2} may read 0 to {1 + k // 2}"
            )
        result.append((primitive, node))
    return result


def known_primitives():
    """Every canonical primitive that a genotype may name: those of all search spaces, and two of NASNet's."""
    searched = (primitive for space in SEARCH_SPACES.values() for primitive in space)
    return list(dict.fromkeys([*searched, "sep_conv_7x7", "conv_7x1_1x7"]))


def _did_you_mean(name, names):
    near = difflib.get_close_matches(str(name), list(names), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _shorten(text, length=60):
    return text if len(text) <= length else text[: length - 3] + "..."

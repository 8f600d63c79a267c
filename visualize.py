"""Draw the two cells of a genotype with graphviz, and how they and the alphas changed during a search.

python visualize.py DARTS
python visualize.py "Genotype(normal=[...], ...)" --format svg
python visualize.py runs/search-EXP-20250101-120000
python visualize.py runs/search-EXP-20250101-120000 --what alphas        # the weights of the primitives over the epochs
python visualize.py runs/search-EXP-20250101-120000 --what evolution     # an animated GIF of the cells
"""

import csv
import io
import itertools
import logging
import os
from pathlib import Path

import graphviz
from PIL import Image, ImageDraw, ImageFont

import genotypes
import utils
from watch import alphas

logger = logging.getLogger("darts.visualize")

INSTALL_DOT = "install Graphviz's dot program to draw cells (apt install graphviz, brew install graphviz, conda …)"
_INPUT, _NODE, _OUTPUT = "#b9d9c0", "#b6d3ea", "#f0dca0"  # fill colours
_INDEXED = (  # a label with a subscript; cells of a table stand where they should in every format and viewer
    '<<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0" CELLPADDING="0"><TR><TD>c</TD>'
    '<TD VALIGN="BOTTOM"><FONT POINT-SIZE="12">{}</FONT></TD></TR></TABLE>>'
)


class DrawingError(utils.UserError):
    """Graphviz cannot draw: not installed, or not able to make this kind of picture."""


def cell_graph(edges, concat, title):
    """A cell as a graphviz.Digraph: its inputs, its own nodes, and the nodes that make its output.

    Primitives are nodes too, without a box, in the middle of their lines: dot leads lines around nodes, so that none
    crosses a label.

    Args:
        edges: two (primitive, input node) pairs for every own node.
        concat: the nodes whose concatenation is the output.
        title: what an SVG names itself, in one line.
    """
    graph = _empty_cell(len(edges) // 2, concat, title)
    for k, (primitive, node) in enumerate(edges):
        _add_edge(graph, f"edge {k}", primitive, node, 2 + k // 2)
    return graph


def _node_names(steps):
    """The names of a cell's nodes in a graph, by their numbers."""
    return ["c_{k-2}", "c_{k-1}", *(str(i) for i in range(steps))]


def _empty_cell(steps, concat, title):
    """The nodes of a cell, and the lines from those of `concat` to its output."""
    graph = graphviz.Digraph(
        title,
        graph_attr=dict(rankdir="LR", ranksep="0.32", nodesep="0.18"),
        node_attr=dict(style="filled", shape="box", fontname="Helvetica", fontsize="18", height="0.45", penwidth="0"),
        edge_attr=dict(color="#555555", arrowsize="0.8"),
    )
    names = _node_names(steps)
    with graph.subgraph(graph_attr=dict(rank="same")) as inputs:
        for name, index in zip(names, ("k−2", "k−1"), strict=False):
            inputs.node(name, _INDEXED.format(index), fillcolor=_INPUT)
        inputs.edge(*names[:2], style="invis")  # the first one above
    for name in names[2:]:
        graph.node(name, fillcolor=_NODE)
    graph.node("c_{k}", _INDEXED.format("k"), fillcolor=_OUTPUT)
    for node in concat:
        graph.edge(names[node], "c_{k}", style="dashed")
    return graph


def _add_edge(graph, label, primitive, start, end, line=None, **text):
    """An edge from a node to a later one, by their numbers: attributes of its lines and of its label may be given."""
    names = _node_names(end - 1)
    graph.node(
        label, primitive, **(dict(shape="plaintext", style="", fontsize="15", height="0.3", margin="0.04,0") | text)
    )
    graph.edge(names[start], f"{label}:w", arrowhead="none", **(line or {}))
    graph.edge(f"{label}:e", names[end], **(line or {}))


def draw(genotype, folder, format="png", name="a genotype"):
    """Write `normal.*` and `reduction.*` into a folder: the graphviz source (.gv) and the picture.

    Args:
        name: what the pictures say they are the cells of.

    Returns:
        The paths of the two pictures.

    Raises:
        DrawingError: graphviz cannot draw here; both sources are written all the same.
    """
    name = "".join(c if c.isprintable() and c != "\\" else "?" for c in " ".join(name.split()))  # fit for XML and dot
    pictures, failure = [], None
    for kind, edges, concat in (
        ("normal", genotype.normal, genotype.normal_concat),
        ("reduction", genotype.reduce, genotype.reduce_concat),
    ):
        graph = cell_graph(edges, concat, f"{kind} cell of {name}")
        if format == "png":
            graph.graph_attr["dpi"] = "110"
        utils.write_text(Path(folder) / f"{kind}.gv", graph.source)
        try:
            picture = graph.pipe(format=format, quiet=True)
        except (graphviz.ExecutableNotFound, PermissionError):
            failure = INSTALL_DOT
            continue
        except graphviz.CalledProcessError as error:
            failure = f"dot failed on {folder}/{kind}.gv with exit code {error.returncode}"
            continue
        path = Path(folder) / f"{kind}.{format}"
        with utils.replacing(path) as temporary:
            temporary.write_bytes(picture)
        pictures.append(path)
    if failure:
        raise DrawingError(f"{folder} holds the cells as normal.gv and reduction.gv only: {failure}")
    return pictures


# ---------------------------------------------------------------------------------------- from epoch to epoch

_CHANGED = "#d55e00"  # what a frame has that the one before did not have
_FRAME_MS, _LAST_MS = 900, 4000
EVOLUTION = "evolution.gif"


def draw_evolution(history, path):
    """Write an animated GIF of the cells of a search: a frame for every time that the genotype changed.

    All frames have the same layout: a cell has the places of all edges that any of its genotypes has. What is new in a
    frame is coloured. The last frame stays longest.

    Args:
        history: a dict for every epoch with `epoch`, `valid_acc` (percent) and `genotype` (as a text).

    Raises:
        DrawingError: graphviz cannot draw here.
    """
    groups = [list(rows) for _, rows in itertools.groupby(history, key=lambda row: row["genotype"])]
    found = [genotypes.parse(rows[0]["genotype"]) for rows in groups]
    normal = _frames([(genotype.normal, genotype.normal_concat) for genotype in found])
    reduction = _frames([(genotype.reduce, genotype.reduce_concat) for genotype in found])
    frames = []
    for rows, *graphs in zip(groups, normal, reduction, strict=True):
        first, last = int(rows[0]["epoch"]), int(rows[-1]["epoch"])
        epochs = f"epoch {first}" if first == last else f"epochs {first} to {last}"
        text = f"{epochs} of {int(history[-1]['epoch'])}: validation accuracy {float(rows[-1]['valid_acc']):.1f} %"
        frames.append(_compose(text, [_picture(graph, path) for graph in graphs]))
    durations = [_FRAME_MS] * (len(frames) - 1) + [_LAST_MS]
    with utils.replacing(path) as temporary:
        frames[0].save(temporary, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)


def _frames(cells):
    """Graphs of one layout, of the cells (edges, concat) that one cell was in turn."""
    by_place = [{(node, 2 + k // 2): primitive for k, (primitive, node) in enumerate(edges)} for edges, _ in cells]
    places = sorted(set().union(*by_place), key=lambda place: (place[1], place[0]))
    longest = max(len(primitive) for edges in by_place for primitive in edges.values())
    size = dict(width=str(0.12 * longest + 0.15), fixedsize="true")
    for k, (edges, concat) in enumerate(zip(by_place, (concat for _, concat in cells), strict=True)):
        graph = _empty_cell(max(end for _, end in places) - 1, concat, "cell")
        graph.graph_attr["dpi"] = "80"
        for place in places:
            if place not in edges:
                look, line = dict(style="invis"), dict(style="invis")
            elif k and by_place[k - 1].get(place) != edges[place]:
                look, line = dict(fontcolor=_CHANGED), dict(color=_CHANGED, penwidth="2")
            else:
                look, line = {}, {}
            _add_edge(graph, f"edge {place}", edges.get(place, "none"), *place, line, **look, **size)
        yield graph


def _picture(graph, path):
    """A graph as a Pillow image."""
    try:
        return Image.open(io.BytesIO(graph.pipe(format="png", quiet=True))).convert("RGB")
    except (graphviz.ExecutableNotFound, PermissionError):
        raise DrawingError(f"{path} is not made: {INSTALL_DOT}") from None
    except graphviz.CalledProcessError as error:
        raise DrawingError(f"{path} is not made: dot failed with exit code {error.returncode}") from None


def _compose(text, cells):
    """A frame: a line of text, then the normal and the reduction cell."""
    margin, line = 12, 26  # pixels
    width = max(cell.width for cell in cells) + 2 * margin
    height = margin + line + sum(line + cell.height + margin for cell in cells)
    frame = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(frame)
    pen.text((margin, margin), text, fill="black", font=ImageFont.load_default(20))
    y = margin + line
    for name, cell in zip(alphas.CELLS.values(), cells, strict=True):
        pen.text((margin, y + 6), f"{name} cell", fill="#555555", font=ImageFont.load_default(16))
        frame.paste(cell, (margin, y + line))
        y += line + cell.height + margin
    return frame


def read_history(run):
    """The rows of a search's metrics.csv, with the genotype of every epoch.

    Raises:
        UserError: a folder of something else, or a damaged file.
    """
    path = Path(run) / "metrics.csv"
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            int(row["epoch"]), float(row["valid_acc"]), genotypes.parse(row["genotype"])
    except FileNotFoundError:
        rows = []
    except KeyError as error:
        raise utils.UserError(f"{path} has no column {error}: not a search, whose cells change") from None
    except (ValueError, TypeError, csv.Error) as error:
        raise utils.UserError(f"{path} is damaged: {error}") from None
    if not rows:
        raise utils.UserError(f"{run} has no epochs in a metrics.csv: give the folder of a search")
    return rows


# ------------------------------------------------------------------------------------------------ command line


def _parse_with_name(text):
    """The genotype that a text gives, and what to call it: the text, an expression in its usual form."""
    genotype = genotypes.parse(text)
    return genotype, genotypes.format(genotype) if "Genotype(" in text else text


def parse_args(argv=None):
    parser = utils.ArgumentParser(description="Draw the cells of a genotype, or how a search came to them.")
    parser.add_argument(
        "genotype",
        type=utils.user_value(_parse_with_name),
        help=f"a name ({', '.join(genotypes.NAMED)}), a Genotype(...) expression, a run folder (RUN@EPOCH: as it was "
        "after that epoch) or a genotype file; "
        f"{genotypes.WHICH_DARTS}",
    )
    parser.add_argument(
        "--what",
        choices=("cells", "alphas", "evolution"),
        default="cells",
        help="of the run folder of a search also the weights of the primitives over its epochs, or a GIF of its cells",
    )
    parser.add_argument("--format", choices=("pdf", "png", "svg"), help="kind of picture (default: pdf)")
    parser.add_argument("--output", default=".", help="folder that the pictures go to")
    args = parser.parse_args(argv)
    if args.what == "evolution" and args.format is not None:
        parser.error(f"--format {args.format}: an evolution is a GIF; leave --format out")
    return args


def main():
    args = parse_args()
    genotype, name = args.genotype
    folder, format = Path(args.output), args.format or "pdf"
    if args.what != "cells" and not os.path.isdir(name):
        raise utils.UserError(f"--what {args.what} needs the run folder of a search, got {name[:80]!r}")
    history = read_history(name) if args.what == "evolution" else None
    trajectory = alphas.read(Path(name) / alphas.NAME) if args.what == "alphas" else None
    try:
        with utils.filling(folder):
            if history:
                pictures = [folder / EVOLUTION]
                draw_evolution(history, *pictures)
            elif trajectory:
                pictures = alphas.draw(trajectory, folder, format)
            else:
                pictures = draw(genotype, folder, format, name)
    except OSError as error:
        what = error.filename or args.output
        raise utils.UserError(f"cannot write to --output {args.output}: {what}: {error.strerror}") from None
    for path in pictures:
        print(path)


if __name__ == "__main__":
    utils.run_script(main)

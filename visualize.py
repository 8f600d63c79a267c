"""Draw the two cells of a genotype with graphviz.

python visualize.py DARTS
python visualize.py "Genotype(normal=[...], ...)" --format svg
python visualize.py runs/search-EXP-20250101-120000
"""

import logging
from pathlib import Path

import graphviz

import genotypes
import utils

logger = logging.getLogger("darts.visualize")

INSTALL_DOT = "install Graphviz's dot program to draw cells (apt install graphviz, brew install graphviz, conda …)"
_INPUT, _NODE, _OUTPUT = "#b9d9c0", "#b6d3ea", "#f0dca0"  # fill colours


class DrawingError(utils.UserError):
    """Graphviz cannot draw: not installed, or not able to make this kind of picture."""


def cell_graph(edges, concat):
    """A cell as a graphviz.Digraph: its inputs, its own nodes, and the nodes that make its output.

    Args:
        edges: two (primitive, input node) pairs for every own node.
        concat: the nodes whose concatenation is the output.
    """
    graph = graphviz.Digraph(
        graph_attr=dict(rankdir="LR", ranksep="0.6", nodesep="0.25", fontname="Helvetica"),
        node_attr=dict(style="filled", shape="box", fontname="Helvetica", fontsize="18", height="0.45", penwidth="0"),
        edge_attr=dict(fontname="Helvetica", fontsize="15", color="#555555", arrowsize="0.8"),
    )
    names = ["c_{k-2}", "c_{k-1}", *(str(i) for i in range(len(edges) // 2))]
    for name in names:
        graph.node(name, fillcolor=_INPUT if name in names[:2] else _NODE)
    graph.node("c_{k}", fillcolor=_OUTPUT)
    for k, (primitive, node) in enumerate(edges):
        graph.edge(names[node], names[2 + k // 2], label=f" {primitive} ")
    for node in concat:
        graph.edge(names[node], "c_{k}", style="dashed")
    return graph


def draw(genotype, folder, format="png"):
    """Write `normal.*` and `reduction.*` into a folder: the graphviz source (.gv) and the picture.

    Returns:
        The paths of the two pictures.

    Raises:
        DrawingError: graphviz cannot draw here; both sources are written all the same.
    """
    pictures, failure = [], None
    for name, edges, concat in (
        ("normal", genotype.normal, genotype.normal_concat),
        ("reduction", genotype.reduce, genotype.reduce_concat),
    ):
        graph = cell_graph(edges, concat)
        if format == "png":
            graph.graph_attr["dpi"] = "110"
        utils.write_text(Path(folder) / f"{name}.gv", graph.source)
        try:
            picture = graph.pipe(format=format, quiet=True)
        except (graphviz.ExecutableNotFound, PermissionError):
            failure = INSTALL_DOT
            continue
        except graphviz.CalledProcessError as error:
            failure = f"dot failed on {folder}/{name}.gv with exit code {error.returncode}"
            continue
        path = Path(folder) / f"{name}.{format}"
        with utils.replacing(path) as temporary:
            temporary.write_bytes(picture)
        pictures.append(path)
    if failure:
        raise DrawingError(f"{folder} holds the cells as normal.gv and reduction.gv only: {failure}")
    return pictures


def parse_args(argv=None):
    parser = utils.ArgumentParser(description="Draw the normal and the reduction cell of a genotype.")
    parser.add_argument(
        "genotype",
        type=utils.user_value(genotypes.parse),
        help=f"a name ({', '.join(genotypes.NAMED)}), a Genotype(...) expression, a run folder or a genotype file",
    )
    parser.add_argument("--format", choices=("pdf", "png", "svg"), default="pdf", help="kind of picture")
    parser.add_argument("--output", default=".", help="folder that the pictures go to")
    return parser.parse_args(argv)


def main():
    args = parse_args()
    try:
        Path(args.output).mkdir(parents=True, exist_ok=True)
        pictures = draw(args.genotype, args.output, args.format)
    except OSError as error:
        raise utils.UserError(f"cannot write to --output {args.output}: {error.strerror}") from None
    for path in pictures:
        print(path)


if __name__ == "__main__":
    utils.run_script(main)

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
    graph = graphviz.Digraph(
        title,
        graph_attr=dict(rankdir="LR", ranksep="0.32", nodesep="0.18"),
        node_attr=dict(style="filled", shape="box", fontname="Helvetica", fontsize="18", height="0.45", penwidth="0"),
        edge_attr=dict(color="#555555", arrowsize="0.8"),
    )
    names = ["c_{k-2}", "c_{k-1}", *(str(i) for i in range(len(edges) // 2))]
    with graph.subgraph(graph_attr=dict(rank="same")) as inputs:
        for name, index in zip(names, ("k−2", "k−1"), strict=False):
            inputs.node(name, _INDEXED.format(index), fillcolor=_INPUT)
        inputs.edge(*names[:2], style="invis")  # the first one above
    for name in names[2:]:
        graph.node(name, fillcolor=_NODE)
    graph.node("c_{k}", _INDEXED.format("k"), fillcolor=_OUTPUT)
    for k, (primitive, node) in enumerate(edges):
        label, target = f"edge {k}", names[2 + k // 2]
        graph.node(label, primitive, shape="plaintext", style="", fontsize="15", height="0.3", margin="0.04,0")
        graph.edge(names[node], f"{label}:w", arrowhead="none")
        graph.edge(f"{label}:e", target)
    for node in concat:
        graph.edge(names[node], "c_{k}", style="dashed")
    return graph


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


def _parse_with_name(text):
    """The genotype that a text gives, and what to call it: the text, an expression in its usual form."""
    genotype = genotypes.parse(text)
    return genotype, genotypes.format(genotype) if "Genotype(" in text else text


def parse_args(argv=None):
    parser = utils.ArgumentParser(description="Draw the normal and the reduction cell of a genotype.")
    parser.add_argument(
        "genotype",
        type=utils.user_value(_parse_with_name),
        help=f"a name ({', '.join(genotypes.NAMED)}), a Genotype(...) expression, a run folder (RUN@EPOCH: as it was "
        "after that epoch) or a genotype file; "
        f"{genotypes.WHICH_DARTS}",
    )
    parser.add_argument("--format", choices=("pdf", "png", "svg"), default="pdf", help="kind of picture")
    parser.add_argument("--output", default=".", help="folder that the pictures go to")
    return parser.parse_args(argv)


def main():
    args = parse_args()
    genotype, name = args.genotype
    try:
        Path(args.output).mkdir(parents=True, exist_ok=True)
        pictures = draw(genotype, args.output, args.format, name)
    except OSError as error:
        raise utils.UserError(f"cannot write to --output {args.output}: {error.strerror}") from None
    for path in pictures:
        print(path)


if __name__ == "__main__":
    utils.run_script(main)

"""Reading and writing genotypes: round trips, every spelling, and text that must be refused without being run."""

import json
import os
import random
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

import genotypes
from genotypes import Genotype

L10_IN_CURLY_QUOTES = """
        Genotype(normal=[(‘invo2d_3x3’, 1), (‘invo2d_3x3’, 0), (‘invo2d_3x3’, 2),
        (‘dil_invo2d_3x3’, 1), (‘skip_conn’, 0), (‘skip_conn’, 2), (‘skip_conn’, 2),
        (‘skip_conn’, 3)], normal_concat=range(2, 6),
        reduce=[(‘avg_pool_3x3’, 0), (‘invo2d_5x5’, 1), (‘invo2d_5x5’, 2),
        (‘skip_conn’, 0), (‘avg_pool_3x3’, 0), (‘dil_invo2d_5x5’, 3),
        (‘skip_conn’, 4), (‘invo2d_5x5’, 0)], reduce_concat=range(2, 6))
"""
GOOD = (
    "Genotype(normal=[('none', 0), ('none', 1)], normal_concat=[2], "
    "reduce=[('none', 0), ('none', 1)], reduce_concat=[2])"
)


@st.composite
def random_genotypes(draw):
    fields = {}
    for cell in ("normal", "reduce"):
        steps = draw(st.integers(1, 6))
        edges = [
            (draw(st.sampled_from(genotypes.known_primitives())), draw(st.integers(0, 1 + k // 2)))
            for k in range(2 * steps)
        ]
        first = draw(st.integers(2, 1 + steps))
        nodes = draw(st.sampled_from([range(first, 2 + steps), list(range(first, 2 + steps)), [first]]))
        fields |= {cell: edges, f"{cell}_concat": nodes}
    return Genotype(**fields)


@given(random_genotypes())
def test_text_round_trip(genotype):
    text = genotypes.format(genotype)
    assert "\n" not in text
    assert genotypes.parse(text) == genotype


@pytest.mark.parametrize("space", genotypes.SEARCH_SPACES)
def test_sample_is_uniform_over_the_space(space):
    """Over many seeds: every primitive but `none`, and every pair of inputs of the last node, about as often."""
    primitives = genotypes.SEARCH_SPACES[space]
    found = [genotypes.sample(primitives, seed) for seed in range(2000)]
    counts = Counter(primitive for genotype in found for primitive, _ in genotype.normal + genotype.reduce)
    assert set(counts) == {*primitives} - {"none"}
    assert max(counts.values()) < 1.15 * min(counts.values())
    pairs = Counter(frozenset(node for _, node in genotype.reduce[-2:]) for genotype in found)
    assert len(pairs) == 10 and all(len(pair) == 2 for pair in pairs)  # of five nodes
    assert max(pairs.values()) < 1.5 * min(pairs.values())


def test_sample_is_a_function_of_the_seed():
    once, again, other = (genotypes.sample(genotypes.PRIMITIVES, seed) for seed in (3, 3, 4))
    assert once == again != other
    assert genotypes.parse(genotypes.format(once)) == once
    assert once.normal[:2] == [("skip_connect", 0), ("sep_invo_5x5", 1)]  # for good: runs name seeds


@given(random_genotypes())
def test_file_round_trip(tmp_path_factory, genotype):
    folder = tmp_path_factory.mktemp("run")
    (folder / "genotype.json").write_text(genotypes.to_json(genotype))
    for path in (folder, folder / "genotype.json"):
        read = genotypes.parse(path)
        assert (read.normal, read.reduce) == (genotype.normal, genotype.reduce)
        assert list(read.normal_concat) == list(genotype.normal_concat)
        assert list(read.reduce_concat) == list(genotype.reduce_concat)


def test_a_file_may_hold_an_expression(tmp_path):
    path = tmp_path / "found (1).txt"
    path.write_text(L10_IN_CURLY_QUOTES)
    assert genotypes.parse(path) == genotypes.DARTS_L10


@pytest.mark.parametrize("name", genotypes.NAMED)
def test_named_genotypes_are_valid(name):
    named = genotypes.parse(name)
    assert genotypes.parse(genotypes.format(named)) == named


def test_the_named_genotypes_are_the_published_ones():
    assert set(genotypes.NAMED) == {
        *("NASNet", "AmoebaNet", "DARTS_V1", "DARTS_V2"),
        *("DARTS", "DARTS_L8", "DARTS_L10", "DARTS_L20"),
    }
    assert genotypes.DARTS == genotypes.DARTS_L10
    assert genotypes.DARTS_L20.reduce[-2:] == [("avg_pool_3x3", 0), ("skip_connect", 2)]


def test_search_spaces():
    spaces = genotypes.SEARCH_SPACES
    assert genotypes.PRIMITIVES == spaces["involution"] and len(spaces["involution"]) == 9
    assert spaces["darts"] == (
        "none max_pool_3x3 avg_pool_3x3 skip_connect sep_conv_3x3 sep_conv_5x5 dil_conv_3x3 dil_conv_5x5".split()
    )
    assert set(spaces["mixed"]) == {*spaces["involution"], *spaces["darts"]}


@pytest.mark.parametrize(
    "text",
    [
        L10_IN_CURLY_QUOTES,
        L10_IN_CURLY_QUOTES.replace("‘", "“").replace("’", "”"),
        '"' + L10_IN_CURLY_QUOTES.strip() + '"',
        "'" + L10_IN_CURLY_QUOTES.strip() + "'",
        "genotype = " + L10_IN_CURLY_QUOTES.strip(),
        L10_IN_CURLY_QUOTES.replace(", ", ",                   "),
        L10_IN_CURLY_QUOTES.replace("invo2d", "invo"),
        L10_IN_CURLY_QUOTES.replace("‘invo2d", "‘sep_invo").replace("dil_invo2d", "dil_involution"),
        L10_IN_CURLY_QUOTES.replace("skip_conn", "identity").replace("‘invo2d", "‘involution"),
        L10_IN_CURLY_QUOTES.replace("normal=", "")
        .replace("normal_concat=", "")
        .replace("reduce=", "")
        .replace("reduce_concat=", ""),
    ],
)
def test_every_accepted_way_of_writing(text):
    assert genotypes.parse(text) == genotypes.DARTS_L10


@pytest.mark.parametrize(
    "alias, primitive",
    [
        *[(a, "none") for a in ("none", "zero", "no_op")],
        *[(a, "skip_connect") for a in ("skip_connect", "skip_conn", "identity")],
        *[
            (f"{a}_{k}x{k}", f"sep_invo_{k}x{k}")
            for k in (3, 5, 7)
            for a in ("sep_invo", "invo2d", "invo", "involution")
        ],
        *[(f"{a}_{k}x{k}", f"dil_invo_{k}x{k}") for k in (3, 5) for a in ("dil_invo", "dil_invo2d", "dil_involution")],
    ],
)
def test_spellings(alias, primitive):
    assert genotypes.parse(GOOD.replace("none", alias)).normal == [(primitive, 0), (primitive, 1)]


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "unknown genotype ''"),
        ("DRATS", "did you mean DARTS"),
        ("DARTS_L9", "did you mean DARTS_L"),
        ("no/such/folder", "unknown genotype"),
        ("Genotype(normal=[('none', 0), ('none', 1)]", "malformed genotype: '(' was never closed"),
        (GOOD[:-3], "malformed genotype"),
        (GOOD.replace("'none', 0", "'none' 0"), "malformed genotype"),
        (GOOD.replace("'none', 0", "'nine', 0"), "normal[0]: unknown primitive 'nine'; did you mean none"),
        (GOOD.replace("'none', 0", "'sep_invo_3x4', 0"), "did you mean sep_invo_3x3"),
        (GOOD.replace("'none', 0", "None, 0"), "normal may hold lists"),
        (GOOD.replace("'none', 0", "5, 0"), "normal[0]: unknown primitive 5"),
        (GOOD.replace("'none', 1", "'none', 2"), "input node 2 does not exist yet; node 2 may read 0 to 1"),
        (GOOD.replace("'none', 1", "'none', -1"), "got '-1'"),
        (GOOD.replace("'none', 1", "'none', True"), "got 'True'"),
        (GOOD.replace("'none', 1", "'none', '1'"), "input node '1' does not exist yet"),
        (GOOD.replace("'none', 1", "'none'"), "must be a (primitive, node) pair"),
        (GOOD.replace(", ('none', 1)", "", 1), "two (primitive, node) pairs for every node"),
        (GOOD.replace("[2]", "[3]", 1), "node 3 does not exist; it may list 0 to 2"),
        (
            GOOD.replace("reduce_concat=[2]", "reduce_concat=[1]"),
            "reduce_concat: node 1 does not exist; it may list 2 to 2",
        ),
        (GOOD.replace("[2]", "[]", 1), "normal_concat must list between 1 and"),
        (GOOD.replace("[2]", "range(2, 999999999)", 1), "may hold"),
        (GOOD.replace("[2]", "range(2, 19999)", 1), "must list between 1 and"),
        (GOOD.replace("[2]", "range(2, 3, 0)", 1), "may hold"),
        (GOOD.replace("[2]", "2", 1), "must list between"),
        (GOOD.replace("normal=", "nromal="), "each once; got nromal"),
        (GOOD.replace("reduce=", "normal="), "each once"),
        (GOOD.replace("Genotype", "Genotyp"), "must be Genotype(...)"),
        (GOOD.replace("Genotype(", "Genotype(**{}, "), "each once"),
        (GOOD.replace("Genotype(", "Genotype(*[1], "), "each once"),
        (GOOD + "; 1", "malformed"),
        ("Genotype(" * 2000, "malformed"),
        ("Genotype(" + "[" * 9000 + "]" * 9000 + ")", "malformed"),
        ("Genotype(" + "9" * 5000 + ")", "malformed"),
        ("Genotype(" + "-" * 15000 + "1)", ""),
        ("Genotype(" + " " * 30000 + ")", "at most 20000 characters"),
        (GOOD.replace("0", "[" * 500 + "]" * 500, 1), "malformed"),
        (GOOD.replace("0", "-" * 900 + "1", 1), "malformed genotype: nested too deep"),
        (GOOD.replace("0", "-" * 5000 + "1", 1), "malformed"),
        (GOOD.replace("0", "'" + "0" * 9000 + "'", 1), "input node '0000"),
        (GOOD.replace("0", "1if 1else 2", 1), "may hold"),
        (GOOD.replace("0", "1 is 1", 1), "may hold"),
        (GOOD.replace("none", r"no\d", 1), "unknown primitive"),
        (GOOD.replace("none", "no\ud800", 1), "malformed"),
        ("(" * 10_000_000, "at most 20000 characters"),
        ("a/" * 5_000_000, "unknown genotype 'a/a/"),
        ("Genotype(\0)", "malformed"),
        ("x" * 5000, "unknown genotype"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_bad_text_says_what_is_wrong(text, says):
    assert says in refusal(text)


def refusal(text):
    """What `parse` says of a text that is no genotype."""
    with pytest.raises(ValueError) as caught:
        genotypes.parse(text)
    assert_is_a_line(str(caught.value))
    return str(caught.value)


def assert_is_a_line(message):
    assert message.splitlines() == [message] and len(message) <= 500


# what trips parsers, warns there, or looks like something else than it is
HOSTILE = [
    *"-+~*.,:;=()[]{}'\"\\#@\0\n\r\t \u00a0\u2028\ufeff\ufffd\ud800²٣７é’“`",
    *"lambda: 1if '\\d' f'{ .a () [0] (( [[ range( Genotype( normal= \"normal\": 007 1_0 1e999 NaN null True".split(),
    *("not ", "await ", "1 is 1", "'" * 3, "9" * 5000, "0x" + "f" * 5000),
]


def hostile_texts(valid, count):
    """Texts that differ from a valid one in a few characters or tokens, or by something repeated up to 3,000 times."""
    rng = random.Random(0)
    for k in range(count):
        pieces = list(valid) if k % 2 else re.findall(r"\w+|\s+|.", valid)
        for _ in range(rng.randint(1, 3)):
            start = rng.randrange(len(pieces))
            times = rng.randint(3, 3000) if k % 10 == 0 else rng.choice([0, 1, 1, 2])
            pieces[start : start + rng.randint(0, 2)] = [rng.choice([*HOSTILE, rng.choice(pieces)]) * times]
        yield "".join(pieces)


def is_read(text):
    """Whether `parse` reads a text, and reads its own writing of it too; where not, it is refused."""
    try:
        genotype = genotypes.parse(text)
    except ValueError as error:
        assert_is_a_line(str(error))
        return False
    assert genotypes.parse(genotypes.format(genotype)) == genotype
    return True


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "valid, count",
    [
        pytest.param(GOOD, 9_000, id="short"),
        pytest.param(L10_IN_CURLY_QUOTES, 900, id="pasted"),
        pytest.param(GOOD, 90_000, id="short, many", marks=pytest.mark.slow),
        pytest.param(L10_IN_CURLY_QUOTES, 9_000, id="pasted, many", marks=pytest.mark.slow),
    ],
)
def test_any_text_is_a_genotype_or_refused_in_one_line(valid, count):
    read = sum(map(is_read, hostile_texts(valid, count)))
    assert count // 100 < read < count // 2  # both sides of the border are met


@pytest.mark.filterwarnings("error")
def test_any_file_is_a_genotype_or_refused_in_one_line(tmp_path):
    path = tmp_path / "genotype.json"
    read = 0
    for text in hostile_texts(genotypes.to_json(genotypes.parse(GOOD)), 1_000):
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        read += is_read(path)
    assert 10 < read < 500


@pytest.mark.parametrize(
    "attack",
    [
        "__import__('os').mkdir('{}')",
        GOOD.replace("[2]", "__import__('os').mkdir('{}')", 1),
        GOOD.replace("'none', 0", "__import__('os').mkdir('{}'), 0", 1),
        GOOD.replace("[2]", "[x for x in [__import__('os').mkdir('{}')]]", 1),
        GOOD.replace("[2]", "range(__import__('os').mkdir('{}'))", 1),
        GOOD.replace("'none', 0", "f\"{{__import__('os').mkdir('{}')}}\", 0", 1),
        "Genotype.__init__.__globals__(__import__('os').mkdir('{}'))",
        "(lambda: __import__('os').mkdir('{}'))()",
    ],
)
def test_nothing_is_ever_executed(attack, tmp_path):
    target = tmp_path / "executed"
    text = attack.replace("{{", "{").replace("}}", "}").replace("{}", str(target))
    with pytest.raises(ValueError):
        genotypes.parse(text)
    (tmp_path / "file").write_text(text)
    with pytest.raises(ValueError):
        genotypes.parse(tmp_path / "file")
    assert not os.path.exists(target)


@pytest.mark.parametrize(
    "content, says",
    [
        ("{", "not a JSON genotype"),
        ('{"normal":' + "[" * 9_000 + "]" * 9_000 + "}", "nested too deep"),
        ('{"normal":' + "[" * 100_000, "nested too deep"),
        ('{"normal_concat": [' + "7" * 5000 + "]}", "not a JSON genotype"),
        ("[1]", "must be Genotype(...)"),
        ('{"normal": []}', "a genotype has the fields"),
        (json.dumps({name: 1 for name in Genotype._fields}), "normal must list two"),
        (
            json.dumps({**dict.fromkeys(Genotype._fields, [["none", 0], ["none", 1]]), "normal_concat": [[2]]}),
            "node [2]",
        ),
        ("", "is empty: it holds no genotype"),
        ("\x00\x01\xff", "malformed"),
    ],
)
def test_bad_files_are_named(content, says, tmp_path):
    path = tmp_path / "genotype.json"
    path.write_text(content)
    with pytest.raises(ValueError) as caught:
        genotypes.parse(path)
    assert says in str(caught.value) and str(path) in str(caught.value)


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(ValueError, match="has no genotype.json"):
        genotypes.parse(tmp_path)
    (tmp_path / "checkpoint.pt").touch()
    with pytest.raises(ValueError, match="has no genotype yet: the first epoch of that search has not ended"):
        genotypes.parse(tmp_path)


@pytest.fixture
def searched(tmp_path):
    """A run folder of three epochs, each with another genotype."""
    texts = [genotypes.format(genotypes.NAMED[name]) for name in ("DARTS_V1", "DARTS_V2", "DARTS_L20")]
    rows = [f'{k},"{text}"\n' for k, text in enumerate(texts, start=1)]
    (tmp_path / "metrics.csv").write_text("epoch,genotype\n" + "".join(rows))
    (tmp_path / "genotype.json").write_text(genotypes.to_json(genotypes.DARTS_L20))
    return tmp_path


def test_the_genotype_of_any_epoch(searched):
    for epoch, name in ((1, "DARTS_V1"), (2, "DARTS_V2"), (3, "DARTS_L20")):
        assert genotypes.parse(f"{searched}@{epoch}") == genotypes.NAMED[name]
    assert genotypes.parse(searched) == genotypes.DARTS_L20


@pytest.mark.parametrize("epoch", ["0", "4", "x", "", "01", "1" * 100])
def test_an_epoch_that_was_not(searched, epoch):
    with pytest.raises(ValueError, match=f"has no epoch '{epoch[:20]}'; its epochs are 1 to 3$"):
        genotypes.parse(f"{searched}@{epoch}")


@pytest.mark.parametrize(
    "text, says",
    [
        (None, "has no metrics.csv: no epoch of it has ended, or it is no run"),
        ("", "has no genotypes: those of epochs are kept by searches alone"),
        ("epoch,lr\n1,0.1\n", "has no genotypes: those of epochs are kept by searches alone"),
        ("epoch,genotype\n1\n", "has no genotypes: those of epochs are kept by searches alone"),
        ("epoch,genotype\n1,nonsense\n", "metrics.csv: a genotype expression must be Genotype"),
        ("epoch,genotype\n1," + "x" * 200_000, "metrics.csv: field larger than field limit"),
    ],
)
def test_a_folder_without_the_genotypes_of_epochs(tmp_path, text, says):
    if text is not None:
        (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(ValueError, match=says):
        genotypes.parse(f"{tmp_path}@1")


def test_a_folder_may_have_an_at_in_its_name(searched, tmp_path):
    folder = searched.rename(tmp_path.with_name("a@2"))
    assert genotypes.parse(folder) == genotypes.DARTS_L20
    assert genotypes.parse(f"{folder}@1") == genotypes.DARTS_V1


def test_a_primitive_of_your_own_is_known_once_it_is_in_a_search_space(monkeypatch):
    text = GOOD.replace("none", "conv_3x3")
    with pytest.raises(ValueError, match="unknown primitive 'conv_3x3'"):
        genotypes.parse(text)
    monkeypatch.setitem(genotypes.SEARCH_SPACES, "mine", [*genotypes.PRIMITIVES, "conv_3x3"])
    assert genotypes.parse(text).normal == [("conv_3x3", 0), ("conv_3x3", 1)]

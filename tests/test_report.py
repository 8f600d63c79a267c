"""The page of a run: what it says, that it escapes what it is given, and that a browser shows it whole."""

import html
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import data
import genotypes
import report
import test as test_script
import train
import train_search
import utils
from visualize import DrawingError, draw
from watch import evaluation
from watch.curves import plot_curves

SCRIPTS = {"search": train_search, "train": train}
NASTY = "<script>document.title='run'</script>&'\""
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")


def make_run(folder, kind="search", *flags, epochs=3, done=3, **config):
    """A run folder as its script leaves it, without the hours."""
    (folder / "figures").mkdir(parents=True)
    parser = SCRIPTS[kind].build_parser()
    args = vars(parser.parse_args([f"--epochs={epochs}", *flags]))
    config = dict(script=f"{SCRIPTS[kind].__name__}.py", args=args, versions={"torch": "2"}, device="cpu") | config
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "genotype.json").write_text(genotypes.to_json(genotypes.DARTS_L20))
    columns = dict(lr=0.025, train_loss=1.5, train_acc=41.25, valid_loss=1.75, valid_acc=37.5)
    columns |= dict(skip_connects=2, genotype=genotypes.format(genotypes.DARTS_L20)) if kind == "search" else {}
    history = [dict(epoch=epoch, **columns) for epoch in range(1, done + 1)]
    if history:
        lines = [",".join(history[0]), *(",".join(f'"{value}"' for value in row.values()) for row in history)]
        (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
        plot_curves(history, "test", folder / "figures" / "curves.png")
    return folder


def page_of(folder, kind):
    return report.write(folder, SCRIPTS[kind].build_parser()).read_text()


def copied(page):
    """The texts that the page offers to copy, as a browser would."""
    blocks = re.findall(r'<pre class="copy"><code>(.*?)</code>', page, re.DOTALL)
    return [html.unescape(re.sub("<[^>]*>", "", block)) for block in blocks]


@pytest.mark.parametrize(
    "kind, flags",
    [
        ("search", ["--unrolled", "--arch_learning_rate", "3e-3", "--save", "a name"]),
        ("train", ["--train_portion", "0.9"]),
        ("train", ["--arch", "DARTS_V2", "--drop_path_prob", "0", "--data", "it's here"]),
    ],
)
def test_the_command_gives_the_settings_of_the_run(tmp_path, kind, flags):
    python, script, *words = shlex.split(copied(page_of(make_run(tmp_path / "run", kind, *flags), kind))[0])
    assert (python, script) == ("python", f"{SCRIPTS[kind].__name__}.py")
    parser = SCRIPTS[kind].build_parser()
    assert parser.parse_args(words) == parser.parse_args(["--epochs=3", *flags])


def test_the_command_does_not_name_the_folder_that_is_taken(tmp_path):
    assert "--folder" not in copied(page_of(make_run(tmp_path / "run", "train", "--folder", "mine"), "train"))[0]


@pytest.mark.parametrize("portion, judge", [(1, "test"), (0.9, "validation")])
def test_what_a_training_is_judged_by(tmp_path, portion, judge):
    page = page_of(make_run(tmp_path / "run", "train", f"--train_portion={portion}"), "train")
    assert f"<dt>{judge} accuracy</dt>" in page and f"{judge} accuracy (%)</th>" in page


@pytest.mark.parametrize(
    "kind, done, words",
    [
        ("search", 3, ["train.py", "--arch"]),
        ("search", 2, ["train_search.py", "--resume"]),
        ("train", 3, ["test.py", "--model_path"]),
        ("train", 0, ["train.py", "--resume"]),
    ],
)
def test_what_to_do_next(tmp_path, kind, done, words):
    folder = make_run(tmp_path / "run", kind, done=done)
    page = page_of(folder, kind)
    assert shlex.split(copied(page)[1]) == ["python", *words, str(folder)]
    assert f"{done} of 3 epochs" in page


def test_a_search_that_stopped_early_is_over(tmp_path):
    folder = make_run(tmp_path / "run", "search", done=2)
    path = folder / "metrics.csv"
    head, first, last = path.read_text().splitlines()
    path.write_text(f"{head},kept_epoch\n{first},\n{last},1\n")
    page = page_of(folder, "search")
    assert "2 of 3 epochs, stopped early with the genotype of epoch 1" in page and "train.py --arch" in copied(page)[1]


def test_it_holds_what_the_folder_holds(tmp_path):
    folder = make_run(tmp_path / "run", "search", "--unrolled", data={"train": fingerprint("cat", "dog")})
    picture = folder / "figures" / "curves.png"
    for name in ("alphas_heat_map.png", "alphas_normal.png", "evolution.gif", "something_new.png"):
        shutil.copy(picture, picture.with_name(name))
    (folder / "summary.json").write_text('{"hours": 1.98765, "peak_memory_GB": 3, "ended": null, "kind": "search"}')
    page = page_of(folder, "search")
    assert copied(page)[-1] == genotypes.format(genotypes.DARTS_L20)
    text = " ".join(html.unescape(re.sub("<[^>]*>", " ", re.sub("<style>.*</style>", "", page, flags=re.S))).split())
    said = ("--unrolled yes no", "37.50%", "skip connections 2", "cat, dog")
    costs = ("hours 1.988", "time at work 1 h 59 min", "peak memory (GB) 3")
    for words in said + costs:
        assert words in text, words
    assert re.findall("<h2>(.*?)</h2>", page)[1:6] == ["Curves", "Cells", "Alphas", "Evolution", "More pictures"]
    assert page.count('src="data:image/') == page.count("<img ") == 5
    captions = re.findall("<figcaption>(.*?)</figcaption>", page)
    assert captions[1].startswith("Normal cell: the weight") and captions[2] == "The weights of the last epoch."


def fingerprint(*classes):
    return {"classes": list(classes), "counts": [5] * len(classes), "sha256": "0" * 64}


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    page = page_of(make_run(tmp_path / "run"), "search")
    assert all(url.startswith(("data:", "#")) for url in re.findall(r'(?:src|href|url)\s*[=(]\s*"([^"]*)', page))
    assert "default-src 'none'" in page and "://" not in page


def test_names_are_shown_as_text(tmp_path):
    name = NASTY.replace("/", "-")  # no file name has a slash
    folder = make_run(tmp_path / name, "train", "--save", name, data={"train": fingerprint(NASTY, "dog")})
    page = page_of(folder, "train")
    assert page.count("<script>") == page.count("</script>") == 1  # of the page itself
    assert html.escape(NASTY, quote=False)[:20] in page


def test_a_run_of_before(tmp_path):
    """Neither what the images are nor the machine's processor, no setting for what bounds the kernels."""
    folder = make_run(tmp_path / "run", "train")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["args"]["kernel_norm"], config["args"]["amp"], config["device"], config["versions"]
    path.write_text(json.dumps(config))
    (folder / "figures" / "curves.png").unlink()
    assert "--kernel_norm none" in copied(page_of(folder, "train"))[0]


def test_a_run_that_has_no_epoch_yet(tmp_path):
    folder = make_run(tmp_path / "run", "search", done=0)
    (folder / "genotype.json").unlink()
    page = page_of(folder, "search")
    assert "0 of 3 epochs" in page and "<img" not in page


def test_a_picture_that_is_none_is_left_out(tmp_path, caplog):
    folder = make_run(tmp_path / "run")
    (folder / "figures" / "normal.png").write_bytes(b"")
    assert page_of(folder, "search").count("<img ") == 1 and "normal.png" in caplog.text


def make_test(folder, *classes, epoch=None, right=5):
    """What test.py leaves in a folder, of six images; `right` of them are taken for what they are."""
    folder.mkdir()
    targets = torch.arange(6) % len(classes)
    meter = evaluation.Meter()
    logits = 2 * torch.eye(len(classes))[targets]
    logits[right:] = logits[right:].roll(1, dims=1)
    meter.add(logits, targets)
    pixels = torch.randint(256, (6, 8, 8, 3), dtype=torch.uint8)
    names = [f"{NASTY}{k}.png" for k in range(6)]
    args = vars(test_script.build_parser().parse_args(["--model_path", "weights.pt"]))
    facts = dict(script="test.py", args=args, settings=args, epoch=epoch, data={"test": fingerprint(*classes)})
    evaluation.write(folder, meter, data.Images(pixels, targets, list(classes), names), facts)
    return folder


def test_the_page_of_a_training_has_its_test(tmp_path):
    folder = make_run(tmp_path / "run", "train")
    make_test(folder / "test", NASTY, "dog", epoch=3)
    page = page_of(folder, "train")
    assert "<dt>test accuracy</dt><dd>83.33%</dd>" in page and "Test after 3 epochs" in page
    assert page.count("<img ") == 5 and "python test.py" in " ".join(copied(page)) and "--images" in copied(page)[1]
    assert page.count("<script>") == 1  # class names are text


def test_the_test_of_a_training_that_went_on_is_not_its_result(tmp_path):
    folder = make_run(tmp_path / "run", "train", epochs=5, done=4)
    make_test(folder / "test", "cat", "dog", epoch=3)
    page = page_of(folder, "train")
    assert "<dt>test accuracy</dt><dd>37.50%</dd>" in page and "Test after 3 epochs" in page


def test_the_page_of_a_test_alone(tmp_path):
    folder = make_test(tmp_path / "results", "cat", "dog", right=4)
    page = report.write(folder, test_script.build_parser()).read_text()
    assert "<dt>test accuracy</dt><dd>66.67%</dd>" in page and "6 test images" in page
    assert copied(page)[0] == "python test.py --model_path weights.pt"
    assert "<td>cat</td><td>dog</td><td>1</td><td>33.3%</td>" in page


def test_time_at_work_leaves_out_the_pauses(tmp_path):
    folder = make_run(tmp_path / "run")
    times = ("00:00:00", "00:00:40", "00:01:20", "09:00:00", "09:00:10")
    log = "".join(f"2026-01-01 {time} said\nand more\n" for time in times)
    (folder / "log.txt").write_text(log)
    assert "<dt>time at work</dt><dd>90 s</dd>" in page_of(folder, "search")


def test_a_page_that_cannot_be_made_does_not_stop_a_run(tmp_path, caplog):
    folder = make_run(tmp_path / "run")
    (folder / "summary.json").write_text("{")
    report.conclude(folder, train_search.build_parser())
    assert "summary.json is missing or damaged" in caplog.text and "its page" not in caplog.text
    assert not (folder / report.NAME).exists()


@pytest.mark.parametrize(
    "name, content, says",
    [
        (None, None, "run: no such folder"),
        ("notes.txt", "", "run is no run folder"),
        ("config.json", "{", "config.json is missing or damaged"),
        ("config.json", '{"script": "rm.py"}', "its script is 'rm.py'"),
        ("config.json", '{"script": "train.py", "args": 3}', "config.json is damaged"),
        ("config.json", '{"script": ["train.py"]}', "its script is"),
        ("config.json", '{"script": "train.py", "args": {}}', "config.json is damaged: it has no setting"),
        ("config.json", '{"script": "train.py", "versions": 3}', "should hold names and values, not 3"),
        ("config.json", '{"script": "train.py", "data": {"train": 3}}', "config.json is damaged: its data"),
        ("test.json", '{"script": "test.py"}', "test.json is damaged"),
        ("metrics.csv", "epoch,lr\n1,2\n", "metrics.csv is damaged: train_acc is None"),
        ("metrics.csv", "epoch,lr\n1\n", "metrics.csv is damaged: its rows"),
        ("metrics.csv", "epoch\n\0\n", "metrics.csv is damaged"),
        ("genotype.json", "{", "genotype"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, name, content, says):
    if name in ("metrics.csv", "genotype.json"):
        make_run(tmp_path / "run")
    if name:
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text(content)
    monkeypatch.setattr("sys.argv", ["report.py", str(tmp_path / "run")])
    with pytest.raises(utils.UserError, match=says):
        report.main()
    assert not (tmp_path / "run" / report.NAME).exists()


def test_as_a_script(script, tmp_path):
    make_run(tmp_path / "run", "train")
    result = script("report.py", "run")
    assert result.stdout == "run/report.html\n", result.stderr
    assert "--model_path ./run" in " ".join(copied((tmp_path / "run" / "report.html").read_text()))


# ---------------------------------------------------------------------------------------------------- in a browser

PROBE = """<!doctype html><meta charset="utf-8">%s<script>
onload = () => {
  const pages = [...document.querySelectorAll("iframe")].map((frame) => frame.contentDocument);
  const found = pages.map((page) => ({
    title: page.title, images: [...page.images].map((image) => image.naturalWidth),
    buttons: page.querySelectorAll("button").length, heading: page.querySelector("h1").textContent,
    overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
  }));
  document.body.textContent = JSON.stringify(found);
};
</script>"""


def opened(folder, *pages, width=1000):
    """What a headless browser finds in pages below a folder, and the lines of its console."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no headless browser here (one of {', '.join(BROWSERS)})")
    frames = "".join(f'<iframe src="{html.escape(page.as_uri())}" width="{width}"></iframe>' for page in pages)
    (folder / "probe.html").write_text(PROBE % frames)
    flags = "--headless --no-sandbox --disable-gpu --allow-file-access-from-files --enable-logging=stderr --dump-dom"
    command = [browser, *flags.split(), f"--user-data-dir={folder / 'browser'}", (folder / "probe.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    body = re.search(r"<body>(.*)</body>", done.stdout, re.DOTALL)
    assert done.returncode == 0 and body, done.stderr
    return json.loads(html.unescape(body[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def make_pages(folder):
    """A page of every kind, with names that would run as code if they were not escaped."""
    name = NASTY.replace("/", "-")
    for kind in ("search", "train"):
        run = make_run(folder / f"{kind} {name}", kind, data={"train": fingerprint(NASTY, "dog")})
        try:
            draw(genotypes.DARTS_L20, run / "figures")
        except DrawingError:  # no dot here
            pass
        if kind == "train":
            make_test(run / "test", NASTY, "dog", epoch=3)
        yield report.write(run, SCRIPTS[kind].build_parser())
    yield report.write(make_test(folder / f"test {name}", NASTY, "dog"), test_script.build_parser())


@pytest.mark.parametrize("width", [1000, 360])
def test_a_browser_shows_every_picture_without_a_complaint(tmp_path, width):
    paths = list(make_pages(tmp_path))
    pages, console = opened(tmp_path, *paths, width=width)
    assert console == []
    for path, page in zip(paths, pages, strict=True):
        assert page["title"] == page["heading"] == path.parent.name
        assert page["images"] and min(page["images"]) > 0
        assert page["buttons"] == len(copied(path.read_text()))  # its script ran
        assert page["overflow"] == 0  # wide things scroll by themselves


def test_the_browser_would_complain(tmp_path):
    path = Path(tmp_path / "bad.html")
    path.write_text('<h1></h1><img src="data:image/png;base64,AAAA"><script>console.error("so bad")</script>')
    (page,), console = opened(tmp_path, path)
    assert page["images"] == [0] and "so bad" in console[0]

"""The protocol as a command: what is run when, what is gone on with, what is said; most with runs that only pretend."""

import csv
import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import experiment
import genotypes
import measure
import scripts
import train
import train_search
import utils
from experiments import jobs, plan, protocol
from test_jobs import Forked

PLAN = """
[flags]
dataset = "digits"
subset = 64
batch_size = 16
layers = 3
init_channels = 4

[search]
epochs = 1

[searches.second]
seeds = [0, 1]

[random.uniform]
seeds = [4, 5]

[random.equal]
seeds = [0]
parameters_of = "second"
tolerance = 0.3

[named]
genotypes = ["DARTS_V1", "DARTS_V2"]

[short]
epochs = 1
train_portion = 0.5

[final]
epochs = 1
seeds = [0, 1]
"""
LITTLE = (PLAN[: PLAN.index("[random.uniform]")] + PLAN[PLAN.index("[short]") :]).replace("[0, 1]", "[0]")


class Pretending(jobs.Children):
    """Writes what a script would leave. `outcomes`: job -> its accuracy, or the exit code with which it fails."""

    outcomes: dict = {}
    pixels: str = "0" * 64  # what their checksum is
    calls: list = []
    environments: list = []

    def call(self, command, output, environment):
        where = Path(command[-1])
        outcome = self.outcomes.get(where.name, {"code": 0, "accuracy": 50.0})
        self.calls.append((where.name, command[2:]))
        self.environments.append(environment)
        script = train_search if "search" in command[1].name else train
        where.mkdir(exist_ok=True)
        if command[2] != "--resume":
            args = vars(script.parse_args([str(a) for a in command[2:]]))
            images = dict(train=dict(classes=["a", "b", "c"], counts=[5, 5, 5], sha256=self.pixels))
            (where / "config.json").write_text(json.dumps(dict(script=command[1].name, args=args, data=images)))
        torch.save({}, where / "checkpoint.pt")
        if outcome["code"]:
            output.write(f"{outcome.get('line', 'stopped')}\n\n".encode())
            return outcome["code"]
        row = dict(epoch=1, valid_acc=outcome["accuracy"], valid_loss=1.5, train_acc=60.0)
        if script is train_search:
            genotype = genotypes.sample(genotypes.PRIMITIVES, 77 + int(where.name[-1]))
            row["genotype"] = genotypes.format(genotype)
            (where / "genotype.json").write_text(genotypes.to_json(genotype))
        with (where / "metrics.csv").open("w") as file:
            writer = csv.DictWriter(file, list(row))
            writer.writeheader()
            writer.writerow(row)
        return 0


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """Call experiment.py with runs that only pretend, whose outcomes may be set."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(PLAN)
    monkeypatch.setattr(Pretending, "outcomes", {})
    monkeypatch.setattr(Pretending, "calls", [])
    monkeypatch.setattr(Pretending, "environments", [])
    monkeypatch.setattr(jobs, "Children", Pretending)
    monkeypatch.setattr(experiment, "listen", lambda children: None)
    monkeypatch.setattr(measure, "count", lambda *_: measure.Count(10**6, 10**8, 10**5))  # takes longer than the rest

    def call(*arguments, **outcomes):
        Pretending.calls.clear()
        Pretending.environments.clear()
        Pretending.outcomes = {
            name.replace("_V", "~").replace("_", "-").replace("~", "_V"): o for name, o in outcomes.items()
        }
        monkeypatch.setattr("sys.argv", ["experiment.py", *(arguments or ["tiny.toml"])])
        experiment.main()
        return [name for name, _ in Pretending.calls]

    return call


def ends(accuracy):
    return {"code": 0, "accuracy": accuracy}


def fails(code, line="train.py: error: no such folder"):
    return {"code": code, "line": line}


FOLDER = Path("runs/experiment-tiny")


def test_the_order_of_the_protocol(pretend):
    """Searches and what depends on none; the cells found, and random ones of their size; what is best of each group."""
    run = pretend(short_second_1_seed0=ends(61.0), short_uniform_4_seed0=ends(55.0))
    first = ["search-second-0", "search-second-1", "short-uniform-4-seed0", "short-uniform-5-seed0"]
    assert run[:6] == [*first, "short-DARTS_V1-seed0", "short-DARTS_V2-seed0"]
    assert run[6:9] == ["short-second-0-seed0", "short-second-1-seed0", "short-equal-0-seed0"]
    best = ["uniform-4", "DARTS_V1", "DARTS_V2", "second-1", "equal-0"]  # the first three are known by now
    assert run[9:] == [f"final-{name}-seed{seed}" for name in best for seed in (0, 1)]
    arguments = dict(Pretending.calls)
    found = arguments["short-second-1-seed0"]
    assert found[found.index("--arch") + 1] == str(FOLDER / "search-second-1")
    drawn = genotypes.parse(FOLDER / "genotypes" / "uniform-4.json")
    assert drawn == genotypes.sample(genotypes.PRIMITIVES, 4)
    assert {path.name for path in FOLDER.glob("*.*")} == {"plan.toml", "results.csv", "results.md", "report.html"}
    assert pretend() == []  # all is done


def test_what_was_killed_goes_on_and_what_is_finished_stays(pretend):
    with pytest.raises(
        utils.UserError, match="1 jobs have not ended .short-uniform-4-seed0.; .*experiment.py tiny.toml"
    ):
        pretend(short_uniform_4_seed0=fails(-9))
    assert not any(name.startswith("final-uniform") for name, _ in Pretending.calls)  # not ranked yet
    assert pretend() == ["short-uniform-4-seed0", "final-uniform-4-seed0", "final-uniform-4-seed1"]
    assert Pretending.calls[0][1] == ["--resume", FOLDER / "short-uniform-4-seed0"]


def test_a_failed_job_is_named_and_retried_on_request(pretend, caplog):
    with pytest.raises(utils.UserError, match="1 jobs failed; .*experiment.py tiny.toml --retry takes them up again"):
        pretend(search_second_0=fails(2))
    assert "search-second-0 failed: train.py: error: no such folder" in caplog.text
    assert "final-second-1-seed0" in dict(Pretending.calls)  # the others go on
    assert "short-equal-0-seed0" not in dict(Pretending.calls)  # it has no budget
    with pytest.raises(utils.UserError, match="1 jobs failed"):
        pretend()
    assert Pretending.calls == []
    assert pretend("tiny.toml", "--retry")[:3] == ["search-second-0", "short-second-0-seed0", "short-equal-0-seed0"]


def test_a_job_that_diverges_is_a_result(pretend):
    lost = fails(3, "train.py: error: the loss became nan in epoch 1")
    run = pretend(short_uniform_4_seed0=lost, search_second_1=lost)
    assert "final-uniform-5-seed0" in run and "final-second-0-seed0" in run
    with (FOLDER / "results.csv").open() as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert rows["short-uniform-4-seed0"]["status"] == rows["search-second-1"]["status"] == "diverged"
    assert "the loss became nan" in rows["search-second-1"]["line"]
    assert pretend("tiny.toml", "--retry") == []


def test_a_run_that_was_made_by_hand_is_taken_as_it_is(pretend):
    pretend()
    (FOLDER / "short-uniform-4-seed0").rename("elsewhere")
    (FOLDER / "short-uniform-4-seed0").symlink_to(Path("elsewhere").absolute())
    assert pretend() == []


def test_a_run_of_other_settings_is_refused_before_anything_is_run(pretend):
    pretend()
    Path("tiny.toml").write_text(PLAN.replace("layers = 3", "layers = 4"))
    with pytest.raises(utils.UserError, match="search-second-0 is a run with --layers 3, and the plan says 4"):
        pretend()
    assert Pretending.calls == []


def test_runs_of_other_images_are_not_put_into_one_table(pretend, monkeypatch):
    pretend("tiny.toml", "--job", "search-second-0")
    monkeypatch.setattr(Pretending, "pixels", "1" * 64)
    pretend("tiny.toml", "--job", "short-uniform-4-seed0")
    with pytest.raises(utils.UserError, match="has other train images than .*search-second-0 \\(as many images, but"):
        pretend()
    assert Pretending.calls == []


def test_a_list_of_the_jobs_runs_none(pretend, caplog):
    caplog.set_level("INFO")
    assert pretend("tiny.toml", "--list") == []
    assert "search-second-0: waiting, 0 of 1 epochs" in caplog.text
    drawn = genotypes.format(genotypes.sample(genotypes.PRIMITIVES, 4))
    assert f"train.py --arch {shlex.quote(drawn)} --dataset digits" in caplog.text
    assert not Path("runs").exists()
    pretend("tiny.toml", "--job", "search-second-0")
    pretend("tiny.toml", "--list")
    assert f"train.py --arch {FOLDER}/genotypes/uniform-4.json --dataset digits" in caplog.text


def test_one_cell_under_two_names_is_told(pretend, caplog):
    of_equal = 'seeds = {}\nparameters_of = "second"\ntolerance = {}'
    Path("tiny.toml").write_text(PLAN.replace(of_equal.format([0], 0.3), of_equal.format([4], 0.99)))
    pretend()
    told = "One genotype under two names, so that these are not independent: uniform-4 = equal-4."
    assert told in caplog.text and told in (FOLDER / "results.md").read_text()


def test_one_job_alone(pretend):
    assert pretend("tiny.toml", "--job", "search-second-1") == ["search-second-1"]
    with pytest.raises(utils.UserError, match="--job final-second-1-seed0: no job of this plan, or not yet; --list"):
        pretend("tiny.toml", "--job", "final-second-1-seed0")


def test_gpus_and_threads_are_shared_out(pretend, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(experiment, "cores", lambda: 12)
    assert experiment.parse_args(["tiny.toml"]).jobs == 2
    pretend()
    assert {e["CUDA_VISIBLE_DEVICES"] for e in Pretending.environments} == {"3", "5"}
    assert {e["OMP_NUM_THREADS"] for e in Pretending.environments} == {"6"}
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    (FOLDER / "final-DARTS_V1-seed0" / "metrics.csv").unlink()
    pretend()
    assert [e["OMP_NUM_THREADS"] for e in Pretending.environments] == ["2"]


def test_a_signal_stops_the_jobs(pretend, monkeypatch):
    monkeypatch.undo()
    children = jobs.Children()
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        experiment.listen(children)
        signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
    assert children.stopping


def test_the_time_that_is_left(pretend, monkeypatch):
    """One search of two took 100 s, so the other will; two short trainings of seven took 30 s each."""
    seconds = {"search-second-0": 100, "short-uniform-4-seed0": 30, "short-uniform-5-seed0": 30}
    for name in seconds:
        pretend("tiny.toml", "--job", name)
    monkeypatch.setattr(jobs, "seconds", lambda job, folder: seconds.get(job.name, 0))
    tiny = plan.load("tiny.toml")
    report = experiment.Report([], protocol.known_jobs(tiny, FOLDER), tiny, FOLDER, at_once=1)
    assert report.left() == "about 4 min left, and how long final takes is not known yet"  # 100 + 5 * 30 s


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "name a plan, such as plans/small.toml, or give --quick"),
        (["tiny.toml", "--quick"], "or give --quick, not both"),
        (["missing.toml"], "cannot read the plan missing.toml: No such file"),
        (["tiny.toml", "--cluster", "dask://host:1", "--jobs", "2"], "--jobs is for this machine"),
        (["tiny.toml", "--cluster", "slurm"], "--cluster must be dask://HOST:PORT or ray, got 'slurm'"),
        (["tiny.toml", "--cluster", "dask://"], "--cluster must be dask://HOST:PORT or ray"),
        (["tiny.toml", "--folder", "tiny.toml/x"], "cannot make the folder"),
        (["tiny.toml", "--job", "final-second-0-seed0"], "no job of this plan, or not yet"),
    ],
)
def test_bad_input(pretend, tmp_path, arguments, says):
    with pytest.raises(utils.UserError) as caught:
        pretend(*arguments) if arguments else experiment.parse_args([])
    assert says in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.toml"]


def test_a_cluster_that_does_not_answer(pretend, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise OSError("timed out")

    monkeypatch.setattr(experiment, "find_spec", lambda name: True)
    monkeypatch.setattr(experiment.joblib, "parallel_config", fail)
    with pytest.raises(utils.UserError, match="--cluster dask://host:1: no cluster answers there .timed out"):
        pretend("tiny.toml", "--cluster", "dask://host:1")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.toml"]


@pytest.mark.parametrize("address, package", [("dask://localhost:1", "distributed"), ("ray", "ray")])
def test_a_missing_package_is_named(pretend, monkeypatch, address, package):
    monkeypatch.setattr(experiment, "find_spec", lambda name: None)
    with pytest.raises(utils.UserError, match=f"needs the package {package}: pip install {package}"):
        pretend("tiny.toml", "--cluster", address)


@pytest.mark.slow
def test_a_cluster_that_loses_a_machine_in_the_middle(tmp_path):
    """Two Dask workers; one of them is killed with all that it started while both train: the other one goes on."""
    distributed, psutil = pytest.importorskip("distributed"), pytest.importorskip("psutil")
    text = "[random.uniform]\nseeds = [4, 5]\n[short]\nepochs = 30\ntrain_portion = 0.5\n"
    (tmp_path / "lost.toml").write_text(PLAN[: PLAN.index("[search]")] + text)
    folder = tmp_path / "runs" / "experiment-lost"
    runs = [folder / f"short-uniform-{seed}-seed0" for seed in (4, 5)]
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        address = cluster.scheduler_address.replace("tcp", "dask")
        script = scripts.Script(tmp_path, "experiment.py", "lost.toml", "--cluster", address)
        while not all((run / "metrics.csv").exists() for run in runs):
            assert script._process.is_alive()
            time.sleep(0.1)
        with distributed.Client(cluster) as client:
            worker = psutil.Process(next(iter(client.run(os.getpid).values())))
        for process in [worker, *worker.children(recursive=True)]:
            process.kill()
        out, err = script.communicate(timeout=500)
    assert script.returncode == 0, out + err
    assert "2 of 2: short-uniform-" in out
    commands = [(folder / "logs" / f"{run.name}.txt").read_text().count("$ ") for run in runs]
    assert sorted(commands) == [1, 2]  # one was gone on with
    assert [len((run / "metrics.csv").read_text().splitlines()) for run in runs] == [31, 31]


def test_from_a_plan_to_results(tmp_path, monkeypatch):
    """Real runs: a search, the training that ranks, the final one."""
    monkeypatch.chdir(tmp_path)
    Path("little.toml").write_text(LITTLE)
    monkeypatch.setattr(jobs, "Children", Forked)
    monkeypatch.setattr(experiment, "listen", lambda children: None)
    monkeypatch.setattr("sys.argv", ["experiment.py", "little.toml", "--jobs", "2"])
    experiment.main()
    folder = Path("runs/experiment-little")
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["status"], row["measured_on"]) for row in rows] == [
        ("search-second-0", "finished", "validation"),
        ("short-second-0-seed0", "finished", "validation"),
        ("final-second-0-seed0", "finished", "test"),
    ]
    for row in rows:
        with (folder / row["run"] / "metrics.csv").open() as file:
            assert float(row["accuracy"]) == float(list(csv.DictReader(file))[-1]["valid_acc"])
    assert genotypes.parse(folder / "short-second-0-seed0") == genotypes.parse(folder / "search-second-0")
    assert sys.modules["experiment"] is experiment and "second-0" in (folder / "results.md").read_text()

"""Jobs: what of one is done, as its files say; starting, resuming, failing, diverging, waiting for others."""

import contextlib
import json
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

import genotypes
import run_folder
import scripts
import utils
from experiments import jobs, plan

TINY = """
[flags]
dataset = "digits"
subset = 96
batch_size = 16
layers = 3
init_channels = 4
report_freq = 1

[searches.first]
seeds = [0]
epochs = 1

[short]
epochs = 2
train_portion = 0.5
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "logs").mkdir()
    return tmp_path


@pytest.fixture
def search():
    return plan.parse(TINY, "tiny", "tiny.toml").searches["first-0"]


@pytest.fixture
def short():
    return short_job()


def short_job(**flags):
    text = TINY + "".join(f"{name} = {value}\n" for name, value in flags.items())
    tiny = plan.parse(text, "tiny", "tiny.toml")
    (job,) = tiny.training("short", tiny.candidates[0], "DARTS_V2")
    return job


class Forked(jobs.Children):
    """Scripts that are forked from a process that has imported PyTorch; one that says `kill_at` is killed there."""

    def __init__(self, kill_at=None):
        super().__init__()
        self.kill_at = kill_at

    def call(self, command, output, environment):
        script = scripts.Script(Path.cwd(), command[1].name, *command[2:])
        for line in script.stdout:
            output.write(line.encode())
            if self.kill_at and self.kill_at in line:
                script.send_signal(signal.SIGKILL)
                break
        out, err = script.communicate()
        output.write((out + err).encode())
        return script.returncode


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def log_of(job, folder):
    return (folder / "logs" / f"{job.name}.txt").read_text()


def test_a_job_that_was_killed_goes_on(folder, short):
    """It is killed in its second epoch, by a signal, as by a machine that runs out of memory."""
    assert jobs.look(short, folder).status == "waiting"

    jobs.run(short, folder, Forked(kill_at="epoch 2/2 step 1/3"))
    assert jobs.look(short, folder).status == "begun" and jobs.look(short, folder).epochs == 1
    jobs.run(short, folder, Forked())
    state = jobs.look(short, folder)
    assert state.status == "finished" and 0 <= state.value("valid_acc") <= 100
    first, second = (line for line in log_of(short, folder).splitlines() if line[:2] == "$ ")
    assert "--arch DARTS_V2" in first and first.endswith(f"--folder {folder / short.name}")
    assert second.endswith(f"train.py --resume {folder / short.name}")
    assert 0 <= jobs.seconds(short, folder) < 600
    jobs.run(short, folder, Forked())
    assert log_of(short, folder).count("$ ") == 2  # what is finished is not started again


def test_a_search_without_the_genotype_of_its_last_epoch_is_not_finished(folder, search):
    first, last = genotypes.DARTS_V1, genotypes.DARTS_V2
    write(folder / search.name / "metrics.csv", f'epoch,genotype\n1,"{genotypes.format(last)}"\n')
    write(folder / search.name / "checkpoint.pt", "")
    write(folder / search.name / "genotype.json", genotypes.to_json(first))
    assert jobs.look(search, folder).status == "begun"
    write(folder / search.name / "genotype.json", genotypes.to_json(last))
    assert jobs.look(search, folder).status == "finished"


def test_a_search_that_stopped_early_is_finished_with_the_genotype_that_it_kept(folder):
    search = plan.parse(TINY.replace("epochs = 1", "epochs = 9"), "tiny", "tiny.toml").searches["first-0"]
    kept, last = genotypes.DARTS_V1, genotypes.DARTS_V2
    rows = f'1,"{genotypes.format(kept)}",\n2,"{genotypes.format(last)}",'
    write(folder / search.name / "checkpoint.pt", "")
    write(folder / search.name / "genotype.json", genotypes.to_json(kept))
    for kept_epoch, status in (("", "begun"), ("2", "begun"), ("1", "finished")):
        write(folder / search.name / "metrics.csv", f"epoch,genotype,kept_epoch\n{rows}{kept_epoch}\n")
        assert jobs.look(search, folder).status == status


def test_a_failed_job_has_its_last_line_and_is_retried_on_request(folder):
    job = short_job(dataset='"folder"', data='"missing"')
    jobs.run(job, folder, Forked())
    state = jobs.look(job, folder)
    assert state.status == "failed" and "--data missing: no such folder" in state.line
    jobs.run(job, folder, Forked())
    assert log_of(job, folder).count("$ ") == 1
    jobs.retry(job, folder)
    assert jobs.look(job, folder).status == "waiting"


def test_a_job_that_diverges_has_a_result(folder):
    job = short_job(learning_rate=1e30)
    jobs.run(job, folder, Forked())
    state = jobs.look(job, folder)
    assert state.status == "diverged" and "became" in state.line and "learning rate 1e+30" in state.line
    jobs.retry(job, folder)
    assert jobs.look(job, folder).status == "diverged"


@pytest.mark.skipif(run_folder.fcntl is None, reason="no locks on this system")
def test_a_run_that_another_process_is_at_work_on_is_waited_for(folder, short, monkeypatch):
    monkeypatch.setattr(jobs, "_PROBE", 0.01)
    write(folder / short.name / "checkpoint.pt", "")
    log = run_folder._LogFile(folder / short.name / "log.txt")
    stops = jobs.Children()
    waiting = threading.Thread(target=jobs.run, args=(short, folder, stops))
    waiting.start()
    time.sleep(0.1)
    assert waiting.is_alive() and not (folder / "logs" / f"{short.name}.txt").exists()
    write(folder / short.name / "metrics.csv", "epoch\n2\n")
    waiting.join(10)
    log.close()
    assert not waiting.is_alive()


def test_processes_stop_when_they_are_asked_to(tmp_path):
    children, codes = jobs.Children(), []
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    with open(tmp_path / "output", "wb") as output:
        thread = threading.Thread(target=lambda: codes.append(children.call(sleep, output, None)))
        thread.start()
        while not children._processes:
            time.sleep(0.01)
        children.stop()
        thread.join(10)
        assert codes == [-15]
        assert children.call(sleep, output, None) == -15  # one that begins too late


def test_a_run_of_other_settings_is_named(folder, short):
    path = folder / short.name / "config.json"
    args = vars(short.args) | dict(data="elsewhere", save="mine", folder=None, search_space="darts")
    write(path, json.dumps(dict(script="train.py", args=args)))
    jobs.check(short, folder)
    for change, says in (
        (dict(args=args | dict(layers=4)), "is a run with --layers 4, and the plan says 3: change the plan"),
        (dict(script="train_search.py"), "is a run of 'train_search.py', and the plan wants one of train.py there"),
        (dict(args=None), "its settings are None"),
    ):
        write(path, json.dumps(dict(script="train.py", args=args) | change))
        with pytest.raises(utils.UserError) as caught:
            jobs.check(short, folder)
        assert says in str(caught.value)
    write(path, json.dumps(dict(script="train.py", args=args | dict(epochs=9))))
    with pytest.raises(utils.UserError, match="with --epochs 9, and the plan says 2"):
        jobs.check(short, folder)
    for text in ("{", 10**5 * "[" + 10**5 * "]"):
        write(path, text)
        with pytest.raises(utils.UserError, match="config.json cannot be read"):
            jobs.check(short, folder)


def test_a_search_of_another_space_is_another_run(folder, search):
    for change, is_same in ((dict(eigenvalue_every=0), True), (dict(search_space="darts"), False)):
        args = vars(search.args) | change
        write(folder / search.name / "config.json", json.dumps(dict(script="train_search.py", args=args)))
        with contextlib.nullcontext() if is_same else pytest.raises(utils.UserError, match="--search_space darts"):
            jobs.check(search, folder)


def test_the_time_at_work_is_without_the_time_between_two_processes(folder, short):
    stamps = ("2026-01-01 10:00:00", "2026-01-01 10:00:14", "2026-01-01 10:00:30", "2026-01-02 08:00:00")
    lines = [f"{stamp} epoch 1/2 step {k}/3\n" for k, stamp in enumerate(stamps)]
    write(folder / short.name / "log.txt", "".join(lines) + "a second line of a message\n")
    assert jobs.seconds(short, folder) == 30
    assert jobs.now(short, folder) == "epoch 1/2 step 3/3"


def test_a_run_goes_on_with_the_threads_that_it_began_with(folder, short):
    assert jobs._environment(short, folder, 3, "5")["OMP_NUM_THREADS"] == "3"
    write(folder / short.name / "config.json", '{"threads": 2}')
    environment = jobs._environment(short, folder, 3, "5")
    assert (environment["OMP_NUM_THREADS"], environment["CUDA_VISIBLE_DEVICES"]) == ("2", "5")

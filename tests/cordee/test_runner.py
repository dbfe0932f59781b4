"""The real command line with real processes: what fails, stops or is killed leaves every artifact whole."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from cordee import display, lock, plan, recipe, runner
from cordee.artifact import Store
from cordee.errors import Fault
from cordee.launchers import RUNNER, local

MAIN = "from cordee.cli import main; main()"


@pytest.mark.usefixtures("brook")
def test_a_run_publishes_each_stage_and_a_second_one_does_nothing_again(cordee, tmp_path):
    first = cordee("run", "brook.yaml")
    assert first.returncode == 0, first.stderr
    assert "published brook/pool@1" in first.stdout
    assert (tmp_path / "runs/brook/pool@1/line.txt").read_text() == "water\nwater\n"
    started = time.monotonic()
    second = cordee("run", "brook.yaml")
    assert (second.returncode, "published" in second.stdout) == (0, False)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("trouble", "exit_code", "message"),
    [
        ("user", 2, "cordee: brook.yaml: stages.pool: spring.txt: text: is dry; did you mean 'wine'?"),
        ("key", 2, "cordee: brook.yaml: stages.pool.number: 1 litre can't be divided by 0 buckets"),
        ("fault", 1, "cordee: brook.yaml: stages.pool: pipe: the pipe burst"),
        ("crash", 1, "ZeroDivisionError: by nothing; the details are in "),
        ("kill", 1, "killed: the job's process was ended by SIGKILL from outside; it was restarted 3 times"),
        ("full", 1, "no space left on the disk; free some, then run again"),
    ],
)
@pytest.mark.usefixtures("brook")
def test_a_stage_that_fails_is_one_line_and_the_run_goes_on_when_it_is_mended(
    cordee, tmp_path, trouble, exit_code, message
):
    failed = cordee("run", "brook.yaml", f"pool.trouble={trouble}")
    assert failed.returncode == exit_code
    assert message in failed.stderr
    assert failed.stderr.count("\n") == 1
    assert (tmp_path / "runs/brook/spring@1/manifest.json").exists()
    assert not (tmp_path / "runs/brook/pool@1").exists()
    assert cordee("verify").returncode == 0
    mended = cordee("run", "brook.yaml")
    assert (mended.returncode, "published brook/pool@1" in mended.stdout) == (0, True)


@pytest.mark.parametrize("uses", ["toys.spring", "toys.choir"])
def test_a_users_folder_of_the_same_name_is_not_what_runs(cordee, write, uses):
    write("toys/__init__.py", "")
    write(f"toys/{uses.partition('.')[2]}.py", "raise SystemExit('shadowed')")
    write("tempfile.py", "raise SystemExit('shadowed')")
    write("r.yaml", f"name: r\nstages: {{one: {{uses: {uses}}}}}")
    done = cordee("run", "r.yaml")
    assert (done.returncode, done.stderr) == (0, "")
    assert "published r/one@1" in done.stdout


@pytest.mark.usefixtures("brook")
def test_a_disk_that_is_full_while_publishing_leaves_earlier_artifacts_whole(cordee, tmp_path):
    assert cordee("stage", "brook.yaml", "spring").returncode == 0
    # A limit on the size of a file stands for a disk on which the job, longer than the limit, has no space.
    program = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)); {MAIN}"
    command = [sys.executable, "-c", program, "run", "brook.yaml", f"pool.text={'x' * 60_000}"]
    failed = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert failed.returncode == 1
    assert failed.stderr.count(b"\n") == 1
    assert not (tmp_path / "runs/brook/pool@1").exists()
    assert cordee("verify").returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.usefixtures("brook")
def test_ctrl_c_stops_cleanly_and_the_next_run_goes_on(tmp_path, cordee, number):
    command = [sys.executable, "-c", MAIN, "run", "brook.yaml", "pool.trouble=wait"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    _await(lambda: "progress" in _events(tmp_path))
    process.send_signal(number)
    if number != signal.SIGINT:  # which Slurm and a job's script send both
        time.sleep(0.01)
        process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"stopped at step" in error
    assert "stopped" in cordee("status", "brook.yaml").stdout
    assert cordee("run", "brook.yaml").returncode == 0


@pytest.mark.usefixtures("brook")
def test_under_nohup_a_run_outlives_its_terminal(tmp_path):
    command = ["nohup", sys.executable, "-c", MAIN, "run", "brook.yaml", "pool.trouble=wait"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    _await(lambda: "progress" in _events(tmp_path))
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130


@pytest.mark.usefixtures("brook")
def test_when_the_run_is_killed_its_stage_dies_too_and_the_next_run_takes_over(tmp_path, cordee):
    command = [sys.executable, "-c", MAIN, "run", "brook.yaml", "pool.trouble=wait"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    _await(lambda: "progress" in _events(tmp_path))
    process.kill()
    process.wait()
    size = len(_events(tmp_path))
    time.sleep(0.5)
    size = len(_events(tmp_path))
    time.sleep(1.0)
    assert len(_events(tmp_path)) == size, "an orphan goes on writing"
    assert cordee("run", "brook.yaml").returncode == 0


@pytest.mark.parametrize("processes", [1, 2])
def test_when_the_run_is_killed_what_accelerate_started_dies_too(tmp_path, write, processes):
    write("choir.yaml", f"name: choir\nstages: {{choir: {{uses: toys.choir, launch: {{num_processes: {processes}}}}}}}")
    command = [sys.executable, "-c", MAIN, "run", "choir.yaml", "choir.trouble=wait"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    _await(lambda: "progress" in _events(tmp_path, "choir/logs/choir@1"))
    process.kill()
    process.wait()
    singers = [int(path.read_text()) for path in (tmp_path / "runs/choir/choir@1.partial/voices").iterdir()]
    assert len(singers) == processes
    _await(lambda: not any(_lives(pid) for pid in singers), seconds=10)


class Screen(io.StringIO):
    """A screen that is closed once a stage has shown its progress."""

    def write(self, text):
        if "step" in text:
            raise ValueError("closed file")
        return super().write(text)


def test_what_ends_the_run_ends_its_stage(brook, tmp_path, monkeypatch):
    monkeypatch.setattr(display, "LINE_EVERY_S", -1.0)
    monkeypatch.chdir(tmp_path)
    started, start = [], local.start

    def keep(job):
        started.append(start(job))
        return started[-1]

    monkeypatch.setattr(local, "start", keep)
    planned = plan.make(recipe.load(brook, ["spring.trouble=wait"]), Store(tmp_path / "runs"))
    with pytest.raises(ValueError, match="closed file"):
        runner.run(planned, Console(file=Screen()))
    assert [one.poll() for one in started] == [-signal.SIGKILL]


TWO = """
name: two
stages:
  left:  {uses: toys.spring, text: left}
  right: {uses: toys.spring, text: right}
  both:  {uses: toys.spring, source: $left/line.txt}
"""


def test_stages_that_need_nothing_of_each_other_run_at_once(cordee, write, tmp_path):
    """Each waits for the other's first line; alone, neither would end."""
    write(
        "two.yaml",
        TWO.replace("text: left", "text: left, trouble: meet").replace("text: right", "text: right, trouble: meet"),
    )
    done = cordee("run", "two.yaml", "--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in (tmp_path / "runs/two").glob("*@1")} == {"left@1", "right@1", "both@1"}
    assert (tmp_path / "runs/two/both@1/line.txt").read_text() == "left\nwater\n"


def test_what_runs_beside_a_stage_that_fails_is_awaited_and_nothing_else_starts(cordee, write, tmp_path):
    write("two.yaml", TWO.replace("text: right", "text: right, trouble: meet"))
    failed = cordee("run", "two.yaml", "left.trouble=user", "--jobs", "2")
    assert failed.returncode == 2
    assert failed.stderr == "cordee: two.yaml: stages.left: spring.txt: text: is dry; did you mean 'wine'?\n"
    assert {path.name for path in (tmp_path / "runs/two").glob("*@1")} == {"right@1"}


def test_a_stage_waits_for_memory_that_another_has(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write("two.yaml", TWO.replace("text: right", "text: right, resources: {memory_gb: 1e6}"))
    told = io.StringIO()
    planned = plan.make(recipe.load(file), Store(tmp_path / "runs"))
    runner.run(planned, Console(file=told), where=runner.Where(jobs=2))
    lines = told.getvalue().splitlines()
    told = [tuple(line.split()[:2]) for line in lines if line.split()[1] in ("starts", "published")]
    assert told == [(name, did) for name in ("left", "right", "both") for did in ("starts", "published")]


def test_ctrl_c_stops_all_that_run(tmp_path, write, cordee):
    write("two.yaml", TWO)
    waits = ("left.trouble=wait", "right.trouble=wait", "--jobs", "2")
    command = [sys.executable, "-c", MAIN, "run", "two.yaml", *waits]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    _await(lambda: all("progress" in _events(tmp_path, f"two/logs/{name}@1") for name in ("left", "right")))
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, b"stopped at step" in error) == (130, True)
    assert cordee("status", "two.yaml").stdout.count("stopped at step") == 2
    assert cordee("run", "two.yaml").returncode == 0


def test_a_stage_ends_at_its_deadline(monkeypatch, cordee, brook):
    monkeypatch.setenv("CORDEE_DEADLINE", str(time.time() + 6))
    done = cordee("run", brook, "spring.trouble=wait")
    assert (done.returncode, "stopped at step" in done.stderr) == (130, True)
    monkeypatch.delenv("CORDEE_DEADLINE")
    assert cordee("run", brook).returncode == 0


@pytest.mark.parametrize("trouble", ["wait", "none"])
def test_a_run_whose_lock_was_taken_over_ends_its_stage_and_publishes_nothing(brook, tmp_path, monkeypatch, trouble):
    """Noticed by the heartbeat while the stage runs, and before what a stage wrote is published."""
    monkeypatch.setattr(lock, "BEAT_S", 0.1 if trouble == "wait" else 1000.0)
    monkeypatch.chdir(tmp_path)
    begin = runner.command.of_stage

    def taken(uses, config, job, nodes):
        (tmp_path / "runs/brook/.spring.lock").write_text("someone else's")
        return begin(uses, config, job, nodes)

    monkeypatch.setattr(runner.command, "of_stage", taken)
    planned = plan.make(recipe.load(brook, [f"spring.trouble={trouble}"]), Store(tmp_path / "runs"))
    with pytest.raises(Fault, match="another run took this stage over"):
        runner.run(planned, Console(quiet=True))
    assert (tmp_path / "runs/brook/spring@1.partial").exists()
    assert not (tmp_path / "runs/brook/spring@1").exists()
    assert (tmp_path / "runs/brook/.spring.lock").read_text() == "someone else's"
    before = _events(tmp_path, "brook/logs/spring@1")
    time.sleep(0.5)
    assert _events(tmp_path, "brook/logs/spring@1") == before, "its process has ended"


def test_a_stage_whose_run_was_killed_before_it_began_does_nothing(tmp_path):
    gone = subprocess.Popen(["sleep", "60"])
    environment = {**os.environ, RUNNER: json.dumps(lock.owner(gone.pid))}
    gone.kill()
    gone.wait()
    told = {"config": {}, "seed": 0, "out": str(tmp_path), "events": str(tmp_path / "events.jsonl")}
    (tmp_path / "job.json").write_text(json.dumps(told))
    command = [sys.executable, "-m", "toys.spring", "--job", str(tmp_path / "job.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "toys.spring: the run that started this stage is gone\n")
    assert [path.name for path in tmp_path.iterdir()] == ["job.json"]


def _lives(pid):
    return lock.owner(pid)["started"] is not None


def _events(tmp_path, logs="brook/logs/pool@1"):
    path = tmp_path / "runs" / logs / "events.jsonl"
    return path.read_text() if path.exists() else ""


def _await(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.usefixtures("brook")
def test_a_flipped_byte_in_an_input_is_a_fault_before_anything_starts(cordee, tmp_path):
    assert cordee("stage", "brook.yaml", "spring").returncode == 0
    (tmp_path / "runs/brook/spring@1/line.txt").write_text("waTer\n")
    failed = cordee("run", "brook.yaml")
    assert failed.returncode == 1
    assert "line.txt: its content differs from the manifest's SHA-256" in failed.stderr
    verified = cordee("verify")
    assert (verified.returncode, "damaged  brook/spring@1" in verified.stdout) == (1, True)


@pytest.mark.usefixtures("brook")
def test_one_stage_needs_its_inputs_done(cordee):
    failed = cordee("stage", "brook.yaml", "pool")
    assert failed.returncode == 2
    assert "stages.pool.source: spring is not made yet; run it first: cordee run brook.yaml" in failed.stderr


def test_a_person_need_not_say_twice_how_many_processes_train(write, tmp_path, monkeypatch):
    from cordee import alone

    chats = write("chats.jsonl", "{}")
    (tmp_path / "model").mkdir()
    keys = f"{{model: {tmp_path / 'model'}, data: [{{path: {chats}}}], global_batch_size: 32}}"
    monkeypatch.setenv("WORLD_SIZE", "4")
    (item,) = alone._recipe("posttrain.sft", write("sft.yaml", keys), []).stages
    assert item.config.launch.num_processes == 4


def test_a_stage_also_runs_alone(write, tmp_path):
    write("alone.yaml", "text: well\nseed: 4\n")
    command = [sys.executable, "-m", "toys.spring", "--config", "alone.yaml", "number=2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "runs/alone/spring@1/manifest.json").read_text())
    assert manifest["identity"] == {
        "uses": "toys.spring",
        "seed": 4,
        "version": 1,
        "config": {"text": "well", "source": None, "number": 2.0},
    }
    wrong = subprocess.run([*command[:-1], "nmber=2"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "nmber: unknown key; did you mean 'number'?" in wrong.stderr


def test_a_process_takes_the_job_of_its_own_launch_and_not_of_one_that_was_killed(write, tmp_path):
    write("choir.yaml", "song: la")
    command = [sys.executable, "-m", "toys.choir", "--config", "choir.yaml"]
    ranks = [{**os.environ, "RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"} for rank in "01"]
    killed = " ".join([*command, "trouble=kill; exit 0"])
    subprocess.run(["sh", "-c", killed], cwd=tmp_path, env=ranks[0], check=True, capture_output=True)
    assert (tmp_path / "runs/choir/logs/choir@1/launch").exists()
    other = subprocess.Popen(command, cwd=tmp_path, env=ranks[1])
    with pytest.raises(subprocess.TimeoutExpired):
        other.wait(timeout=4)
    main = subprocess.run(command, cwd=tmp_path, env=ranks[0], capture_output=True, text=True, check=False, timeout=60)
    assert (main.returncode, other.wait(timeout=60)) == (0, 0), main.stderr
    assert (tmp_path / "runs/choir/choir@1/voices/1").read_text() == str(other.pid)


def test_lineage_walks_back_to_the_source_files(cordee, write, brook):
    write("rock.txt", "rock")
    brook.write_text(brook.read_text().replace("{uses: toys.spring}", "{uses: toys.spring, source: rock.txt}"))
    assert cordee("run", "brook.yaml").returncode == 0
    told = cordee("lineage", "brook/pool@1").stdout
    assert "brook/pool@1" in told
    assert "source: brook/spring@1" in told
    assert "source: rock.txt  sha256" in told
    assert cordee("lineage", "runs/brook/pool@1/line.txt").stdout == told


def test_reading_stages_imports_no_torch():
    heavy = "{'torch', 'transformers', 'trl', 'pyarrow', 'numpy'}"
    code = f"""
import sys
from cordee import cli, stage
for uses, _ in stage.find():
    stage.load(uses)
print(sorted({heavy} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_logs_of_a_stage_are_what_it_told_and_what_its_processes_wrote(cordee, brook):
    none = cordee("logs", brook)
    assert (none.returncode, none.stderr) == (2, "cordee: command line: STAGE: names no stage; one of spring, pool\n")
    assert "was not started yet" in cordee("logs", brook, "spring").stderr
    cordee("run", brook, "spring.trouble=fault")
    told = cordee("logs", brook, "spring", "spring.trouble=fault").stdout
    assert re.search(r"==> .*events.jsonl\n20\d\d-\d\d-\d\d \d\d:\d\d:\d\d  starts\n.*  pipe: the pipe burst\n", told)
    assert cordee("run", brook).returncode == 0
    assert re.search(r"  ended: finished\n==> .*log.txt\n", cordee("logs", brook, "spring").stdout)


def test_a_stage_in_an_overrides_place_is_told_how_to_run_it(cordee, brook):
    done = cordee("run", brook, "spring")
    assert done.returncode == 2
    assert "'spring' is no key=value; one stage alone is run by `cordee stage RECIPE STAGE`" in done.stderr

"""What fails while a stage runs, planted in real processes: noticed, named, and restarted where that helps."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from watched import ends, reaches, start, wait_for

from cordee import events
from cordee.artifact import Store

STEPS = 60


def _digest():
    digest = ""
    for step in range(1, STEPS + 1):
        digest = hashlib.sha256(f"{digest} {step}".encode()).hexdigest()
    return digest


@pytest.fixture
def march(write, cordee, tmp_path):
    """Runs the toy: the process that has ended, and the folder of its logs."""
    write("march.yaml", "name: march\nstages: {one: {uses: toys.marcher}}")

    def call(*arguments):
        keys = [f"one.{one}" if one[0] != "-" and not one.isdecimal() else one for one in arguments]
        return cordee("run", "march.yaml", *keys, timeout=600), tmp_path / "runs/march/logs/one@1"

    return call


def _made(tmp_path):
    """The artifact, whose steps are those of a run that nothing disturbed."""
    assert (tmp_path / "runs/march/one@1/digest.txt").read_text() == _digest()
    (made,) = Store(tmp_path / "runs").scan("march")
    return made


@pytest.mark.parametrize(
    ("trouble", "kind", "says"),
    [
        ("kill", "killed", "the job's process was ended by SIGKILL from outside"),
        ("reset", "communication", "Connection reset by peer"),
        ("io", "storage", "Input/output error"),
    ],
)
def test_what_passes_is_restarted_from_the_last_resume_point_and_told(march, tmp_path, trouble, kind, says):
    done, logs = march(f"trouble={trouble}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [end["cause"] for end in ends(logs)] == [kind, "finished"]
    spent = _made(tmp_path).manifest.goodput
    (incident,) = spent.incidents
    assert (incident.kind, says in incident.text, incident.step) == (kind, True, 34)
    assert spent.attempts == 2
    assert spent.wall_s == pytest.approx(sum(spent.seconds.values()), abs=0.05)
    assert spent.seconds["lost work"] > 3 * 0.02
    assert spent.seconds["restart"] > 0.9
    assert incident.lost_s > spent.seconds["lost work"] + 0.9
    assert f"{kind}: " in done.stdout
    assert "; is restarted " in done.stdout
    assert re.search(r"published march/one@1 after .*; goodput \d+%, .*; 1 incident, .* lost", done.stdout)


def test_a_process_that_is_told_to_end_by_someone_else_saves_and_is_restarted(march, tmp_path):
    done, logs = march("trouble=term")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(end["cause"], end["step"]) for end in ends(logs)] == [("killed", 35), ("finished", 60)]
    (incident,) = _made(tmp_path).manifest.goodput.incidents
    assert incident.text == "it was told to end by a signal from outside"


@pytest.mark.parametrize(("trouble", "where"), [("stop", "in fail"), ("gil", "in fail")])
def test_a_hang_is_seen_within_ten_seconds_and_its_stacks_are_kept(march, tmp_path, trouble, where):
    done, logs = march(f"trouble={trouble}")
    assert done.returncode == 0, done.stdout + done.stderr
    hang, finished = ends(logs)
    assert (hang["cause"], hang["step"], finished["cause"]) == ("hang", 34, "finished")
    assert hang["silent_s"] < 10 + 3, "seen within 10 s, plus the time for its stacks and its end"
    log = (logs / "log.txt").read_text()
    assert re.search(r"stacks of rank 0 \(process \d+ on .*\), in phase step after step 34:", log)
    assert re.search(rf'marcher.py", line \d+ {where}', log)
    assert _made(tmp_path).manifest.goodput.seconds["hang"] == hang["silent_s"]


@pytest.mark.usefixtures("march")
def test_a_process_that_others_leave_no_core_for_does_not_hang(tmp_path):
    """It would take about 100 s for what it has to compute; the others end after 25."""
    run = start(tmp_path, "one.pace_s=0.1", "one.trouble=compute")
    logs = tmp_path / "runs/march/logs/one@1"
    os.sched_setscheduler(reaches(logs, 5)["pid"], os.SCHED_IDLE, os.sched_param(0))
    reaches(logs, 34)
    burn = "import time; end = time.monotonic() + 25\nwhile time.monotonic() < end: pass"
    others = [subprocess.Popen([sys.executable, "-c", burn]) for _ in range(2 * len(os.sched_getaffinity(0)))]
    said, _ = run.communicate(timeout=300)
    assert all(other.wait() == 0 for other in others)
    assert (run.returncode, [end["cause"] for end in ends(logs)]) == (0, ["finished"]), said
    assert _made(tmp_path).manifest.goodput.incidents == ()


@pytest.mark.parametrize(
    ("trouble", "code", "kind", "says"),
    [
        ("nan", 1, "diverged", "step 35: the loss is nan and the gradient's norm nan; lower the learning rate"),
        ("oom", 1, "out of memory", "MemoryError"),
        ("segv", 1, "unknown", "crashed with SIGSEGV"),
    ],
)
def test_what_would_end_so_again_is_not_restarted(march, trouble, code, kind, says):
    done, logs = march(f"trouble={trouble}", "times=9")
    assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
    assert says in done.stderr
    assert [end["cause"] for end in ends(logs)] == [kind]


def test_the_same_failure_at_the_same_step_twice_stops_with_the_diagnosis(march):
    done, logs = march("trouble=kill", "times=9")
    assert done.returncode == 1
    assert "killed: the job's process was ended by SIGKILL from outside" in done.stderr
    assert "the same happened at step 34 before" in done.stderr
    assert [end["step"] for end in ends(logs)] == [34, 34]


def test_without_restarts_the_first_failure_stops_it(march, tmp_path):
    done, logs = march("trouble=kill", "--restarts", "0")
    assert (done.returncode, len(ends(logs))) == (1, 1)
    assert march()[0].returncode == 0
    assert [one.kind for one in _made(tmp_path).manifest.goodput.incidents] == ["killed"], "kept over runs"


@pytest.mark.usefixtures("march")
def test_a_colleague_asks_for_a_resume_point_and_then_for_the_end(tmp_path, cordee):
    logs = tmp_path / "runs/march/logs/one@1"
    run = start(tmp_path, "one.pace_s=0.3")
    reaches(logs, 2)
    (logs / "save").touch()
    wait_for(lambda: not (logs / "save").exists())
    told = [event["text"] for event in events.read(logs / "events.jsonl") if event["event"] == "note"]
    assert [text for text in told if text.startswith("saved at step ")]
    (logs / "stop").touch()
    assert run.wait(timeout=120) == 130
    assert ends(logs)[-1]["cause"] == "stopped"
    assert cordee("run", "march.yaml", timeout=600).returncode == 0
    assert _made(tmp_path).manifest.goodput.incidents == ()


@pytest.mark.usefixtures("march")
def test_what_was_lost_with_the_run_itself_is_told_by_the_next(tmp_path, cordee):
    logs = tmp_path / "runs/march/logs/one@1"
    run = start(tmp_path, "one.pace_s=0.3")
    reaches(logs, 13)
    run.kill()
    run.wait()
    assert cordee("run", "march.yaml", timeout=600).returncode == 0
    spent = _made(tmp_path).manifest.goodput
    assert [(one.kind, one.step >= 13) for one in spent.incidents] == [("killed", True)]
    assert spent.seconds["lost work"] > 0.3
    assert spent.seconds["restart"] == 0


@pytest.mark.usefixtures("march")
def test_of_two_runs_of_one_recipe_one_works_and_the_other_says_who_does(tmp_path, cordee):
    logs = tmp_path / "runs/march/logs/one@1"
    run = start(tmp_path, "one.pace_s=0.3")
    reaches(logs, 2)
    other = cordee("run", "march.yaml")
    assert (other.returncode, "another run holds this stage; process " in other.stderr) == (1, True)
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=120) == 130
    assert cordee("run", "march.yaml", timeout=600).returncode == 0
    _made(tmp_path)


@pytest.mark.usefixtures("march")
def test_ctrl_c_ends_a_run_that_waits_for_a_restart(tmp_path):
    logs = tmp_path / "runs/march/logs/one@1"
    run = start(tmp_path, "one.pace_s=0.3")
    pid = reaches(logs, 2)["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: ends(logs))
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=120) == 130
    assert len(ends(logs)) == 1


@pytest.mark.usefixtures("march")
def test_what_a_person_ends_at_once_was_stopped_and_is_no_incident(tmp_path, cordee):
    logs = tmp_path / "runs/march/logs/one@1"
    run = start(tmp_path, "one.pace_s=0.3", "one.trouble=deaf", "one.at=3")
    reaches(logs, 2)
    run.send_signal(signal.SIGINT)
    time.sleep(1)
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=120) == 130
    assert [end["cause"] for end in ends(logs)] == ["stopped"]
    status = cordee("status", "march.yaml").stdout
    assert re.search(r"one .* stopped", status), status
    assert cordee("run", "march.yaml", timeout=600).returncode == 0
    assert _made(tmp_path).manifest.goodput.incidents == ()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_ends_it_in_a_line_and_it_continues_once_there_is_space(march, cordee, small_disk, tmp_path):
    done = cordee("run", "march.yaml", "--runs", str(small_disk), "one.trouble=full", timeout=600)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "no space left on the disk" in done.stderr
    assert "free some space, then run again" in done.stderr
    logs = small_disk / "march/logs/one@1"
    assert [end["cause"] for end in ends(logs)] == ["disk full"]
    (small_disk / "march/one@1.partial/large.bin").unlink()
    again = cordee("run", "march.yaml", "--runs", str(small_disk), timeout=600)
    assert again.returncode == 0, again.stderr
    assert (small_disk / "march/one@1/digest.txt").read_text() == _digest()
    del march, tmp_path


@pytest.fixture
def cgroup():
    """A cgroup of 300 MB, whose `cgroup.procs` takes processes."""
    root = Path("/sys/fs/cgroup")
    unified = (root / "cgroup.controllers").exists()
    parent = root if unified else root / "memory"
    folder = parent / f"cordee-test-{os.getpid()}"
    limits = ("memory.max", "memory.swap.max") if unified else ("memory.limit_in_bytes",)
    try:
        folder.mkdir()
        for name in limits:
            (folder / name).write_text("0" if "swap" in name else str(300 * 2**20))
    except OSError:
        pytest.skip("may not make a cgroup with a memory limit")
    yield folder
    folder.rmdir()


@pytest.mark.usefixtures("march")
def test_what_the_kernel_kills_for_memory_is_told_apart_from_what_a_person_kills(tmp_path, cgroup):
    logs = tmp_path / "runs/march/logs/one@1"
    run = start(tmp_path, "one.pace_s=0.3", "one.trouble=leak", "one.at=5")
    pid = reaches(logs, 1)["pid"]
    (cgroup / "cgroup.procs").write_text(str(pid))
    said, _ = run.communicate(timeout=300)
    assert (run.returncode, "was killed by the kernel, which had no memory left" in said) == (1, True), said
    assert [end["cause"] for end in ends(logs)] == ["out of memory"]


def test_a_slow_process_is_an_incident_and_nothing_is_restarted(march, tmp_path):
    done, logs = march("launch.num_processes=2", "pace_s=0.1", "slow_s=0.1", "to=150")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [end["cause"] for end in ends(logs)] == ["finished"]
    (made,) = Store(tmp_path / "runs").scan("march")
    (incident,) = made.manifest.goodput.incidents
    assert (incident.kind, incident.lost_s) == ("straggler", 0)
    assert re.match(
        r"rank 1 \(process \d+ on .*\) is slow: 0\.2\d* s of its own in a step, the others 0\.1", incident.text
    )
    assert incident.text in done.stdout


def test_a_port_that_is_taken_is_not_used(write, cordee, monkeypatch):
    """torch's own default for processes to meet at is taken, and the environment still names it."""
    import socket

    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", 29500))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", "29500")
        write("choir.yaml", "name: choir\nstages: {one: {uses: toys.choir, launch: {num_processes: 2}}}")
        done = cordee("run", "choir.yaml", timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr

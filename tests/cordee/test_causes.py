"""Every end has a cause, told from the messages that torch, NCCL, gloo, vLLM, CUDA, Slurm and Linux really write."""

from pathlib import Path

import pytest

from cordee import causes
from cordee.causes import End


def _messages():
    """The messages of `messages_of_ends.txt` by cause: a cause's name after `#`, then a message a line."""
    found, kind = {}, ""
    for line in Path(__file__).with_name("messages_of_ends.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            kind = line.removeprefix("# ")
        else:
            found.setdefault(kind, []).append(line.replace("\\n", "\n"))
    return found


MESSAGES = _messages()


@pytest.mark.parametrize(("kind", "message"), [(kind, text) for kind, texts in MESSAGES.items() for text in texts])
def test_a_message_names_its_cause(kind, message):
    """In the log of a job, and as the error that one of its processes reported."""
    lines = ["step 6: all is well", *message.splitlines(), '  File "train.py", line 3, in <module>', "=" * 20]
    error = {"event": "error", "exit_code": 1, "text": message}
    assert causes.of(End(1, lines=lines)).kind == kind
    assert causes.of(End(1, errors=[error])).kind == kind


def test_what_is_transient_is_restarted_and_nothing_else():
    assert sorted(causes.TRANSIENT) == ["communication", "hang", "hardware", "killed", "storage"]
    assert not causes.of(End(1, lines=MESSAGES["out of memory"])).is_transient


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        (End(0), "finished"),
        (End(2, errors=[{"exit_code": 2, "text": "r.yaml: stages.a: dry"}]), "user's error"),
        (End(2, lines=["usage: python -m x", "error: no such argument"]), "user's error"),
        (End(130, errors=[{"exit_code": 130, "text": "stopped at step 3 of 9"}], was_asked=True), "stopped"),
        (End(130, was_asked=True), "stopped"),
        (End(130, errors=[{"exit_code": 130, "text": "stopped at step 3 of 9"}]), "killed"),
        (End(1, [{"exit_code": 130, "text": "stopped"}, {"exit_code": 1, "text": "ZeroDivisionError"}]), "unknown"),
        (End(1, errors=[{"exit_code": 1, "text": "ZeroDivisionError: by nothing"}]), "unknown"),
        (End(1), "unknown"),
        (End(-9), "killed"),
        (End(137), "killed"),
        (End(-15), "killed"),
        (End(-9, oom_kills=1), "out of memory"),
        (End(137, oom_kills=1), "out of memory"),
        (End(-7), "storage"),
        (End(-11, lines=["Fatal Python error: Segmentation fault"]), "unknown"),
        (End(-6, lines=["terminate called after throwing an instance of 'std::bad_alloc'"]), "out of memory"),
        (End(1, hang="rank 1 is stopped", lines=["CUDA out of memory"]), "hang"),
        (End(1, dead="rank 1 is gone"), "killed"),
        (End(1, dead="rank 1 is gone", oom_kills=1), "out of memory"),
    ],
)
def test_an_exit_code_or_a_signal_names_its_cause(end, kind):
    assert causes.of(end).kind == kind


LAUNCHER = (
    "E1127 10:00:01.1 17 torch/distributed/elastic/multiprocessing/api.py:1003] failed (exitcode: {code})"
    " local_rank: 1 (pid: 3374) of binary: /usr/bin/python"
)
CLOSED = MESSAGES["communication"][4]


@pytest.mark.parametrize(
    ("code", "oom_kills", "kind", "says"),
    [
        (-9, 0, "killed", "rank 1 (process 3374) was ended by SIGKILL from outside"),
        (-9, 1, "out of memory", "rank 1 (process 3374) was killed by the kernel"),
        (1, 0, "communication", "Connection closed by peer"),
    ],
)
def test_a_process_that_was_killed_is_the_cause_and_not_that_the_others_miss_it(code, oom_kills, kind, says):
    lines = [CLOSED, LAUNCHER.format(code=code), "=" * 60]
    cause = causes.of(End(1, [{"exit_code": 1, "text": CLOSED}], lines, oom_kills))
    assert (cause.kind, says in cause.text) == (kind, True)


def test_a_stop_that_follows_the_death_of_another_process_is_not_the_cause():
    cause = causes.of(End(130, lines=[LAUNCHER.format(code=-9)]))
    assert cause.text == "rank 1 (process 3374) was ended by SIGKILL from outside"


def test_the_cause_is_the_error_of_the_process_that_failed_first_of_all():
    """One process saw the user's mistake; the other, that it was left alone."""
    errors = [{"exit_code": 1, "text": CLOSED}, {"exit_code": 2, "text": "data: no rows"}]
    assert causes.of(End(1, errors)).text == "data: no rows"
    errors = [{"exit_code": 1, "text": CLOSED}, {"exit_code": 1, "text": MESSAGES["diverged"][0]}]
    assert causes.of(End(1, errors)).kind == "diverged"

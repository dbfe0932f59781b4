"""What the time of a stage went to, by hand from made-up events."""

import json
import time

import pytest

from cordee import causes, events, goodput
from cordee.heartbeat import Heart
from cordee.work import Work


def _ended(time, cause="finished", last=0, taken=0, silent_s=0.0, **spent):
    told = {"cause": cause, "text": f"it {cause}", "step": last, "taken": taken, "silent_s": silent_s, "spent": spent}
    return {"event": "ended", "time": time, **told}


FAILED = [
    {"event": "start", "time": 0.0},
    # 4 s until its first word, 6 of import, 10 of compiling, 50 steps of 1 s and 0.2 s of data, 5 of a checkpoint at
    # step 40, and 15 s of silence before it was killed: 100 s
    _ended(100.0, "hang", 50, 50, 15.0, compile=10.0, data=10.0, step=50.0, checkpoint=5.0, **{"import": 6.0}),
    {"event": "start", "time": 102.0, "restart": True},
    {"event": "resumed", "time": 110.0, "step": 40, "text": ""},
    {"event": "incident", "time": 120.0, "kind": "straggler", "step": 45, "text": "rank 1 is slow"},
    _ended(200.0, "finished", 110, 70, 1.0, **{"import": 7.0, "data": 14.0, "step": 70.0, "evaluation": 4.0}),
]


def test_a_hang_costs_the_silence_the_restart_and_the_steps_that_are_taken_again():
    found = goodput.account(FAILED)
    # of the 50 steps, 10 are taken again: 10 s of steps and 2 s of data; the second start takes 102 - 95 + 7 s
    assert found.seconds == {
        "productive": 40 + 70 + 4,
        "start": 4 + 6 + (98 - 96) + 7 + 1,
        "data": 8 + 14,
        "compile": 10,
        "checkpoint": 5,
        "lost work": 12,
        "hang": 15,
        "restart": 2,
    }
    assert found.wall_s == sum(found.seconds.values()) == 200
    assert found.share == 114 / 200
    assert found.attempts == 2
    straggler, hang = sorted(found.incidents, key=lambda one: one.lost_s)
    assert (straggler.kind, straggler.lost_s) == ("straggler", 0)
    assert (hang.kind, hang.step, hang.lost_s) == ("hang", 50, 12 + 15 + 2 + (2 + 7 + 1))
    told = "goodput 57%, data 11%, start 10%, hang 8%, lost work 6%, compile 5%, checkpoint 2%, restart 1%"
    assert goodput.told(found) == f"{told}; 1 incident, 39.0 s lost"


def test_the_night_between_two_runs_does_not_count():
    two = [
        {"event": "start", "time": 0.0},
        _ended(50.0, "stopped", 10, 10, **{"import": 10.0, "step": 40.0}),
        {"event": "start", "time": 10_000.0},
        {"event": "resumed", "time": 10_001.0, "step": 10, "text": ""},
        _ended(10_050.0, "finished", 20, 10, **{"import": 10.0, "step": 40.0}),
    ]
    found = goodput.account(two)
    assert (found.wall_s, found.share, found.incidents) == (100, 0.8, ())


def test_a_stage_that_tells_no_phases_was_productive_if_it_ended_well():
    two = [
        {"event": "start", "time": 0.0},
        _ended(30.0, "killed"),
        {"event": "start", "time": 31.0, "restart": True},
        _ended(100.0),
    ]
    found = goodput.account(two)
    assert (found.seconds["productive"], found.seconds["lost work"], found.seconds["restart"]) == (69, 30, 1)
    assert goodput.told(found) == "goodput 69%, lost work 30%, restart 1%; 1 incident, 31.0 s lost"


@pytest.mark.parametrize("is_gone", [True, False])
def test_the_end_of_an_attempt_is_told_by_its_last_heartbeats(tmp_path, is_gone):
    """By the run that saw it; or, where that is gone too, by the next, and then at the time of the last word."""
    work = Work(tmp_path / "out", tmp_path / "logs")
    work.logs.mkdir()
    goodput.close(work, "killed")
    assert not work.events.exists(), "nothing was started"
    events.append(work.events, "start")
    heart = Heart(work.logs)
    heart.begin("data", 7)
    heart.enter("step")
    heart.stepped(8)
    time.sleep(0.05)
    goodput.close(work, "killed", causes.GONE if is_gone else "by hand")
    goodput.close(work, "finished")
    *_, ended = events.read(work.events)
    (told,) = [json.loads(line) for line in work.events.read_text().splitlines() if '"ended"' in line]
    assert ended == told
    assert (ended["cause"], ended["step"], ended["taken"]) == ("killed", 8, 1)
    assert set(ended["spent"]) == {"import", "data", "step"}
    assert (ended["silent_s"] == 0) == is_gone

"""Hangs and slow processes, decided by the real function from heartbeats that are made up."""

import random

import pytest

from cordee.heartbeat import Beat
from cordee.pace import GRACE_S, PATIENCE_S, Pace

LOOK_S = 0.5


class Group:
    """Processes whose steps end together, each after a time of its own."""

    def __init__(self, count=2):
        self.pace, self.now = Pace(), 1000.0
        self.step, self.spent = 0, 0.0
        self.own_s = [0.01] * count
        self.phase = "data"

    def beats(self):
        same = {"host": "n1", "started": "1", "step": self.step, "taken": self.step, "phase": self.phase}
        spent = {"step": self.spent}
        return [
            Beat(rank=rank, pid=100 + rank, own_s=own_s, spent=spent, monotonic=self.spent, time=self.spent, **same)
            for rank, own_s in enumerate(self.own_s)
        ]

    def take(self, seconds):
        """A step that takes so long, looked at all the time; what was said about it."""
        said = [self.wait(seconds)]
        self.step += 1
        self.spent += seconds
        return [text for text in (*said, self.look(0.0)) if text]

    def look(self, seconds, stopped=()):
        self.now += seconds
        return self.pace.hang(self.beats(), self.now, stopped)

    def wait(self, seconds, stopped=()):
        """What was said first, and nothing where it was nothing."""
        end = self.now + seconds
        while self.now < end:
            if said := self.look(min(LOOK_S, end - self.now), stopped):
                return said
        return ""


@pytest.mark.parametrize(("usual_s", "seed"), [(0.02, 0), (0.02, 1), (0.5, 2), (0.5, 3), (5.0, 4)])
def test_no_false_alarm_in_a_thousand_steps_with_fourfold_jitter(usual_s, seed):
    """Step times between the usual and four times as long; now and then one of eight times, within the grace."""
    group, chance = Group(), random.Random(seed)  # noqa: S311
    for step in range(1000):
        seconds = usual_s * 4 ** chance.random()
        seconds = min(8 * usual_s, GRACE_S) if usual_s < 1 and step % 100 == 99 else seconds
        assert group.take(seconds) == []


@pytest.mark.parametrize("usual_s", [0.02, 0.5, 5.0])
def test_a_hang_is_seen_within_ten_seconds_or_five_of_the_longest_steps(usual_s):
    group, chance = Group(), random.Random(0)  # noqa: S311
    steps = [usual_s * 4 ** chance.random() for _ in range(100)]
    for seconds in steps:
        group.take(seconds)
    began, said = group.now, group.wait(1000)
    assert group.now - began <= max(10.0, 5 * sorted(steps)[98])
    assert said.startswith("rank 0 (process 100 on n1) is silent for ")
    assert "in phase data after step 100, where recent steps took at most" in said
    assert said.endswith("; 2 of 2 processes are")


def test_a_hang_right_after_the_first_steps_is_seen():
    """Which were over before anyone looked twice."""
    group = Group()
    group.step, group.spent = 30, 0.6
    began = group.now
    assert group.wait(1000) != ""
    assert group.now - began < 10


def test_the_process_that_is_furthest_behind_is_named():
    group = Group()
    for _ in range(10):
        group.take(0.1)
    beats = group.beats
    group.beats = lambda: [one if one.rank else Beat(**{**vars(one), "step": 11, "taken": 11}) for one in beats()]
    assert group.wait(1000).startswith("rank 1 (process 101 on n1) is silent")


def test_a_process_that_is_stopped_is_seen_in_any_phase():
    group = Group()
    group.phase = "evaluation"
    assert group.wait(GRACE_S - 1, stopped={1}) == ""
    assert group.wait(1) == ""  # it continues
    began = group.now
    assert group.wait(100, stopped={1}) == "rank 1 (process 101 on n1) is stopped in phase evaluation after step 0"
    assert group.now - began < 10


@pytest.mark.parametrize("phase", PATIENCE_S)
def test_before_the_pace_is_known_each_phase_has_a_patience_of_its_own(phase):
    group = Group()
    group.phase = phase
    assert group.wait(PATIENCE_S[phase] - 1) == ""
    assert group.wait(2) != ""


def test_a_checkpoint_between_quick_steps_is_no_hang():
    group = Group()
    for _ in range(10):
        group.take(0.05)
    group.phase = "checkpoint"
    assert group.wait(120) == ""
    group.phase = "data"
    assert group.take(0.05) == []


def test_a_process_that_has_ended_is_waited_for():
    group = Group()
    group.phase = "end"
    assert group.wait(1e5) == ""


def test_time_in_which_nobody_looked_does_not_count():
    """The one who looks was stopped itself, as by Ctrl-Z, or its machine slept."""
    group = Group()
    for _ in range(10):
        group.take(0.1)
    assert group.look(3600.0) == ""
    assert group.take(0.1) == []


def _slow(group):
    return group.pace.slow(group.beats())


def test_a_slow_process_is_named_once_until_it_is_well_again():
    group = Group(4)
    for _ in range(40):
        group.take(0.1)
    assert _slow(group) == ""
    group.own_s = [0.01, 0.01, 0.08, 0.01]
    said = []
    for _ in range(100):
        group.take(0.2)
        said.append(_slow(group))
    expected = "rank 2 (process 102 on n1) is slow: 0.08 s of its own in a step, the others 0.01 s"
    assert [text for text in said if text] == [expected]
    group.own_s = [0.01] * 4
    group.take(0.1)
    assert _slow(group) == ""
    group.own_s = [0.01, 0.01, 0.08, 0.01]
    for _ in range(100):
        group.take(0.2)
        said.append(_slow(group))
    assert [text for text in said if text] == [expected] * 2


def test_nobody_is_slow_for_a_moment_or_by_what_a_step_does_not_feel():
    group = Group()
    for _ in range(40):
        group.take(0.1)
    for own_s in ([0.01, 0.08], [0.01, 0.01], [0.001, 0.002]):
        group.own_s = own_s
        for _ in range(20 if own_s == [0.01, 0.08] else 200):
            group.take(0.1)
            assert _slow(group) == ""

"""What the time of a stage went to, and what went wrong meanwhile, from its events and nothing else.

Each attempt is a `start` event, what its processes told, and an `ended` event with the cause and the seconds by phase
of rank 0. Steps that the next attempt takes again, and what an attempt did after its last step, are lost work.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cordee import causes, events, heartbeat, units
from cordee.heartbeat import Beat
from cordee.manifest import Goodput, Incident
from cordee.work import Work

PLACES = {
    **dict.fromkeys(("step", "evaluation"), "productive"),
    **dict.fromkeys(("import", "end"), "start"),
    **dict.fromkeys(("checkpoint", "publish"), "checkpoint"),
    **{name: name for name in ("data", "compile")},
}
"""What the seconds of each phase count as."""
NAMES = ("productive", "start", "data", "compile", "checkpoint", "lost work", "hang", "restart")
WELL = ("finished", "stopped")
"""Ends after which no work is lost."""


@dataclass(frozen=True)
class _Attempt:
    """One start of a stage's processes."""

    start_s: float
    is_restart: bool
    """Whether the run that saw the attempt before fail has started it."""
    resumed: int
    """The step that it continued from."""
    end: dict[str, Any]
    """The `ended` event."""
    incidents: tuple[dict[str, Any], ...]

    @property
    def wall_s(self) -> float:
        return float(self.end["time"] - self.start_s)


def close(work: Work, cause: str, text: str = "", beats: Sequence[Beat] | None = None) -> None:
    """Append the `ended` event of the last attempt, unless there is one.

    Args:
        work: the stage's folders.
        cause: why it ended; `killed` where the run that would have said it is gone.
        text: the evidence.
        beats: the last heartbeats; those that are in its folder if not given.
    """
    found = events.read(work.events)
    last = next((event for event in reversed(found) if event["event"] in ("start", "ended")), None)
    if last is None or last["event"] == "ended":
        return
    beats = heartbeat.read(work.logs) if beats is None else beats
    main = next((beat for beat in beats if beat.rank == 0), None)
    seen_s = max([found[-1]["time"], *(beat.time for beat in beats)])
    now = seen_s if text == causes.GONE else time.time()
    ended = {
        "cause": cause,
        "text": text,
        "step": max((beat.step for beat in beats), default=0),
        "taken": main.taken if main else 0,
        "spent": main.spent if main else {},
        "silent_s": round(max(0.0, now - main.time), 3) if main else 0.0,
    }
    events.append_row(work.events, {"event": "ended", "time": now, **ended})


def account(found: Sequence[dict[str, Any]]) -> Goodput:
    """What the time of all attempts went to, and the incidents."""
    attempts = list(_attempts(found))
    total = dict.fromkeys(NAMES, 0.0)
    incidents, wall_s = [], 0.0
    for attempt, after in itertools.zip_longest(attempts, attempts[1:]):
        spent = _spent(attempt, after)
        gap_s = max(0.0, after.start_s - attempt.end["time"]) if after and after.is_restart else 0.0
        total = {name: total[name] + spent[name] for name in NAMES}
        total["restart"] += gap_s
        wall_s += attempt.wall_s + gap_s
        incidents += [_incident(event, float(event.get("lost_s", 0.0))) for event in attempt.incidents]
        if attempt.end["cause"] not in WELL:
            again = _spent(after, None) if after else dict.fromkeys(NAMES, 0.0)
            lost_s = spent["lost work"] + spent["hang"] + gap_s + again["start"] + again["compile"]
            incidents.append(_incident({**attempt.end, "kind": attempt.end["cause"]}, lost_s))
    seconds = {name: round(total[name], 3) for name in NAMES}
    return Goodput(wall_s=round(wall_s, 3), seconds=seconds, attempts=len(attempts), incidents=tuple(incidents))


def told(of: Goodput) -> str:
    """`goodput 91%, start 6%, checkpoint 2%`: what is at least a hundredth; nothing where no phase is known."""
    if not any(seconds for name, seconds in of.seconds.items() if name != "productive"):
        return ""
    shares = {name: seconds / of.wall_s for name, seconds in of.seconds.items() if of.wall_s}
    rest = sorted(((share, name) for name, share in shares.items() if name != "productive"), reverse=True)
    lost = "".join(f", {name} {share:.0%}" for share, name in rest if share >= 0.01)
    failed = [one for one in of.incidents if one.lost_s]
    many = "s" if len(failed) != 1 else ""
    cost = units.duration(sum(one.lost_s for one in failed))
    return f"goodput {of.share:.0%}{lost}" + (f"; {len(failed)} incident{many}, {cost} lost" if failed else "")


def _attempts(found: Sequence[dict[str, Any]]) -> Iterator[_Attempt]:
    starts = [place for place, event in enumerate(found) if event["event"] == "start"]
    for start, end in itertools.zip_longest(starts, starts[1:]):
        mine = found[start:end]
        last = mine[-1]
        unknown = {"cause": "killed", "text": causes.GONE, "step": 0, "taken": 0, "spent": {}, "silent_s": 0.0}
        ended = next((event for event in mine if event["event"] == "ended"), {**unknown, "time": last["time"]})
        resumed = next((event["step"] for event in mine if event["event"] == "resumed"), 0)
        incidents = tuple(event for event in mine if event["event"] == "incident")
        yield _Attempt(mine[0]["time"], bool(mine[0].get("restart")), resumed, ended, incidents)


def _spent(attempt: _Attempt, after: _Attempt | None) -> dict[str, float]:
    """What the seconds of an attempt went to; they add up to its wall time."""
    end, found = attempt.end, dict.fromkeys(NAMES, 0.0)
    is_well = end["cause"] in WELL
    if not end["spent"]:  # it tells no phases
        found["productive" if is_well else "lost work"] = attempt.wall_s
        return found
    for phase, seconds in end["spent"].items():
        found[PLACES[phase]] += seconds
    silent_s = end["silent_s"]
    found["start" if is_well else "hang" if end["cause"] == "hang" else "lost work"] += silent_s
    found["start"] += attempt.wall_s - sum(found.values())  # until its processes told something
    if after and end["taken"]:
        again = min(end["taken"], max(0, end["step"] - after.resumed)) / end["taken"]
        for name, phase in (("productive", "step"), ("data", "data")):
            lost_s = again * end["spent"].get(phase, 0.0)
            found[name] -= lost_s
            found["lost work"] += lost_s
    return found


def _incident(event: dict[str, Any], lost_s: float) -> Incident:
    return Incident(
        kind=event["kind"], text=event["text"], step=event["step"], time=float(event["time"]), lost_s=round(lost_s, 3)
    )

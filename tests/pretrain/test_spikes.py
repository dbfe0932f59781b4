"""Loss spikes: planted in the loss of a step, the training goes back and leaves rows out."""

import json
import math

import pytest

from cordee import events
from cordee.errors import Fault
from pretrain.training import loop, spikes
from pretrain.training.settings import LossSpikes

USUAL = [2.0 + 0.01 * (step % 3) for step in range(spikes.WINDOW)]


@pytest.mark.parametrize(
    ("loss", "grad_norm", "recent", "expected"),
    [
        (3.5, 1.0, USUAL, True),
        (2.9, 1.0, USUAL, False),
        (9.0, 1.0, USUAL[1:], False),
        (math.nan, 1.0, [], True),
        (2.0, math.inf, [], True),
    ],
)
def test_what_a_spike_is(loss, grad_norm, recent, expected):
    assert spikes.is_one(loss, grad_norm, recent, LossSpikes()) == expected


@pytest.fixture
def plant(monkeypatch):
    """Makes the losses of rows at these places of the stream no number, and keeps the places that were trained on."""
    places = []

    def call(*bad):
        original, accumulate = loop._samples, loop._accumulate

        def samples(training, step):
            places.append(step)
            return original(training, step)

        def spoilt(training, rows, batches):
            sums = accumulate(training, rows, batches)
            return {**sums, "loss": math.nan} if places[-1] in bad else sums

        monkeypatch.setattr(loop, "_samples", samples)
        monkeypatch.setattr(loop, "_accumulate", spoilt)
        return places

    return call


def incidents(out):
    return [one["text"] for one in events.read(out.parent / "events.jsonl") if one["event"] == "incident"]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ({"skip_steps": 2}, [0, 1, 2, 3, 4, 5, 8, 9, 10]),
        ({"back_steps": 3}, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
    ],
    ids=["back to the last point", "skips more", "goes back further"],
)
def test_it_goes_back_and_the_rows_since_then_are_left_out(trained, plant, keys, expected):
    places = plant(5)
    out, metrics = trained("a", max_steps=7, resume_steps=2, loss_spikes=keys)
    again = 2 if "back_steps" in keys else 4
    assert places == [0, *expected], "the first batch is seen before the first step as well"
    assert metrics["rollbacks"] == 1
    assert metrics["skipped_steps"] == expected[6] - again
    (said,) = incidents(out)
    left_out = metrics["skipped_steps"]
    assert said == f"step 6: the loss is nan: goes back to step {again} and leaves out the rows of {left_out} steps"
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 8))


def test_a_kill_after_it_ends_in_the_same_weights(trained, plant, monkeypatch):
    plant(5)
    whole, metrics = trained("a", max_steps=9, resume_steps=2, loss_spikes={})

    class Killed(BaseException):
        pass

    original = loop._count

    def dying(training, state, *rest):
        original(training, state, *rest)
        if state.step == 5 and state.rollbacks:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_count", dying)
        with pytest.raises(Killed):
            trained("b", max_steps=9, resume_steps=2, loss_spikes={})
    killed, again = trained("b", max_steps=9, resume_steps=2, loss_spikes={})
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert {name: again[name] for name in ("rollbacks", "skipped_steps", "loss")} == {
        name: metrics[name] for name in ("rollbacks", "skipped_steps", "loss")
    }


def test_it_ends_after_so_many_rollbacks_and_without_a_point_at_once(trained, plant):
    plant(*range(3, 90))
    with pytest.raises(Fault, match="step 3: the loss is nan, after 2 rollbacks; lower learning_rate"):
        trained("a", max_steps=9, resume_steps=2, loss_spikes={"rollbacks": 2})
    with pytest.raises(Fault, match="step 4: the loss is nan, and there is no resume point yet"):
        trained("b", max_steps=9, resume_steps=9, loss_spikes={})

"""Which checkpoints of a training are kept."""

import json

import pytest

from cordee import retention
from cordee.config import Keep
from cordee.errors import UserError
from posttrain import sft
from pretrain import train


@pytest.fixture
def out(tmp_path):
    """Checkpoints at each tenth step to 60, the best measured at 20; nothing is measured at 60."""
    for step in range(10, 70, 10):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
        (tmp_path / "checkpoints" / str(step) / "model.safetensors").write_bytes(b"weights")
    rows = [{"step": 0, "heldout_loss": 0.1}, {"step": 10, "loss": 2.0}]
    rows += [{"step": step, "heldout_loss": abs(step - 21) / 10} for step in range(10, 60, 10)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def steps(out):
    return sorted(int(path.name) for path in (out / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (Keep(), [60]),
        (Keep(last=2), [50, 60]),
        (Keep(last=1, every=30), [30, 60]),
        (Keep(last=1, best=1), [20, 60]),
        (Keep(last=0, best=2), [20, 30]),
        (Keep(last=9), [10, 20, 30, 40, 50, 60]),
        (Keep(last=0), []),
    ],
)
def test_the_last_every_so_many_and_the_best_are_kept(out, keep, left):
    assert retention.apply(out, keep) == [step for step in range(10, 70, 10) if step not in left]
    assert steps(out) == left


def test_the_more_reward_the_better(out):
    rows = [{"step": step, "heldout_reward": step % 40} for step in range(10, 70, 10)]
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    retention.apply(out, Keep(last=0, best=1))
    assert steps(out) == [30]


def test_a_kill_while_one_is_deleted_leaves_no_half_of_it(out, monkeypatch):
    def killed(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(retention.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            retention.apply(out, Keep())
    assert [path.name for path in (out / "checkpoints").iterdir() if not path.name.isdecimal()] == [".dropped-10"]
    retention.apply(out, Keep())
    assert steps(out) == [60]


@pytest.mark.parametrize("kind", [sft.Config, train.Config], ids=["sft", "pretrain"])
def test_the_best_needs_measurements(kind):
    given = {"model": ".", "data": [{"path" if kind is sft.Config else "tokens": "."}], "keep_checkpoints": {"best": 1}}
    if kind is train.Config:
        given |= {"max_steps": 9, "global_batch_size": 8, "sequence_length": 8, "learning_rate": 1e-3}
    with pytest.raises(UserError, match=r"keep_checkpoints\.best: nothing is measured at the checkpoints"):
        kind.model_validate(given)
    kind.model_validate(given | {"eval_steps": 1})

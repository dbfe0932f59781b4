"""The reference's log-probabilities: once for each answer, kept in parts, or told by the rows and then checked."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dpo_samples import config, metrics_of, pair

from cordee import files
from cordee.errors import Fault, Stopped, UserError
from cordee.stage import Context
from posttrain import dpo, kto
from posttrain.training import reference
from posttrain.training.preference_trainer import PreferenceTrainer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that outlives a stage, as a recipe's run has it; small parts."""
    monkeypatch.setenv("CORDEE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(reference, "BATCHES", 2)
    return tmp_path / "cache" / "reference_logprobs"


def parts(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/*.json"))


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many answers were scored by each call."""
    seen: list[int] = []
    score = reference._scored

    def counted(trainer: Any, rows: Any, which: Any) -> Any:
        seen.append(len(which))
        return score(trainer, rows, which)

    monkeypatch.setattr(reference, "_scored", counted)
    return seen


def test_a_second_training_reads_what_the_first_computed(
    model_folder: Path, pairs_file: Path, new_context: Callable[[str], Context], cache: Path, scored: list[int]
) -> None:
    one, two, other = (new_context(name) for name in ("one", "two", "other"))
    dpo.run(config(model_folder, pairs_file, heldout=0.25), one)
    assert sum(scored) == 2 * 24
    # batches of 8 answers, 2 in a part: 36 answers to train on, and 12 that are held out
    assert [len(files.read_sealed(path)["logprobs"]) for path in parts(cache)].count(16) == 2
    assert len(parts(cache)) == 4
    scored.clear()
    changed = {"beta": 0.3, "learning_rate": 1e-3}
    dpo.run(config(model_folder, pairs_file, heldout=0.25, lora={"r": 2}, trainer=changed), two)
    assert scored == []
    assert "log-probabilities of the reference: 36 answers, 0 from the data, 36 from the cache" in notes(two)
    dpo.build(config(model_folder, pairs_file, precision="bfloat16", trainer={"bf16": True}), other)
    assert sum(scored) == 2 * 24


def read_from(asked: dpo.Config, **source: Any) -> dpo.Config:
    """A config with further keys of its source."""
    keys = asked.model_dump(mode="json")
    return dpo.Config.model_validate(keys | {"data": [keys["data"][0] | source]})


def notes(context: Context) -> list[str]:
    return [row["text"] for row in files.read_json_lines(context.events) if "text" in row]


@pytest.mark.parametrize("fault", ["stopped", "killed", "damaged"])
def test_a_pass_goes_on_where_it_was_stopped(
    model_folder: Path, pairs_file: Path, new_context: Callable[[str], Context], cache: Path, scored: list[int],
    monkeypatch: pytest.MonkeyPatch, fault: str,
) -> None:  # fmt: skip
    whole, context, asked = new_context("whole"), new_context("broken"), config(model_folder, pairs_file)
    dpo.run(asked, whole)
    before = [path.read_text() for path in parts(cache)]
    assert len(before) == 3
    for path in parts(cache)[1:]:
        path.unlink()
    if fault == "damaged":
        parts(cache)[0].write_text(before[0].replace("0", "1"))
    scored.clear()
    if fault == "stopped":
        (context.events.parent / "stop").touch()
        with pytest.raises(Stopped, match="stopped at answer 16 of 48 that the reference scores"):
            dpo.run(asked, context)
        (context.events.parent / "stop").unlink()
    if fault == "killed":
        write = files.write_sealed

        def dying(path: Path, value: Any) -> None:
            write(path, value)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(files, "write_sealed", dying)
            with pytest.raises(KeyboardInterrupt):
                dpo.run(asked, context)
    dpo.run(asked, context)
    assert sum(scored) == (48 if fault == "damaged" else 32)
    assert [path.read_text() for path in parts(cache)] == before
    assert metrics_of(context) == metrics_of(whole)


def with_references(model: Path, file: Path, context: Context, change: Callable[[dict[str, Any]], None]) -> Path:
    """The pairs with what the model itself says of them."""
    trainer, _ = dpo.build(config(model, file, lora=None), context)
    rows = []
    for at in range(24):
        chosen, rejected = trainer.train_dataset.reference[at].tolist()
        rows.append(pair(at) | {"chosen_reference_logprob": chosen, "rejected_reference_logprob": rejected})
        change(rows[-1])
    told = file.with_name("told.jsonl")
    told.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return told


def test_what_rows_tell_is_used_once_the_first_were_checked(
    model_folder: Path, tmp_path: Path, new_context: Callable[[str], Context], scored: list[int]
) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair(n)) + "\n" for n in range(24)))
    told = with_references(model_folder, file, new_context("plain"), lambda _: None)
    scored.clear()
    one, other = new_context("told"), new_context("computed")
    dpo.run(config(model_folder, told), one)
    assert sum(scored) == 16
    assert "48 answers, 48 from the data, 0 from" in "\n".join(notes(one))
    dpo.run(config(model_folder, file), other)
    for row, same in zip(metrics_of(one), metrics_of(other), strict=True):
        assert row["loss"] == pytest.approx(same["loss"], abs=1e-5)

    def changed(row: dict[str, Any]) -> None:
        row["rejected_reference_logprob"] -= 3.0

    wrong = with_references(model_folder, file, new_context("wrong"), changed)
    expected = r"told\.jsonl: row 1: says that the reference's log-probability of the answer is -\d+\.\d+ nats, and the"
    with pytest.raises(UserError, match=expected):
        dpo.run(config(model_folder, wrong), new_context("refused"))
    asked = read_from(config(model_folder, wrong), ignore=["chosen_reference_logprob", "rejected_reference_logprob"])
    assert dpo.run(asked, new_context("ignored"))["steps"] == 6
    # sums of all tokens are of no use where those behind the shorter answer weigh less
    scored.clear()
    dpo.build(config(model_folder, told, trainer={"ld_alpha": 0.5}), new_context("weighed"))
    assert sum(scored) == 48


def test_what_is_told_of_other_tokens_is_computed(
    model_folder: Path, tmp_path: Path, new_context: Callable[[str], Context], scored: list[int]
) -> None:
    """The end of a text's prompt is one token with the beginning of one answer, and not with that of the other."""
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair(n)) + "\n" for n in range(24)))
    plain, _ = dpo.build(config(model_folder, file, lora=None), new_context("plain"))
    lengths = [[len(plain.train_dataset.tokens(at, side)[1]) for side in range(2)] for at in range(24)]
    rows = iter(lengths)

    def other_tokens(row: dict[str, Any]) -> None:
        chosen, rejected = next(rows)
        row |= {"chosen_reference_tokens": chosen, "rejected_reference_tokens": rejected + 1}
        row["rejected_reference_logprob"] -= 5.0

    told = with_references(model_folder, file, new_context("told"), other_tokens)
    scored.clear()
    trainer, _ = dpo.build(config(model_folder, told), new_context("mixed"))
    assert sum(scored) == 24 + 8  # all rejected ones, and the chosen ones of the rows that are checked
    assert trainer.train_dataset.reference == pytest.approx(plain.train_dataset.reference, abs=1e-4)


def test_each_source_is_checked(model_folder: Path, tmp_path: Path, new_context: Callable[[str], Context]) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair(n)) + "\n" for n in range(24)))
    told = with_references(model_folder, file, new_context("plain"), lambda _: None)
    rows = [json.loads(line) for line in told.read_text().splitlines()]
    wrong = tmp_path / "wrong.jsonl"  # scored by another model
    wrong.write_text("".join(json.dumps(row | {"chosen_reference_logprob": -1.0}) + "\n" for row in rows[20:]))
    told.write_text("".join(json.dumps(row) + "\n" for row in rows[:20]))
    asked = config(model_folder, told).model_dump(mode="json")
    both = dpo.Config.model_validate(asked | {"data": [{"path": str(told)}, {"path": str(wrong)}]})
    ignored = r"ignore: \[chosen_reference_logprob, rejected_reference_logprob\]"
    with pytest.raises(UserError, match=rf"wrong\.jsonl: row 1: says that .* is -1\.0000 nats.*{ignored}"):
        dpo.run(both, new_context("both"))


def test_parts_of_another_batch_size_are_not_taken_for_ones_own(
    model_folder: Path, pairs_file: Path, new_context: Callable[[str], Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    def values(name: str, size: int) -> Any:
        asked = config(model_folder, pairs_file, per_device_train_batch_size=size, lora=None)
        trainer, _ = dpo.build(asked, new_context(name))
        return trainer.train_dataset.reference

    values("large", 8)  # a part of 32 answers and one of 16
    found = values("small", 4)  # parts of 16: the second begins elsewhere and is as long
    monkeypatch.setenv("CORDEE_CACHE", str(pairs_file.parent / "empty"))
    assert found == pytest.approx(values("anew", 4), abs=1e-4)


def test_some_rows_may_tell_and_others_not(
    model_folder: Path, tmp_path: Path, new_context: Callable[[str], Context], scored: list[int]
) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair(n)) + "\n" for n in range(24)))
    seen: list[int] = []

    def without_some(row: dict[str, Any]) -> None:
        seen.append(1)
        if len(seen) % 2:
            del row["chosen_reference_logprob"]

    told = with_references(model_folder, file, new_context("plain"), without_some)
    scored.clear()
    trainer, _ = dpo.build(config(model_folder, told), new_context("mixed"))
    assert sum(scored) == 12 + 13  # of the 8 rows that are checked 3 tell one answer alone
    plain, _ = dpo.build(config(model_folder, file), new_context("all"))
    assert trainer.train_dataset.reference == pytest.approx(plain.train_dataset.reference, abs=1e-4)


def test_another_reference_is_noticed_at_the_first_step(
    model_folder: Path, pairs_file: Path, new_context: Callable[[str], Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    score = reference._scored
    monkeypatch.setattr(reference, "_scored", lambda *given: score(*given) - 0.5)
    for stage in (dpo, kto):
        asked = stage.Config.model_validate(config(model_folder, pairs_file).model_dump(mode="json"))
        with pytest.raises(Fault, match="the model does not start as its reference"):
            stage.run(asked, new_context(stage.__name__.rpartition(".")[2]))


def test_each_distinct_row_is_scored_once(
    model_folder: Path, pairs_file: Path, context: Context, scored: list[int]
) -> None:
    trainer, _ = dpo.build(read_from(config(model_folder, pairs_file), weight=2.5), context)
    assert len(trainer.train_dataset) == 60
    assert sum(scored) == 48
    same = [at for at in range(60) if trainer.train_dataset.sequences.places[at] == 3]
    assert len(same) >= 2
    assert len({tuple(trainer.train_dataset[at]["reference"].tolist()) for at in same}) == 1


@pytest.mark.parametrize("size", [2, 5, 24])
def test_an_unrelated_answer_is_one_to_another_prompt(
    model_folder: Path, tmp_path: Path, context: Context, size: int
) -> None:
    """Of pairs, both sides of which share a prompt, and of rows that are seen several times."""
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair(n)) + "\n" for n in range(size)))
    keys = read_from(config(model_folder, file), weight=2).model_dump(mode="json")
    trainer, _ = kto.build(kto.Config.model_validate(keys), context)
    rows = trainer.train_dataset
    assert len(rows) == 4 * size
    partners = rows._partners
    assert sorted(partners) == list(range(2 * size))
    for at in range(2 * size):
        prompt, answer = rows.tokens(at, 1)
        other = int(partners[at])
        assert rows.tokens(other, 0)[0].tolist() != prompt.tolist() == rows.tokens(at, 0)[0].tolist()
        assert answer.tolist() == rows.tokens(other, 0)[1].tolist()
    assert rows.reference.shape == (2 * size, 2)


def test_answers_to_one_prompt_alone_measure_no_divergence(
    model_folder: Path, tmp_path: Path, new_context: Callable[[str], Context]
) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair(n) | {"prompt": pair(0)["prompt"]}) + "\n" for n in range(4)))
    keys = config(model_folder, file, save_steps=[]).model_dump(mode="json")
    with pytest.raises(UserError, match=r"data: 8 of 8 answers are to one prompt.*apo_zero_unpaired"):
        kto.run(kto.Config.model_validate(keys), new_context("one"))
    keys["trainer"] |= {"loss_type": "apo_zero_unpaired"}
    assert kto.run(kto.Config.model_validate(keys), new_context("other"))["steps"] == 2


def test_a_trainer_scores_as_separate_forwards_do(model_folder: Path, pairs_file: Path, context: Context) -> None:
    from cordee.compute.logprobs import score

    trainer, _ = dpo.build(config(model_folder, pairs_file), context)
    assert isinstance(trainer, PreferenceTrainer)
    for at in (0, 7, 23):
        row = trainer.train_dataset[at]
        for (prompt, answer), told in zip(row["answers"], row["reference"], strict=True):
            (found,) = score(trainer.model, [np.concatenate([prompt, answer]).tolist()])
            assert float(found.logprobs[len(prompt) - 1 :].sum()) == pytest.approx(float(told), abs=1e-4)

"""Which sequences a training sees: weights, packing, and rows that are read when they are asked for."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from chat_samples import some_chats, write_parquet
from transformers import AutoTokenizer

from cordee.chat.source import Limits, Rules, Source
from cordee.chat.tokenized import Tokenized, tokenize
from cordee.stage import Context
from posttrain.training.sequences import Sequences, _first_rows, dataset, packed, split

Read = Callable[..., Sequences]


@pytest.fixture
def read(model_folder: Path, tmp_path: Path, context: Context) -> Read:
    """Sequences of 20 chats, once for each weight."""
    file = write_parquet(tmp_path / "m.parquet", some_chats(20))
    source = Source.model_validate({"path": str(file)})
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    part = tokenize("chats", tokenizer, source, Rules(Limits(256, 512, len(tokenizer))), context, tmp_path / "cache")

    def call(*weights: float, seed: int = 0) -> Sequences:
        return split((part,) * len(weights), weights, 0.0, seed, Tokenized.conversation)[0]

    return call


def test_weights_repeat_rows_and_take_a_random_share(read: Read) -> None:
    assert [chat.number for chat in read(1.0)] == list(range(1, 21))
    assert len(read(2.25)) == 45
    half = [chat.number for chat in read(0.5)]
    assert len(set(half)) == 10
    assert half == [chat.number for chat in read(0.5)]
    assert half != [chat.number for chat in read(0.5, seed=1)]
    assert [chat.number for chat in read(1.0, 2.0)] == [*range(1, 21)] * 3


def test_a_share_of_the_rows_is_held_out_and_never_trained_on(read: Read) -> None:
    whole = read(1.0, 2.0)
    seen, heldout = split(whole.parts, (1.0, 2.0), 0.25, 7, Tokenized.conversation)
    assert (len(seen), len(heldout)) == (15 + 30, 5 + 5)
    assert not set(seen.places) & set(heldout.places)
    assert [*heldout.places] == [*split(whole.parts, (0.5, 1.0), 0.25, 7, Tokenized.conversation)[1].places]
    assert [*heldout.places] != [*split(whole.parts, (0.5, 1.0), 0.25, 8, Tokenized.conversation)[1].places]


def test_rows_that_repeat_are_held_out_together(
    model_folder: Path, tmp_path: Path, context: Context, read: Read
) -> None:
    file = write_parquet(tmp_path / "twice.parquet", [chat for chat in some_chats(20) for _ in range(2)] * 2)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    source = Source.model_validate({"path": str(file)})
    part = tokenize("chats", tokenizer, source, Rules(Limits(256, 512, len(tokenizer))), context, tmp_path / "cache")
    parts = (part, *read(1.0).parts)
    seen, heldout = split(parts, (1.0, 1.0), 0.5, 7, Tokenized.conversation)
    assert (len(seen), len(heldout)) == (50, 50)
    assert not set(seen.texts()) & set(heldout.texts())


ONE_OF = {"pairs": Tokenized.pair, "labelled": Tokenized.answer, "scored": Tokenized.answer}


def answered(of: str, prompt: int, number: int) -> dict[str, object]:
    """One of the rows of a prompt, each with other answers."""
    asked = {"prompt": f"What is {prompt} and {prompt}?\nAnswer:"}
    if of == "pairs":
        return {**asked, "chosen": f" {2 * prompt}, by way {number}", "rejected": f" none, by way {number}"}
    told = {"label": number % 2 == 0} if of == "labelled" else {"reward": float(number), "reference_rewards": [0.0]}
    return {**asked, "completion": f" {number}, said so", **told}


@pytest.mark.parametrize("of", ["pairs", "labelled", "scored"])
@pytest.mark.parametrize("counts", [[8] * 40, [1 + n % 12 for n in range(240)]], ids=["alike", "mixed"])
def test_no_prompt_is_trained_on_and_held_out(
    model_folder: Path, tmp_path: Path, context: Context, of: str, counts: list[int]
) -> None:
    """Two files that share half of their prompts; the share of the rows is what was asked."""
    tokenizer, parts = AutoTokenizer.from_pretrained(model_folder), []
    for name, first in (("a", 0), ("b", len(counts) // 2)):
        rows = [answered(of, first + at, number) for at, count in enumerate(counts) for number in range(count)]
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        rules = Rules(Limits(256, 512, len(tokenizer)))
        source = Source.model_validate({"path": str(file)})
        parts.append(tokenize(of, tokenizer, source, rules, context, tmp_path / "cache"))
    seen, heldout = split(tuple(parts), (1.0, 1.0), 0.25, 7, ONE_OF[of])
    trained, apart = ({tuple(one.prompt) for one in some} for some in (seen, heldout))
    assert apart
    assert not trained & apart
    assert len(trained | apart) == len(counts) * 3 // 2
    assert len(seen) + len(heldout) == 2 * sum(counts)
    assert len(heldout) / (2 * sum(counts)) == pytest.approx(0.25, abs=0.03)
    whole = Sequences(tuple(parts), np.concatenate([seen.places, heldout.places]), ONE_OF[of])
    assert len({*whole.texts()}) > len(trained | apart), "by their token ids they are other rows"


def test_texts_are_the_same_for_the_same_ids(read: Read) -> None:
    chats = read(1.0, 1.0)
    assert chats.texts()[:20].tolist() == chats.texts()[20:].tolist()
    assert len(set(chats.texts().tolist())) == len({tuple(chat.ids) for chat in chats})


def test_rows_linked_by_their_sequences_have_one_first_row() -> None:
    rows, texts = np.array([0, 0, 1, 2, 2, 3]), np.array([5, 6, 9, 6, 7, 7])
    assert _first_rows(rows, texts).tolist() == [0, 1, 0, 0]


def test_a_hundred_thousand_rows_are_linked_in_time() -> None:
    began = time.perf_counter()
    numbers = np.arange(100_000)
    assert len(np.unique(_first_rows(numbers, numbers // 2))) == 50_000
    assert time.perf_counter() - began < 1


def test_the_digest_is_of_ids_and_of_how_often_they_are_seen(read: Read) -> None:
    assert read(1.0).digest == read(1.0).digest
    assert len({read(1.0).digest, read(2.0).digest, read(0.5).digest, read(0.5, seed=1).digest}) == 4


def test_lengths_are_those_of_the_sequences(read: Read) -> None:
    chats = read(1.0, 0.5)
    assert chats.lengths("ids").tolist() == [len(chat.ids) for chat in chats]


@pytest.mark.parametrize("seed", range(3))
def test_packing_holds_each_sequence_once_and_leaves_little_space(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 257, 3000)
    rows = packed(lengths, 256)
    assert sorted(at for row in rows for at in row) == list(range(3000))
    assert max(int(lengths[row].sum()) for row in rows) <= 256
    assert lengths.sum() / (256 * len(rows)) > 0.97


def test_packing_is_trls_best_fit_for_one_of_its_batches() -> None:
    from datasets import Dataset
    from trl import pack_dataset

    lengths = np.random.default_rng(0).integers(1, 100, 900)
    theirs = pack_dataset(Dataset.from_dict({"input_ids": [[1] * int(n) for n in lengths]}), 256)
    assert len(packed(lengths, 256)) == len(theirs)


def test_a_sequence_that_fills_its_row_leaves_no_space() -> None:
    assert packed(np.array([4, 4, 2, 2, 1]), 4) == [[0], [1], [2, 3], [4]]


def test_rows_are_read_when_they_are_asked_for(read: Read) -> None:
    chats = read(1.0)
    for packing in (False, True):
        data = dataset(chats, 256, packing=packing)
        places = data.with_format(None)["sequences"]
        assert sorted(at for row in places for at in row) == list(range(20))
        for row, at in zip(data, places, strict=True):
            own = [chats[place] for place in at]
            assert row["input_ids"].tolist() == [int(token) for chat in own for token in chat.ids]
            labels = [np.where(chat.has_loss, chat.ids, -100) for chat in own]
            assert row["labels"].tolist() == np.concatenate(labels).tolist()
            assert row["seq_lengths"] == [len(chat.ids) for chat in own]
        assert (len(data) < 20) == packing

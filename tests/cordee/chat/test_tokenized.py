"""A source in tokens on the disk: the same in one process and in several, found again, counted where rows go."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import encoding
import numpy as np
import pytest
from families import source as template_of
from families import talk, tokenizer, write

from cordee.chat import tokenized
from cordee.chat.source import Limits, Rules, Source
from cordee.chat.tokenized import Tokenized, tokenize
from cordee.errors import Stopped, UserError
from cordee.stage import Context

QWEN = tokenizer(template_of("qwen2_5"))
LIMITS = Limits(max_length=256, positions=512, vocab_size=100_000)
LONG = talk("hello", "German " * 400)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    (tmp_path / "logs").mkdir()
    return Context(out=tmp_path / "out", seed=5, events=tmp_path / "logs" / "events.jsonl")


Read = Callable[..., Tokenized]


@pytest.fixture
def read(context: Context, tmp_path: Path) -> Read:
    """Tokenizes a file or a folder; `given` are fields of `Source` and of `Rules`."""

    def call(path: Path, of: Any = "chats", limits: Limits = LIMITS, **given: Any) -> Tokenized:
        rules = {name: given.pop(name) for name in ("bad_rows", "overlong", "earlier_answers") if name in given}
        source = Source.model_validate({"path": str(path), **given})
        return tokenize(of, QWEN, source, Rules(limits, **rules), context, tmp_path / "cache")

    return call


def some(count: int) -> list[dict[str, Any]]:
    return [{"messages": talk(f"question {n} " * (1 + n % 5), f"answer {n}", "and", "more")} for n in range(count)]


def same(one: Any, other: Any) -> bool:
    return (
        (one.file, one.number, one.messages, one.answers, one.is_cut)
        == (other.file, other.number, other.messages, other.answers, other.is_cut)
        and np.array_equal(one.ids, other.ids)
        and np.array_equal(one.has_loss, other.has_loss)
    )


def test_sequences_come_back_from_the_disk_as_they_were(read: Read, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", *some(30))
    found, expected = read(file), encoding.chats(file, QWEN, LIMITS)
    assert len(found) == len(expected) == found.report["sequences"] == found.report["rows"] == 30
    assert all(same(found.conversation(at), one) for at, one in enumerate(expected))
    assert found.lengths("ids").tolist() == [len(one.ids) for one in expected]
    assert found.report["tokens"] == sum(len(one.ids) for one in expected)
    assert found.report["loss_tokens"] == sum(one.has_loss.sum() for one in expected)


def test_pairs_come_back_too(read: Read, tmp_path: Path) -> None:
    row = {"prompt": "hello", "chosen": "yes", "rejected": "no no"}
    file = write(tmp_path / "a.jsonl", row, {**row, "chosen": "oui"})
    found = read(file, "pairs")
    assert [found.pair(at) for at in range(2)] == encoding.pairs(file, QWEN, LIMITS)


def test_several_processes_and_record_batches_give_the_same_bytes(
    read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(3):
        write(folder / f"part-{shard}.jsonl", *some(1200))
    alone = read(folder)
    monkeypatch.setattr(tokenized, "PARALLEL_BYTES", 0)
    (tmp_path / "cache").rename(tmp_path / "before")
    found = read(folder)
    assert [found.conversation(at).file.name for at in (0, 1200, 3599)] == [f"part-{n}.jsonl" for n in range(3)]
    assert len(found) == len(alone) == 3600
    assert all(same(found.conversation(at), alone.conversation(at)) for at in range(0, 3600, 97))
    assert found.report["tokens"] == alone.report["tokens"]


def test_the_second_start_reads_nothing(read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.jsonl", *some(5))
    first = read(file)

    def fail(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(tokenized, "_write", fail)
    assert read(file).report == first.report
    with monkeypatch.context() as patched:
        patched.setattr(tokenized, "VERSION", 99)
        with pytest.raises(AssertionError):
            read(file)
    assert read(file).report == first.report
    write(file, *some(6))
    os.utime(file, (0, 0))
    with pytest.raises(AssertionError):
        read(file)


def test_the_same_bytes_of_another_kind_are_read_as_what_they_are(read: Read, tmp_path: Path) -> None:
    lines = write(tmp_path / "a.jsonl", *some(1))
    text = tmp_path / "a.txt"
    text.write_bytes(lines.read_bytes())
    assert [read(file).conversation(0).messages for file in (text, lines)] == [0, 4]


WAITS = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from cordee.chat import tokenized

if __name__ == "__main__":
    begin = {"initializer": tokenized._begin, "initargs": ("chats", None, {})}
    with ProcessPoolExecutor(1, get_context("spawn"), **begin) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        time.sleep(600)
"""


def test_workers_end_with_a_process_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "waits.py").write_text(WAITS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(tmp_path / "waits.py")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as started:
        worker = Path("/proc") / str(started.stdout and started.stdout.readline().strip()) / "stat"
        assert worker.exists()
        started.kill()
    until = time.monotonic() + 10
    while worker.exists() and worker.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize(
    "given",
    [{"overlong": "cut"}, {"bad_rows": "drop"}, {"ignore": ["x"]}, {"limit": 3}, {"earlier_answers": "skip"}],
)
def test_what_decides_about_the_sequences_is_part_of_their_name(read: Read, tmp_path: Path, given: Any) -> None:
    file = write(tmp_path / "a.jsonl", *some(5))
    read(file)
    read(file, **given)
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("name", ["report.json", "sequences.arrow"])
def test_what_is_damaged_is_made_again(read: Read, tmp_path: Path, name: str) -> None:
    file = write(tmp_path / "a.jsonl", *some(50))
    read(file)
    expected = encoding.chats(file, QWEN, LIMITS)
    (path,) = (tmp_path / "cache").glob(f"*/{name}")
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole.replace(whole[600:608], bytes(8)), b""):
        path.write_bytes(damaged)
        found = read(file)
        assert all(same(found.conversation(at), one) for at, one in enumerate(expected))
        assert path.read_bytes() == whole


BAD = [{"messages": []}, {"messages": LONG}, {"x": 1}]


def test_rows_that_can_not_be_used_are_an_error_that_counts_them(read: Read, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", *some(3), *BAD, *BAD)
    with pytest.raises(UserError, match=r"6 of 9 rows: messages is empty.*can't be told.*longer than max_length=256"):
        read(file)
    with pytest.raises(UserError, match="4 of 9 rows: messages is empty"):
        read(file, overlong="drop")
    with pytest.raises(UserError, match=r"2 of 9 rows \(rows 5: .* longer than max_length=256"):
        read(file, bad_rows="drop")
    assert not list((tmp_path / "cache").glob("*/report.json"))
    assert not list((tmp_path / "cache").glob(".*"))


def test_rows_that_are_left_out_are_counted_with_samples_and_noted(
    read: Read, tmp_path: Path, context: Context
) -> None:
    file = write(tmp_path / "a.jsonl", *some(3), *BAD, *BAD)
    found = read(file, bad_rows="drop", overlong="drop")
    assert len(found) == 3
    kinds = {kind["problem"][:20]: kind for kind in found.report["left_out"]}
    assert [kind["rows"] for kind in kinds.values()] == [2, 2, 2]
    assert kinds["messages is empty"]["first"][0] == {
        "file": "a.jsonl", "row": 4, "shown_by": "", "text": '{"messages": []}'
    }  # fmt: skip
    notes = [json.loads(line)["text"] for line in context.events.read_text().splitlines()]
    assert "a.jsonl: 2 rows left out: messages is empty" in notes
    with pytest.raises(UserError, match=r"no row of 3 is left: 1 messages is empty; 1 can't be told.*; 1 longer than"):
        read(write(tmp_path / "b.jsonl", *BAD), bad_rows="drop", overlong="drop")
    with pytest.raises(UserError, match="holds no rows"):
        read(write(tmp_path / "c.jsonl"))


def test_a_chat_that_is_truncated_ends_with_an_answer(read: Read, tmp_path: Path) -> None:
    row = {"messages": [*talk("a", "first"), *talk("b", "second"), *talk("c", "third " * 200)]}
    file = write(tmp_path / "a.jsonl", row, {"messages": LONG})
    (one,) = (read(file, overlong="truncate").conversation(at) for at in range(1))
    assert one.is_cut
    assert [answer.message for answer in one.answers] == [1, 3]
    assert one.messages == 4
    assert len(one.ids) == one.answers[-1].until
    assert QWEN.decode(one.ids).endswith("second<|im_end|>")
    report = read(file, overlong="truncate").report
    assert report["left_out"][0]["rows"] == 1
    assert "no answer is left of it" in report["left_out"][0]["problem"]


def test_a_chat_that_is_cut_fills_its_length(read: Read, tmp_path: Path) -> None:
    row = {"messages": [*talk("a", "first"), *talk("c", "third " * 200)]}
    asked = {"messages": talk("why " * 400, "so")}
    found = read(write(tmp_path / "a.jsonl", row, asked), overlong="cut")
    assert len(found) == 1, "of the other no answer is left"
    one = found.conversation(0)
    assert len(one.ids) == 256
    assert one.has_loss[-1]
    assert [answer.until for answer in one.answers][-1] == 256
    assert found.report["notes"] == [
        "1 rows left out: longer than max_length=256 tokens, and no answer is left of it",
        "1 sequences that were too long and are shortened (`overlong`)",
    ]


def test_pairs_are_cut_within_their_answers_alone(read: Read, tmp_path: Path) -> None:
    row = {"prompt": "hello", "chosen": "yes " * 300, "rejected": "no"}
    same_beginning = {**row, "rejected": "yes " * 301}
    file = write(tmp_path / "a.jsonl", row, same_beginning)
    found = read(file, "pairs", overlong="cut", bad_rows="drop")
    assert len(found) == 1
    pair = found.pair(0)
    assert len(pair.prompt) + len(pair.chosen) == 256
    with pytest.raises(UserError, match="longer than max_length=256"):
        read(file, "pairs")


def test_a_limit_takes_the_first_rows_or_draws_them(read: Read, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", *some(40))
    assert read(file, limit=7).numbers("number").tolist() == list(range(1, 8))
    drawn = read(file, limit=7, shuffle=True).numbers("number").tolist()
    assert len(set(drawn)) == 7
    assert drawn == sorted(drawn) != list(range(1, 8))
    assert read(file, limit=99).report["rows"] == 40


def test_texts_are_what_the_tokenizer_makes_of_them_and_its_eos(read: Read, tmp_path: Path) -> None:
    rows = [{"text": "hello there"}, {"prompt": "2 + 2 = ", "completion": "four", "x": 1}]
    found = read(write(tmp_path / "a.jsonl", *rows), as_text=True)
    text, completion = found.conversation(0), found.conversation(1)
    assert text.ids.tolist() == [*QWEN("hello there")["input_ids"], QWEN.eos_token_id]
    assert text.has_loss.tolist() == [False, *[True] * (len(text.ids) - 1)], "its first token is never predicted"
    assert QWEN.decode(completion.ids[completion.has_loss]).strip() == f"four{QWEN.eos_token}"
    assert QWEN.decode(completion.ids[~completion.has_loss]).strip() == "2 + 2 ="


def test_a_text_that_ends_with_eos_is_not_ended_twice(read: Read, tmp_path: Path) -> None:
    """Rendered by somebody: the template's line break follows its last end of turn."""
    eos = str(QWEN.eos_token)
    found = read(write(tmp_path / "a.jsonl", *({"text": f"hello{eos}{tail}"} for tail in ("", "\n", " \n"))))
    assert [found.conversation(at).ids.tolist().count(QWEN.eos_token_id) for at in range(3)] == [1, 1, 1]


def notes_of(context: Context) -> list[str]:
    return [json.loads(line)["text"] for line in context.events.read_text().splitlines()]


def test_columns_beside_a_text_are_told(read: Read, tmp_path: Path, context: Context) -> None:
    read(write(tmp_path / "a.jsonl", {"text": "hello", "id": 1, "system": "Be brief."}))
    assert "a.jsonl: columns that are kept out: id, system" in notes_of(context)
    pair = {"prompt": "2 + 2 = ", "chosen": "four", "rejected": "five", "score": 1}
    read(write(tmp_path / "b.jsonl", pair), "pairs", as_text=True)
    assert "b.jsonl: columns that are kept out: score" in notes_of(context)


def test_of_a_folder_it_is_told_what_is_read_and_files_chooses(read: Read, tmp_path: Path, context: Context) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train-0.jsonl", *some(3))
    write(folder / "test-0.jsonl", *some(2))
    (folder / "LICENSE.txt").write_text("MIT")
    assert len(read(folder)) == 3
    (told,) = notes_of(context)
    assert "reads 1 file" in told
    assert "1 licence or readme (LICENSE.txt)" in told
    assert "1 of other splits (test-0.jsonl)" in told
    assert len(read(folder, files=["t*.jsonl"])) == 5


def test_a_stop_leaves_nothing_behind(read: Read, tmp_path: Path, context: Context) -> None:
    (context.events.parent / "stop").touch()
    with pytest.raises(Stopped, match=r"row 1000 of a\.jsonl"):
        read(write(tmp_path / "a.jsonl", *some(1001)))
    assert list((tmp_path / "cache").iterdir()) == []

"""The proof of the masks on every shape of rows and kind of file: it passes, and sees a fault in each."""

import dataclasses
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import families
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from cordee.chat import conversations, formats, schema, texts
from cordee.errors import Fault
from cordee.files import read_json
from cordee.stage import Context
from posttrain import prove_masks

NewContext = Callable[[str], Context]
WORDS = ("Würde", "freedom", "liberté", "dretgs")
BOM = b"\xef\xbb\xbf"
TOOLS = json.dumps([families.ADD])
CALL = {"name": "add", "arguments": '{"x": 1, "of": "Würde"}'}


def asked(number: int) -> str:
    return f"What does {WORDS[number % 4]} mean, {number}?"


def said(number: int) -> str:
    return f"It means {WORDS[number % 3]} and {number}."


def talk(number: int) -> list[dict[str, Any]]:
    return families.talk(asked(number), said(number), "Sure?", f"Sure of {number}.")


def turns(number: int) -> list[dict[str, Any]]:
    call = {"from": "function_call", "value": json.dumps({"name": "add", "arguments": {"x": number}})}
    return [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": asked(number)},
        call,
        {"from": "observation", "value": str(number)},
        {"from": "gpt", "value": said(number)},
    ]


def tool_talk(number: int) -> list[dict[str, Any]]:
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]}
    result = {"role": "tool", "content": f"{number}"}
    return [{"role": "user", "content": asked(number)}, call, result, {"role": "assistant", "content": said(number)}]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def rows(make: Callable[[int], dict[str, Any]], count: int = 4) -> list[dict[str, Any]]:
    return [make(number) for number in range(count)]


def csv(columns: list[str], found: list[dict[str, Any]]) -> bytes:
    quoted = [",".join('"' + str(row[name]).replace('"', '""') + '"' for name in columns) for row in found]
    return "\n".join([",".join(columns), *quoted, ""]).encode()


CHATS: dict[str, tuple[Any, dict[str, Any]]] = {
    "messages.jsonl": (lines(rows(lambda n: {"messages": talk(n)})), {}),
    "sharegpt.jsonl": (BOM + lines(rows(lambda n: {"conversations": turns(n)})).replace(b"\n", b"\r\n"), {}),
    "sharegpt_text.jsonl": (lines(rows(lambda n: {"conversations": json.dumps(turns(n))})), {}),
    "alpaca.json": (
        json.dumps(
            rows(lambda n: {"instruction": asked(n), "input": "in short", "output": said(n), "history": [["a", "b"]]})
        ).encode(),
        {},
    ),
    "wrapped.json": (json.dumps({"data": rows(lambda n: {"messages": talk(n)}), "version": 1}, indent=1).encode(), {}),
    "completions.jsonl.gz": (gzip.compress(lines(rows(lambda n: {"prompt": asked(n), "completion": said(n)}))), {}),
    "completed.jsonl": (
        lines(rows(lambda n: {"prompt": talk(n)[:3], "completion": {"role": "assistant", "content": said(n)}})),
        {},
    ),
    "completed_text.jsonl": (
        lines(rows(lambda n: {"prompt": json.dumps(talk(n)[:3]), "completion": json.dumps([{"answer": n}])})),
        {},
    ),
    "renamed.csv": (
        csv(["q", "a", "prompt"], rows(lambda n: {"q": asked(n), "a": said(n), "prompt": "no"})),
        {"columns": {"q": "prompt", "a": "completion", "prompt": "old"}},
    ),
    "semicolons.csv": (csv(["prompt", "completion"], rows(lambda n: {"prompt": asked(n).replace(",", ""),
        "completion": said(n)})).replace(b'","', b'";"').replace(b"t,c", b"t;c"), {}),
    "messages.csv": (csv(["messages"], rows(lambda n: {"messages": json.dumps(talk(n), indent=1)})), {}),
    "system.parquet": (rows(lambda n: {"system": f"Be brief, {n}.", "messages": talk(n)}), {}),
    "flags.parquet": (
        rows(lambda n: {"messages": [{**one, "weight": n % 2 if at == 1 else None} for at, one in enumerate(talk(n))]}),
        {},
    ),
    "tools.jsonl": (lines(rows(lambda n: {"messages": tool_talk(n), "tools": TOOLS, "id": n})), {}),
    "shards": ([rows(lambda n: {"messages": talk(n)}, 2), rows(lambda n: {"messages": talk(9 + n)}, 2)], {}),
    "saved": (Dataset.from_list(rows(lambda n: {"messages": talk(20 + n)})), {}),
}  # fmt: skip
TEXTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain.txt": ("\n\n".join(said(n) for n in range(4)).encode(), {}),
    "text.jsonl": (lines(rows(lambda n: {"text": said(n)})), {}),
    "joined.jsonl": (lines(rows(lambda n: {"prompt": asked(n), "completion": f" {said(n)}"})), {"as_text": True}),
}
"""Name → content and keys of its source: bytes, rows of a Parquet file, of two shards, or a data set to save."""


def put(folder: Path, name: str, content: Any) -> Path:
    """Write a source."""
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, Dataset):
        content.save_to_disk(path)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(content), path)
    else:
        path.mkdir()
        for number, part in enumerate(content):
            (path / f"part-{number}.jsonl").write_bytes(lines(part))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with Qwen 2.5's template."""
    return architectures.make_family(tmp_path_factory.mktemp("qwen"), "qwen2_5")


Prove = Callable[..., dict[str, Any]]


@pytest.fixture
def prove(tmp_path: Path, model: Path, new_context: NewContext) -> Prove:
    """Proves the masks of some sources, and gives the values of the checks."""

    def call(sources: dict[str, tuple[Any, dict[str, Any]]], folder: Path = model, **keys: Any) -> dict[str, Any]:
        data = [{"path": str(put(tmp_path, name, content)), **given} for name, (content, given) in sources.items()]
        settings = {"bf16": False, "max_length": keys.pop("max_length", 900), "max_steps": 1}
        given = {"model": str(folder), "data": data, "global_batch_size": 8, "trainer": settings, **keys}
        one = new_context("proof")
        prove_masks.run(prove_masks.Config.model_validate(given), one)
        return {check["name"]: check["value"] for check in read_json(one.out / "certificate.json")["checks"]}

    return call


def files_of(sources: dict[str, Any]) -> set[str]:
    """The names under which a certificate speaks of the sources' files."""
    inside = {"shards": ["part-0.jsonl", "part-1.jsonl"], "saved": ["data-00000-of-00001.arrow"]}
    return {file for name in sources for file in inside.get(name, [name])}


def test_every_shape_is_proven(prove: Prove) -> None:
    checks = prove(CHATS | TEXTS)
    assert checks["chats in one epoch"] == 4 * len(CHATS | TEXTS)
    assert {name.rpartition(" of ")[2] for name in checks if name.startswith("chats seen")} == files_of(CHATS | TEXTS)


def test_texts_are_packed_too(prove: Prove) -> None:
    """The first token of a packed text is predicted from nothing, and from no text before it."""
    settings = {"max_length": 900, "max_steps": 1, "packing": True, "bf16": False}
    assert prove(TEXTS, trainer=settings)["chats in one epoch"] == 4 * len(TEXTS)


def other_words(chat: schema.Chat) -> schema.Chat:
    """The last question asked with other words."""
    *before, question, answer = chat.messages
    return dataclasses.replace(chat, messages=[*before, question | {"content": "Sure and certain?"}, answer])


def without_first_answer(chat: schema.Chat) -> schema.Chat:
    """All answers but the last are not trained."""
    return dataclasses.replace(chat, trains=(False,) * (len(chat.trains) - 1) + (True,))


ONE_ANSWER = {"renamed.csv", "semicolons.csv", "completions.jsonl.gz", "completed.jsonl", "completed_text.jsonl",
              "flags.parquet"}  # fmt: skip
"""Files whose rows have one answer to train on, or of some rows."""


@pytest.mark.parametrize(
    ("plant", "problem"),
    [(other_words, "chats unlike their row"), (without_first_answer, "answers without loss")],
)
def test_a_fault_in_what_is_read_is_seen_in_every_shape(
    prove: Prove, monkeypatch: pytest.MonkeyPatch, plant: Any, problem: str
) -> None:
    sound = schema.chat
    monkeypatch.setattr(schema, "chat", lambda *given: plant(sound(*given)))
    with pytest.raises(Fault) as caught:
        prove(CHATS)
    for file in files_of(CHATS) - (ONE_ANSWER if plant is without_first_answer else set()):
        assert f"{problem} of {file} is " in str(caught.value)


def test_a_fault_in_texts_is_seen(prove: Prove, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = texts.tokenize

    def without_first_words(text: formats.Text, tokenizer: Any) -> Any:
        return sound(formats.Text(text.prompt, text.completion[6:]), tokenizer)

    monkeypatch.setattr(texts, "tokenize", without_first_words)
    with pytest.raises(Fault) as caught:
        prove(TEXTS)
    for file in TEXTS:
        assert f"chats unlike their row of {file} is 4" in str(caught.value)


LONG = {"long.jsonl": (lines(rows(lambda n: {"messages": [*talk(n), *families.talk("More?", said(n) * 9)]})), {})}


@pytest.mark.parametrize("overlong", ["truncate", "cut"])
def test_rows_that_were_shortened_are_proven(prove: Prove, overlong: str) -> None:
    assert prove(LONG | TEXTS, overlong=overlong, max_length=200)["chats in one epoch"] == 16


@pytest.mark.parametrize("overlong", ["truncate", "cut"])
def test_a_fault_in_rows_that_were_shortened_is_seen(
    prove: Prove, monkeypatch: pytest.MonkeyPatch, overlong: str
) -> None:
    sound = conversations.fitted

    def too_short(one: Any, rules: Any, notes: Any) -> Any:
        found = sound(one, rules, notes)
        return dataclasses.replace(found, ids=found.ids[4:], has_loss=found.has_loss[4:])

    monkeypatch.setattr(conversations, "fitted", too_short)
    with pytest.raises(Fault, match=r"chats unlike their row of long\.jsonl is 4"):
        prove(LONG, overlong=overlong, max_length=200)


def test_arguments_that_a_template_takes_as_text_are_proven(
    tmp_path: Path, prove: Prove, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSeek's template joins a call's arguments to a text, and takes none beside a content that is no null."""
    folder = architectures.make_family(tmp_path / "deepseek", "deepseek_r1_distill")
    sources = {"calls.jsonl": (lines(rows(lambda n: {"messages": tool_talk(n)})), {})}
    assert prove(sources, folder)["chats in one epoch"] == 4
    sound = schema.chat
    monkeypatch.setattr(schema, "chat", lambda *given: other_words(sound(*given)))
    (tmp_path / "calls.jsonl").unlink()
    with pytest.raises(Fault, match=r"chats unlike their row of calls\.jsonl is 4"):
        prove(sources, folder)

"""A mixture through the stage: what is written, what is left out and counted, and that it goes on after a stop."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cordee.cost import Cost
from cordee.errors import Stopped, UserError
from cordee.files import read_json, read_json_lines
from cordee.stage import Context
from posttrain import data
from posttrain.mixing import scan

ROOT = Path(__file__).resolve().parents[2]
GSM8K = ROOT / "data" / "openai" / "gsm8k"
STORY = "A farmer has {n} sheep and buys {m} more at the market in Chur, then sells four of them to a neighbour."


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def call(name: str, *rows: dict[str, Any]) -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(tmp_path / name)

    return call


def mixed(context: Context, *sources: str | dict[str, Any], **keys: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of the mixture and its card."""
    told = [{"path": source} if isinstance(source, str) else source for source in sources]
    metrics = data.run(data.Config.model_validate({"data": told, **keys}), context)
    rows, card = read_json_lines(context.out / data.DATA), read_json(context.out / data.CARD)
    assert metrics["rows"] == len(rows) == card["rows"]
    assert metrics["rows_left_out"] == sum(kind["rows"] for one in card["sources"] for kind in one["left_out"])
    return rows, card


def left_out(card: dict[str, Any], source: int = 0) -> dict[str, int]:
    return {kind["problem"]: kind["rows"] for kind in card["sources"][source]["left_out"]}


def test_rows_of_any_shape_pass_unchanged_with_their_source(write: Any, context: Context) -> None:
    rows = [
        {**chat("How many?", "Three."), "id": 7, "tools": None},
        {"prompt": "Why?", "chosen": "So.", "rejected": "No.", "chosen_reward": 0.5, "reference_rewards": [0.1, 0.2]},
        {"prompt": "Where?", "answer": "Here.", "language": "en"},
        {"text": "A text.", "source": "elsewhere"},
    ]
    found, card = mixed(context, write("all.jsonl", *rows))
    assert [{key: value for key, value in row.items() if key not in ("source", "own_source")} for row in found] == [
        {key: value for key, value in row.items() if key != "source" and value is not None} for row in rows
    ]
    assert {row["source"] for row in found} == {"all"}
    assert found[3]["own_source"] == "elsewhere"
    assert card["languages"] == {"not told": 3, "en": 1}
    assert sorted(path.name for path in context.out.iterdir()) == ["card.json", "card.md", "data.jsonl", "rows.json"]


def test_columns_are_renamed_as_the_source_says(write: Any, context: Context) -> None:
    source = {
        "path": write("qa.jsonl", {"q": "Why?", "a": "So.", "x": 1}),
        "columns": {"q": "prompt", "a": "completion"},
    }
    found, _ = mixed(context, source | {"ignore": ["x"], "name": "mine"})
    assert found == [{"prompt": "Why?", "completion": "So.", "source": "mine"}]


def test_exact_duplicates_go_and_the_first_source_keeps_its_row(write: Any, context: Context) -> None:
    first = write("first.jsonl", chat("How many?", "Three."), chat("How  MANY?", "three."), chat("How many?", "Four."))
    second = write("second.jsonl", chat("New?", "Yes."), chat("How many?", "Four."))
    found, card = mixed(context, first, second)
    assert [row["messages"][1]["content"] for row in found] == ["Three.", "Four.", "Yes."]
    assert [row["source"] for row in found] == ["first", "first", "second"]
    assert (left_out(card, 0), left_out(card, 1)) == ({"repeats another row": 1}, {"repeats another row": 1})
    assert card["sources"][1]["left_out"][0]["first"][0]["shown_by"] == "row 3 of first"


def test_rows_that_differ_in_what_is_trained_are_no_exact_duplicates(write: Any, context: Context) -> None:
    tool = {"type": "function", "function": {"name": "now", "parameters": {}}}
    rows = [
        {"prompt": "q", "answer": 1}, {"prompt": "q", "answer": 2}, {"prompt": "q", "answer": 1, "tests": ["a"]},
        {"prompt": "q", "completion": "a", "label": True}, {"prompt": "q", "completion": "a", "label": False},
        {"prompt": "a b", "completion": "c"}, {"prompt": "a", "completion": "b c"},
        chat("r", "s"), chat("r", "s") | {"tools": [tool]},
    ]  # fmt: skip
    files = [write(f"{at}.jsonl", row, row) for at, row in enumerate(rows)]
    found, card = mixed(context, *files)
    assert [row["source"] for row in found] == [str(at) for at in range(len(rows))]
    assert all(left_out(card, at) == {"repeats another row": 1} for at in range(len(rows)))


def test_duplicates_stay_where_none_are_sought(write: Any, context: Context) -> None:
    found, _ = mixed(context, write("a.jsonl", chat("a", "b"), chat("a", "b")), deduplicate="off")
    assert len(found) == 2


def test_near_duplicates_go_across_sources(write: Any, context: Context) -> None:
    rows = [chat(STORY.format(n=n, m="seven"), "Count.") for n in ("twelve", "twelve or so")]
    other = chat("What is the capital of the canton of Grisons?", "Chur.")
    sources = [write("a.jsonl", rows[0], other), write("b.jsonl", rows[1])]
    found, card = mixed(context, *sources, deduplicate="near", similarity=0.7)
    assert found == [{**rows[0], "source": "a"}, {**other, "source": "a"}]
    assert left_out(card, 1) == {"nearly repeats another row": 1}
    assert card["sources"][1]["left_out"][0]["first"][0]["shown_by"] == "row 1 of a"
    (context.out / data.DATA).unlink()
    assert len(mixed(context, *sources, deduplicate="exact")[0]) == 3


def test_licences_of_rows_and_sources(write: Any, context: Context) -> None:
    rows = [{"text": f"Text {name}.", "license": name} for name in ("Apache 2.0", "mit", "cc-by-nc-4.0")]
    first, second = write("a.jsonl", *rows, {"text": "None."}), write("b.jsonl", {"text": "Of b."})
    keys: dict[str, Any] = {"licenses": {"allow": ["apache-2.0", "mit"]}}
    found, card = mixed(context, first, {"path": second, "license": "MIT", "language": "de"}, **keys)
    assert [row["text"] for row in found] == ["Text Apache 2.0.", "Text mit.", "Of b."]
    assert left_out(card) == {"its licence cc-by-nc-4.0 is not allowed": 1, "no licence is told": 1}
    assert card["licences"] == {"Apache 2.0": 1, "MIT": 1, "mit": 1}
    assert card["sources"][1]["languages"] == {"de": 1}


def test_amounts_by_rows_and_by_tokens(write: Any, context: Context, model_folder: Path) -> None:
    some = write("some.jsonl", *({"text": f"number {n} of some"} for n in range(40)))
    more = write("more.jsonl", *({"text": f"number {n} of more"} for n in range(40)))
    found, _ = mixed(context, {"path": some, "weight": 3}, more, rows=20)
    assert [sum(row["source"] == name for row in found) for name in ("some", "more")] == [15, 5]
    _, card = mixed(context, {"path": some, "max_tokens": 100}, more, tokens=150, model=str(model_folder))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    lengths = {
        name: sum(len(tokenizer(row["text"], add_special_tokens=False)["input_ids"])
                  for row in read_json_lines(context.out / data.DATA) if row["source"] == name)
        for name in ("some", "more")
    }  # fmt: skip
    assert {one["name"]: one["tokens"] for one in card["sources"]} == lengths
    assert all(75 <= length < 75 + 20 for length in lengths.values())


def test_bad_rows_are_an_error_that_counts_them_or_dropped(write: Any, context: Context) -> None:
    file = write("a.jsonl", chat("a", "b"), {"question": "x"}, {"text": ""}, chat("c", "d"))
    with pytest.raises(UserError, match=r"can't be told what it is.*text is empty.*bad_rows: drop"):
        mixed(context, file)
    found, card = mixed(context, file, bad_rows="drop")
    assert len(found) == 2
    assert sum(left_out(card).values()) == 2
    assert card["sources"][0]["left_out"][0]["first"][0]["row"] == 2


def test_the_card_is_readable_and_the_report_reads_the_rows(write: Any, context: Context) -> None:
    mixed(context, write("a.jsonl", chat("a | b", "b"), chat("a | b", "b")))
    page = (context.out / data.PAGE).read_text()
    assert "| a | 1 | 2 | 1 | 1 | 1 | not counted | 100.0% |" in page
    assert "- a: 1 rows: repeats another row" in page
    told = read_json(context.out / data.ROWS)["sources"][0]
    assert {**told, "left_out": 0, "path": 0} == {"path": 0, "rows": 2, "sequences": 1, "tokens": None, "left_out": 0}
    assert set(told["left_out"][0]["first"][0]) == {"file", "row", "shown_by", "text"}


def test_a_mixture_that_was_stopped_goes_on_and_ends_the_same(
    write: Any, new_context: Callable[[str], Context], monkeypatch: pytest.MonkeyPatch, model_folder: Path
) -> None:
    """At each place where it can be stopped; a part that was finished is not read again."""

    @dataclass(frozen=True)
    class StopsAt(Context):
        at: int = 0
        calls: list[int] = field(default_factory=list)

        def stop_requested(self) -> bool:
            self.calls.append(1)
            return len(self.calls) > self.at

    monkeypatch.setattr(scan, "PART_ROWS", 4)
    rows = [{"text": f"number {n % 17} in a row", "license": "mit" if n % 3 else "other"} for n in range(30)]
    files = [write("a.jsonl", *rows[:18]), write("b.jsonl", *rows[18:])]
    keys: dict[str, Any] = {"deduplicate": "near", "model": str(model_folder), "licenses": {"deny": ["other"]}}
    whole, broken = new_context("whole"), new_context("broken")
    mixed(whole, *files, **keys)
    config = data.Config.model_validate({"data": [{"path": file} for file in files], **keys})
    read = []
    measure = scan._Part.read
    monkeypatch.setattr(
        scan._Part, "read", lambda part, rows, *rest: (read.append(len(rows)), measure(part, rows, *rest))
    )
    for at in (2, 3, 4, 1):
        with pytest.raises(Stopped):
            data.run(config, StopsAt(broken.out, broken.seed, broken.events, at))
    mixed(broken, *files, **keys)
    assert sum(read) == 30
    for name in (data.DATA, data.CARD, data.PAGE, data.ROWS):
        assert (whole.out / name).read_bytes() == (broken.out / name).read_bytes()


def test_what_changes_between_the_passes_is_a_fault(write: Any, context: Context, monkeypatch: Any) -> None:
    file = write("a.jsonl", {"text": "one"}, {"text": "two"})
    joined = scan._joined

    def changed(*given: Any) -> Any:
        write("a.jsonl", {"text": "one"})
        return joined(*given)

    monkeypatch.setattr(scan, "_joined", changed)
    with pytest.raises(Exception, match="changed while it was read"):
        mixed(context, file)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rows": 5, "tokens": 5}, "tokens: the mixture has a number of rows or of tokens"),
        ({"tokens": 5}, "model: missing: tokens are counted by a tokenizer; `model:` names"),
        ({"against": [{"path": "x"}]}, "model: missing"),
        ({"data": [{"path": "x", "max_tokens": 3}]}, "for data.max_tokens"),
        ({"data": [{"path": "x", "as_text": True}]}, "data.0.as_text: says how a training reads rows"),
        ({"licenses": {}}, "licenses: names no licence"),
        ({"too_few": "repeat"}, "too_few: is for a number of `rows` or `tokens`"),
        ({"similarity": 0.7}, "similarity: is for near, not for exact; `deduplicate: near`"),
    ],
)
def test_keys_that_do_not_fit_are_one_line(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        data.Config.model_validate({"data": [{"path": "x"}], **keys})
    assert message in str(caught.value)


def test_a_mixture_without_a_row_says_why(write: Any, context: Context) -> None:
    file = write("a.jsonl", {"text": "one", "license": "mit"})
    with pytest.raises(UserError, match="no row is left; 1 rows of a: its licence mit is denied"):
        mixed(context, file, licenses={"deny": ["mit"]})
    with pytest.raises(UserError, match="holds no rows"):
        mixed(context, write("empty.jsonl"))


def test_sources_of_one_name_are_told_apart(write: Any, context: Context, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    files = [write("a.jsonl", {"text": "one"}), write("x/a.jsonl", {"text": "two"})]
    assert [row["source"] for row in mixed(context, *files)[0]] == ["a", "a-2"]


def test_the_cost_is_rows_and_tokens_of_what_is_mixed(write: Any) -> None:
    file = write("a.jsonl", *({"text": "word " * 20} for _ in range(10)))
    plain = data.cost(data.Config.model_validate({"data": [{"path": file, "weight": 2}]}), {})
    assert plain.rows == 20
    bounded = data.cost(data.Config.model_validate({"data": [{"path": file, "weight": 2}], "rows": 5}), {})
    assert (bounded.rows, bounded.tokens) == (5, pytest.approx(plain.tokens / 4))
    made = data.Config.model_validate({"data": [{"path": "$sft/x.jsonl", "max_rows": 7}]})
    assert data.cost(made, {"data.0.path": Cost(rows=10, tokens=100.0)}).rows == 7
    assert data.cost(made, {}).rows is None


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 8,000 tokens, trained on GSM8K's training questions: tokens are words, as in a real one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=8000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    own.train_from_iterator(
        pq.read_table(next((GSM8K / "main").glob("train-*"))).column("question").to_pylist(), trainer
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=own).save_pretrained(folder)
    return folder


QUESTIONS = {"path": str(GSM8K), "subset": "main", "split": "test", "columns": {"question": "prompt"}}
TRAIN = {
    "path": str(GSM8K),
    "subset": "main",
    "split": "train",
    "columns": {"question": "prompt", "answer": "completion"},
}


def test_planted_questions_of_gsm8k_are_all_found_in_its_training_split(
    tmp_path: Path, context: Context, tokenizer: Path
) -> None:
    """All 1,319 test questions, in four forms, beside the 7,473 training rows, of which few count as contaminated."""
    questions = pq.read_table(next((GSM8K / "main").glob("test-*"))).column("question").to_pylist()
    forms = (
        lambda text: text,
        lambda text: f"Solve this.\n\n{text.upper()}\n\nShow your work.",
        lambda text: text.replace(" the ", " a ", 1).replace("3", "7"),
        lambda text: f"Translate into Italian: “{text}”",
    )
    planted = [forms[number % 4](text) for number, text in enumerate(questions)]
    pq.write_table(pa.table({"prompt": planted, "completion": ["x"] * len(planted)}), tmp_path / "planted.parquet")
    found, card = mixed(
        context, TRAIN | {"name": "train"}, str(tmp_path / "planted.parquet"),
        against=[QUESTIONS], model=str(tokenizer), deduplicate="off",
    )  # fmt: skip
    train, leaked = card["sources"]
    assert leaked["contaminated"] == {"gsm8k": len(questions)}
    assert leaked["rows"] == 0
    assert {row["source"] for row in found} == {"train"}
    assert train["rows_read"] == 7473
    assert train["contaminated"] == {"gsm8k": 5}  # templates of one author, with other numbers
    told = card["decontamination"]["tasks"]["gsm8k"]
    assert told == {"questions": 1319, "too_short": 0, "rows_left_out": 1319 + train["contaminated"].get("gsm8k", 0)}
    shown = leaked["left_out"][0]["first"][0]
    assert shown["shown_by"].startswith("100% of “janet")


def test_a_row_s_task_names_its_benchmark(write: Any, context: Context, tokenizer: Path) -> None:
    questions = [{"task": "sheep", "prompt": STORY.format(n="twelve", m="seven")}, {"task": "short", "prompt": "Why?"}]
    rows = [{"text": f"Look: {STORY.format(n='twelve', m='seven')}"}, {"text": "Another text of some length, or so."}]
    against = [{"path": write("questions.jsonl", *questions)}]
    found, card = mixed(context, write("a.jsonl", *rows), against=against, model=str(tokenizer))
    assert len(found) == 1
    assert left_out(card) == {"holds a question of sheep": 1}
    assert card["decontamination"]["tasks"]["short"] == {"questions": 1, "too_short": 1, "rows_left_out": 0}
    assert "1 questions of short are too short" in context.events.read_text()


def test_a_question_file_that_is_none_is_one_line(write: Any, context: Context, tokenizer: Path) -> None:
    against = [{"path": write("questions.jsonl", {"x": 1})}]
    with pytest.raises(UserError, match=r"questions\.jsonl.*can't be told what it is"):
        mixed(context, write("a.jsonl", {"text": "x"}), against=against, model=str(tokenizer))


def test_a_mixture_is_trained_on(write: Any, new_context: Callable[[str], Context], model_folder: Path) -> None:
    from posttrain import sft

    files = [write("a.jsonl", *(chat(f"Number {n}?", "Yes.") for n in range(4))), write("b.jsonl", {"text": "A text."})]
    mix, train = new_context("mix"), new_context("sft")
    mixed(mix, *files)
    trainer = {"max_length": 64, "max_steps": 1, "bf16": False}
    keys = {"model": str(model_folder), "data": [{"path": str(mix.out / data.DATA)}], "global_batch_size": 4}
    assert sft.run(sft.Config.model_validate({**keys, "trainer": trainer, "compile": "off"}), train)["rows"] == 5
    keys["data"] = [{"path": str(mix.out)}]  # the folder of the artifact: its cards describe the data
    assert (
        sft.run(sft.Config.model_validate({**keys, "trainer": trainer, "compile": "off"}), new_context("two"))["rows"]
        == 5
    )

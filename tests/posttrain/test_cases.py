"""What people bring: models of families with their makers' templates, chats and pairs in the forms that they have them.

Each is trained for two steps by the stage itself; looked at is what its batches held.
"""

import gzip
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import families
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import trl
from datasets import Dataset
from families import CALL, talk
from transformers import AutoTokenizer

from cordee.chat.source import Source
from cordee.errors import UserError
from cordee.files import read_json
from cordee.stage import Context
from posttrain import dpo, sft
from posttrain.training.cost import source_cost
from posttrain.training.preference_trainer import PreferenceTrainer

NewContext = Callable[[str], Context]
QUESTIONS = ("Which river is the longest?", "Who wrote Heidi?", "Wie viele Kantone?", "What is 3 + 4?")
ANSWERS = ("The Nile, or the Amazon.", "Johanna Spyri.", "Sechsundzwanzig.", "Seven.")
REFUSED = "I can't tell."


def lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def each(make: Callable[[str, str], Any]) -> list[Any]:
    return [make(question, answer) for question, answer in zip(QUESTIONS, ANSWERS, strict=True)]


def put(path: Path, content: Any) -> Path:
    """Bytes, the rows of a Parquet file, a data set to save, or the files of a folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict):
        for name, part in content.items():
            put(path / name, part)
    elif isinstance(content, Dataset):
        content.save_to_disk(path)
    elif isinstance(content, list):
        pq.write_table(pa.Table.from_pylist(content), path)
    else:
        path.write_bytes(content)
    return path


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny model with a family's template, made once."""
    made: dict[str, Path] = {}

    def call(template: str, **tokens: str) -> Path:
        name = "_".join([template, *tokens.values()]).replace("|", "")
        if name not in made:
            made[name] = architectures.make_family(tmp_path_factory.mktemp("model") / "m", template, **tokens)
        return made[name]

    return call


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The batches that the trainers take a step on, as they are taken."""
    seen: list[dict[str, Any]] = []
    for kind in (trl.SFTTrainer, PreferenceTrainer):
        step = kind.training_step

        def kept(self: Any, model: Any, inputs: Any, *rest: Any, step: Any = step) -> Any:
            seen.append(dict(inputs))
            return step(self, model, inputs, *rest)

        monkeypatch.setattr(kind, "training_step", kept)
    return seen


Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path, new_context: NewContext) -> Run:
    """Runs a stage on some sources: names → contents, or contents with further keys."""

    numbers = itertools.count()

    def call(stage: Any, model: Path, sources: dict[str, Any], **keys: Any) -> dict[str, Any]:
        data = []
        for name, given in sources.items():
            content, source = given if isinstance(given, tuple) else (given, {})
            data.append({"path": str(put(tmp_path / name, content)), **source})
        trainer = {"max_length": 900, "num_train_epochs": 1, "bf16": False, **keys.pop("trainer", {})}
        lora = {"lora": {"r": 4, "lora_alpha": 8}} if stage is dpo else {}
        given = {"model": str(model), "data": data, "global_batch_size": 4, "compile": "off", "trainer": trainer}
        context = new_context(f"run{next(numbers)}")
        stage.run(stage.Config.model_validate(given | lora | keys), context)
        return dict(read_json(context.out / "rows.json"))

    return call


def trained(model: Path, batches: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Of each sequence of SFT that was trained on: what is read only, and what carries loss."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = []
    for batch in batches:
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            loss = labels != -100
            assert (labels[loss] == ids[loss]).all()
            assert mask[loss].all()
            found.append((tokenizer.decode(ids[mask.bool() & ~loss]), tokenizer.decode(ids[loss])))
    return sorted(found)


def compared(model: Path, batches: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Of each pair of DPO: its prompt, and what is compared."""
    tokenizer, found = AutoTokenizer.from_pretrained(model), []
    for batch in batches:
        texts = [
            (tokenizer.decode(ids[mask.bool() & ~said.bool()]), tokenizer.decode(ids[said.bool()]))
            for ids, mask, said in zip(
                batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True
            )
        ]
        half = len(texts) // 2
        for (prompt, chosen), (asked, rejected) in zip(texts[:half], texts[half:], strict=True):
            assert prompt == asked
            found.append((prompt, chosen.rstrip(), rejected.rstrip()))
    return sorted(found)


# --- models ---------------------------------------------------------------------------------------------------

ENDS = {
    "qwen2_5": ("<|im_end|>", {}),
    "llama3": ("<|eot_id|>", {}),
    "phi3": ("<|end|>", {}),
    "gemma3": ("<end_of_turn>", {}),
    "qwen2_5_training": ("<|im_end|>", {}),
    "qwen3_training": ("<|im_end|>", {}),
    "llama3_training": ("<|eot_id|>", {}),
    "gemma_training": ("<end_of_turn>", {}),
    "lfm2": ("<|im_end|>", {"bos_token": "<|im_start|>"}),
    "glm4moe": ("", {"bos_token": "<|user|>", "eos_token": "<|user|>"}),
}
"""A maker's template, or TRL's for training → what ends a turn, and tokens that are something else besides."""


@pytest.mark.parametrize("template", ENDS)
def test_a_familys_template_is_trained_as_it_is(family: Any, run: Run, batches: Any, template: str) -> None:
    """Cases 01, 02 and 04: the ids are those of the maker's rendering; answers and their ends carry loss."""
    end, tokens = ENDS[template]
    model = family(template, **tokens)
    chats = each(lambda question, answer: talk("hello", "Hi.", question, answer))
    run(sft, model, {"chats.jsonl": lines(*({"messages": chat} for chat in chats))})
    found, tokenizer = trained(model, batches), AutoTokenizer.from_pretrained(model)
    expected = sorted(tuple(tokenizer.apply_chat_template(chat)["input_ids"]) for chat in chats)
    seen = sorted(
        tuple(ids[mask.bool()].tolist())
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    )
    assert seen == expected
    for (asked, said), answer in zip(
        found, sorted(ANSWERS, key=lambda one: QUESTIONS[ANSWERS.index(one)]), strict=True
    ):
        assert all(text in said for text in ("Hi.", answer))
        assert said.count(end) >= 2
        assert "hello" in asked
        assert not any(text in said for text in ("hello", *QUESTIONS))


def test_a_base_model_is_told_which_template_to_use(tmp_path: Path, run: Run, batches: Any) -> None:
    """Case 05."""
    folder = architectures.make_family(tmp_path / "m", "qwen2_5")
    (folder / "chat_template.jinja").unlink()
    chats = {"chats.jsonl": lines(*each(lambda question, answer: {"messages": talk(question, answer)}))}
    with pytest.raises(UserError, match=r"4 of 4 rows .*no chat template; name one by the stage's `chat_template`"):
        run(sft, folder, chats)
    run(sft, folder, chats, chat_template="chatml")
    assert {said.strip() for _, said in trained(folder, batches)} == {f"{answer}<|im_end|>" for answer in ANSWERS}


# --- chats ----------------------------------------------------------------------------------------------------


def message(question: str, answer: str) -> dict[str, Any]:
    return {"messages": talk(question, answer)}


def alpaca(question: str, answer: str) -> dict[str, Any]:
    return {"instruction": question, "input": "", "output": answer}


FORMS: dict[str, Any] = {
    "lines.jsonl": lines(*each(message)),
    "array.json": json.dumps(each(message), indent=1).encode(),
    "alpaca.json": json.dumps(each(alpaca)).encode(),
    "alpaca.jsonl": lines(*each(alpaca)),
    "sharegpt.jsonl": lines(*each(lambda question, answer: {"conversations": [
        {"from": "human", "value": question}, {"from": "gpt", "value": answer}]})),
    "completions.jsonl": lines(*each(lambda question, answer: {"prompt": question, "completion": answer})),
    "completed.jsonl": lines(*each(lambda question, answer: {
        "prompt": talk(question), "completion": talk("", answer)[1:]})),
    "renamed.csv": (b"q,a\n" + b"".join(each(lambda q, a: f'"{q}","{a}"\n'.encode())),
                    {"columns": {"q": "prompt", "a": "completion"}}),
    "lines.jsonl.gz": gzip.compress(lines(*each(message))),
    "shards": {"part-0.jsonl": lines(*each(message)[:2]), "part-1.jsonl": lines(*each(message)[2:])},
    "saved": Dataset.from_list(each(message)),
    "splits": {"train-0.parquet": each(message), "test-0.parquet": each(lambda *_: message("no", "no"))},
}  # fmt: skip


def test_common_formats_are_all_the_same_chats(family: Any, run: Run, batches: Any) -> None:
    """Cases 14 and 38."""
    model = family("qwen2_5")
    run(sft, model, FORMS)
    found = trained(model, batches)
    assert len(found) == 4 * len(FORMS)
    assert len(set(found)) == 4
    assert {said for _, said in found} == {f"{answer}<|im_end|>" for answer in ANSWERS}


def test_a_plan_knows_how_many_rows_each_format_has(tmp_path: Path) -> None:
    """Case 38: what passes a plan is read by the run."""
    for name, given in FORMS.items():
        content, keys = given if isinstance(given, tuple) else (given, {})
        source = {"path": str(put(tmp_path / name, content)), **keys}
        assert source_cost(Source.model_validate(source), "data", {}, "chats", "error").rows == 4, name


def test_one_row_too_long_and_a_comma_are_one_line(family: Any, run: Run, batches: Any) -> None:
    """Case 14."""
    rows = [*each(message), message("Why?", "Since it is. " * 200)]
    with pytest.raises(UserError, match=r"row 5: longer than max_length=900 tokens.*`overlong: drop`"):
        run(sft, family("qwen2_5"), {"long.jsonl": lines(*rows)})
    told = run(sft, family("qwen2_5"), {"long.jsonl": lines(*rows)}, overlong="drop")
    assert told["sources"][0]["left_out"][0]["first"][0]["row"] == 5
    assert len(trained(family("qwen2_5"), batches)) == 4
    with pytest.raises(UserError, match=r"4 of 4 rows.*a comma behind the object.*sed 's/,\$//' takes them away"):
        run(sft, family("qwen2_5"), {"comma.jsonl": lines(*each(message)).replace(b"\n", b",\n")})


def test_turns_that_are_marked_carry_no_loss(family: Any, run: Run, batches: Any) -> None:
    """Case 10."""
    off: list[dict[str, Any]] = [{"train": False}, {"weight": 0}, {"train": False, "weight": 0.0}, {"weight": False}]
    rows = [
        [*talk("hello", "Hi.", **marks), *talk(question, answer, train=True)]
        for marks, (question, answer) in zip(off, each(lambda *both: both), strict=True)
    ]
    run(sft, family("qwen2_5"), {"a.jsonl": lines(*({"messages": row} for row in rows))})
    found = trained(family("qwen2_5"), batches)
    assert {said for _, said in found} == {f"{answer}<|im_end|>" for answer in ANSWERS}
    assert all("Hi.<|im_end|>" in asked for asked, _ in found)


def with_nulls(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"tool_calls": None, "name": None, "reasoning_content": None, **one} for one in messages]


def test_nulls_of_parquet_are_as_if_they_were_not_there(family: Any, run: Run, batches: Any) -> None:
    """Case 09: Parquet gives every struct the keys of all the others."""
    rows = each(lambda *both: {"messages": with_nulls(*talk(*both)), "tools": None})
    called = [talk("3 + 4?")[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    rows.append({"messages": with_nulls(*called, {"role": "tool", "content": "7"}, *talk("", "Seven.")[1:])})
    run(sft, family("qwen2_5"), {"a.parquet": rows})
    found = [said for _, said in trained(family("qwen2_5"), batches)]
    assert not any("null" in said for said in found)
    call = '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call><|im_end|>'
    assert {*found} == {f"{answer}<|im_end|>" for answer in ANSWERS} | {f"{call}Seven.<|im_end|>"}


def test_nulls_of_parquet_do_not_end_dpo(family: Any, run: Run, batches: Any) -> None:
    """Case 09, with Llama 3.1's template, which counts the calls of every message."""
    rows = each(lambda question, answer: {
        "prompt": with_nulls(*talk(question)), "chosen": with_nulls(*talk("", answer)[1:]),
        "rejected": with_nulls(*talk("", REFUSED)[1:])})  # fmt: skip
    run(dpo, family("llama3_1"), {"a.parquet": rows})
    found = compared(family("llama3_1"), batches)
    assert {chosen for _, chosen, _ in found} == {f"{answer}<|eot_id|>" for answer in ANSWERS}


def test_tools_and_developers_stand_where_the_template_has_them(family: Any, run: Run, batches: Any) -> None:
    """Cases 08 and 11."""
    tools = {"tools": [families.ADD]}
    run(sft, family("qwen2_5"), {"a.jsonl": lines(*({"messages": families.TOOL_TALK, **tools} for _ in range(4)))})
    for asked, said in trained(family("qwen2_5"), batches):
        assert "Adds two numbers" in asked
        assert "<tool_response>\n2\n</tool_response>" in asked
        assert said.startswith('<tool_call>\n{"name": "add"')
        assert said.endswith("Two.<|im_end|>")
    batches.clear()
    developer = [{"role": "developer", "content": "Be brief."}, *talk("hello", "Hi.")]
    with pytest.raises(UserError, match=r"leaves out the 'content' of a message of the 'developer' \(message 1\)"):
        run(sft, family("qwen2_5"), {"b.jsonl": lines({"messages": developer})})
    run(sft, family("gptoss"), {"b.jsonl": lines({"messages": developer})}, global_batch_size=1)
    ((asked, said),) = trained(family("gptoss"), batches)
    assert "Be brief." in asked
    assert "Hi." in said


@pytest.mark.parametrize("earlier", ["own_row", "skip"])
def test_thoughts_of_several_turns_are_trained_as_they_will_be_asked_for(
    family: Any, run: Run, batches: Any, earlier: str
) -> None:
    """Case 07: Qwen 3 drops the reasoning of earlier answers."""
    rows = each(lambda *both: {"messages": [*talk("hello", "Hi."), *talk(*both, reasoning_content="Let me see.")]})
    rows = [{"messages": [*row["messages"], *talk("Sure?", "Yes.", reasoning_content="I am.")]} for row in rows]
    told = run(sft, family("qwen3"), {"a.jsonl": lines(*rows)}, earlier_answers=earlier)
    found = [said for _, said in trained(family("qwen3"), batches)]
    assert sum("I am." in said for said in found) == 4
    assert sum("Let me see." in said for said in found) == (4 if earlier == "own_row" else 0)
    assert any("renders differently when messages follow" in note for note in told["sources"][0]["notes"])


# --- pairs ----------------------------------------------------------------------------------------------------

PAIRS: dict[str, Any] = {
    "texts.jsonl": lines(*each(lambda question, answer: {"prompt": question, "chosen": answer, "rejected": REFUSED})),
    "implicit.jsonl": lines(*each(lambda question, answer: {
        "chosen": talk(question, answer), "rejected": talk(question, REFUSED)})),
    "explicit.jsonl": lines(*each(lambda question, answer: {
        "prompt": talk(question), "chosen": talk("", answer)[1:], "rejected": talk("", REFUSED)[1:]})),
    "feedback.parquet": each(lambda question, answer: {
        "prompt": question, "prompt_id": "x", "messages": talk(question, answer), "chosen": talk(question, answer),
        "rejected": talk(question, REFUSED), "score_chosen": 8.0, "score_rejected": 1.5}),
    "turns.jsonl": (lines(*each(lambda question, answer: {
        "conversations": [{"from": "human", "value": question}], "chosen": {"from": "gpt", "value": answer},
        "rejected": {"from": "gpt", "value": REFUSED}})), {"columns": {"conversations": "prompt"}}),
}  # fmt: skip


def test_pairs_in_all_their_forms_are_the_same(family: Any, run: Run, batches: Any) -> None:
    """Case 13."""
    model = family("qwen2_5")
    run(dpo, model, PAIRS)
    found = compared(model, batches)
    assert len(found) == 4 * len(PAIRS)
    assert len(set(found)) == 4
    assert {(chosen, rejected) for _, chosen, rejected in found} == {
        (f"{answer}<|im_end|>", f"{REFUSED}<|im_end|>") for answer in ANSWERS
    }
    for prompt, chosen, _ in found:
        question = QUESTIONS[ANSWERS.index(chosen.removesuffix("<|im_end|>"))]
        assert prompt.endswith(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")


def test_reasoning_of_a_pair_is_compared(family: Any, run: Run, batches: Any) -> None:
    """Case 13."""
    rows = each(lambda question, answer: {"prompt": talk(question), "rejected": talk("", REFUSED)[1:],
        "chosen": talk("", answer, reasoning_content="Let me see.")[1:]})  # fmt: skip
    run(dpo, family("qwen3"), {"a.jsonl": lines(*rows)})
    for _, chosen, _ in compared(family("qwen3"), batches):
        assert "Let me see." in chosen


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": talk("Why?"), "chosen": talk("Why?", "So."), "rejected": talk("Why?", "No.")},
        {"prompt": QUESTIONS[0], "chosen": f"{QUESTIONS[0]} The Nile.", "rejected": f"{QUESTIONS[0]} The Rhine."},
    ],
)
def test_a_prompt_that_stands_in_the_answers_too_is_noticed(family: Any, run: Run, row: Any) -> None:
    """Case 13."""
    with pytest.raises(UserError, match=r"2 of 2 rows .*chosen begins with the prompt.*`ignore: \[prompt\]`"):
        run(dpo, family("qwen2_5"), {"twice.jsonl": lines(row, row)})
    run(dpo, family("qwen2_5"), {"twice.jsonl": (lines(*[row] * 4), {"ignore": ["prompt"]})})

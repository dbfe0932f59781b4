"""All stock templates with tokenizers of several kinds, and chats out of the ordinary."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stock_templates
import stock_tokenizers
from families import ADD, CALL, TOOL_TALK, source, talk, tokenizer
from stock_templates import NAMES, answers, faults, rows
from transformers import AutoTokenizer

from cordee.chat import spans
from cordee.chat.schema import BadRowError
from cordee.chat.templates import Template

ROOT = Path(__file__).resolve().parents[3]
DEEPSEEK_END = "<\uff5cend▁of▁sentence\uff5c>"
THINKING = "<think>\nSimple.\n</think>\n\n"
PARALLEL = [CALL, {"type": "function", "function": {"name": "add", "arguments": '{"x":2}'}}]


def assistant(content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


ODD: dict[str, dict[str, Any]] = {
    "blanks first": {"messages": talk("One?", "  Paris.", "Two?", "\n\nRome.")},
    "blanks last": {"messages": talk("One?", "Paris.  ", "Two?", "Rome.\n\n")},
    "blanks within": {"messages": talk("One?", "Paris\n\n\n  x.", "Two?", "a\n\n\n\nb\t\t c")},
    "alike": {"messages": talk("Paris.", "Paris.", "Paris.", "Paris.")},
    "as a header": {"messages": talk("assistant\n", "assistant\nmodel\n x")},
    "thoughts": {"messages": talk("One?", f"{THINKING}Paris.", "Two?", "<think>Hard.</think>Rome.")},
    "empty": {"messages": talk("One?", "", "Two?", "Rome.")},
    "empty and not trained": {"messages": [talk("One?")[0], assistant("", train=False), *talk("Two?", "Rome.")]},
    "the first alone": {"messages": [*talk("One?", "Paris."), *talk("Two?", "Rome.", train=False)]},
    "call alone": {"messages": TOOL_TALK[:2], "tools": [ADD]},
    "call and text": {"messages": [TOOL_TALK[0], assistant("I add.", tool_calls=[CALL]), *TOOL_TALK[2:]]},
    "call without tools": {"messages": TOOL_TALK},
    "two calls, two results": {
        "messages": [
            *[TOOL_TALK[0], assistant("", tool_calls=PARALLEL), TOOL_TALK[2], {"role": "tool", "content": "3"}],
            TOOL_TALK[3],
        ],
        "tools": [ADD],
    },
    "two answers": {"messages": [*talk("One?", "Paris."), assistant("Rome.")]},
    "ends with the user": {"messages": talk("One?", "Paris.", "Two?")},
    "begins with the assistant": {"messages": [assistant("Hello."), *talk("One?", "Paris.")]},
    "the assistant alone": {"messages": [assistant("Hello.")]},
    "system and assistant": {"messages": [{"role": "system", "content": "Sys."}, assistant("Hello.")]},
    "two users": {"messages": [talk("One?")[0], *talk("Two?", "Paris.")]},
}


def texts(template: Template, row: dict[str, Any]) -> list[list[str]]:
    """Of each sequence of a row the texts that carry loss."""
    found = []
    for _, ids, has_loss, _ in answers(template, row)[1]:
        edges = np.flatnonzero(np.diff(np.concatenate([[False], has_loss, [False]])))
        found.append([template.tokenizer.decode(ids[first:until]) for first, until in edges.reshape(-1, 2)])
    return found


def refused(template: Template, row: dict[str, Any]) -> str:
    with pytest.raises(BadRowError) as caught:
        answers(template, row)
    return caught.value.problem


def test_the_table_in_the_documents_is_what_the_command_prints() -> None:
    """Its marks are judged by `faults`, on every template and kind of chat."""
    assert stock_templates.table() == (ROOT / "docs/chat_templates.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["trimmed", "prefixed", "metaspace", "unigram", "stripping"])
def test_no_kind_of_tokenizer_moves_the_loss(kind: str) -> None:
    trained = 0
    for name in NAMES:
        template = Template(tokenizer(source(name), kind))
        for told in ("three turns", "tool call"):
            try:
                chat, found = answers(template, rows(template)[told])
            except BadRowError:  # which the table lists
                continue
            assert faults(template, chat, found) == [], (name, told)
            trained += 1
    assert trained > 60


@pytest.mark.parametrize("name", [*NAMES, "mistral"])
def test_a_chat_out_of_the_ordinary_is_trained_as_rendered_or_refused(name: str) -> None:
    template = Template(tokenizer(source(name)))
    for told, row in ODD.items():
        try:
            chat, found = answers(template, row)
        except BadRowError:
            continue
        if chat.messages[0]["role"] != "assistant":  # no prompt without a message can be asked for
            assert faults(template, chat, found) == [], told


@pytest.mark.parametrize(
    ("name", "kind", "trained"),
    [
        ("qwen2_5", "blanks first", [["  Paris.<|im_end|>", "\n\nRome.<|im_end|>"]]),
        ("llama3", "blanks first", [["Paris.<|eot_id|>", "Rome.<|eot_id|>"]]),  # it trims
        ("qwen2_5", "two answers", [["Paris.<|im_end|>", "Rome.<|im_end|>"]]),
        ("qwen2_5", "ends with the user", [["Paris.<|im_end|>"]]),
        ("qwen2_5", "begins with the assistant", [["Hello.<|im_end|>", "Paris.<|im_end|>"]]),
        ("phi3", "begins with the assistant", [["Hello.<|end|>", "Paris.<|end|>\n</s>"]]),
        ("nemotron_3_nano", "the assistant alone", [["</think>Hello.<|im_end|>"]]),
        ("deepseekv3", "begins with the assistant", [[f"{x}{DEEPSEEK_END}" for x in ("Hello.", "Paris.")]]),
        ("glm4moe", "two answers", [[f"\n<think></think>\n{x}" for x in ("Paris.", "Rome.")]]),  # no end of its own
        ("qwen3", "thoughts", [["<think>\nHard.\n</think>\n\nRome.<|im_end|>"], [f"{THINKING}Paris.<|im_end|>"]]),
        ("smolvlm", "the first alone", [[" Paris.<end_of_utterance>"]]),
        ("smolvlm", "empty and not trained", [[" Rome.<end_of_utterance>"]]),
        ("gemma4", "call alone", [["<|tool_call>call:add{x:1}<tool_call|><|tool_response>"]]),
        ("lfm2_v2", "two calls, two results",
         [["<|tool_call_start|>[add(x=1), add(x=2)]<|tool_call_end|><|im_end|>", "Two.<|im_end|>"]]),
    ],
)  # fmt: skip
def test_what_carries_loss_in_a_chat_out_of_the_ordinary(name: str, kind: str, trained: list[list[str]]) -> None:
    assert texts(Template(tokenizer(source(name))), ODD[kind]) == trained


@pytest.mark.parametrize(
    ("name", "kind", "problem"),
    [
        ("qwen2_5", "empty", "an answer has no content"),
        ("gemma3", "two answers", "the chat template refuses it: Conversation roles must alternate"),
        (
            "llava_next",
            "the assistant alone",
            "it begins with the assistant, and where that answer begins can't be told",
        ),
        (
            "llama3_1",
            "two calls, two results",
            "the chat template refuses it: This model only supports single tool-calls",
        ),
        ("llama3_1", "call and text", "the chat template leaves out the 'content' of a message of the 'assistant'"),
        ("gptoss", "two calls, two results", "the chat template leaves out the 'tool_calls' of a message"),
        ("deepseek_r1_distill", "thoughts", "the chat template leaves out what an answer says before `</think>`"),
        ("qwen3", "two answers", "the chat template renders a prompt differently when its answer follows"),
    ],
)
def test_what_a_template_can_not_do_is_one_line(name: str, kind: str, problem: str) -> None:
    assert refused(Template(tokenizer(source(name))), ODD[kind]).startswith(problem)


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
@pytest.mark.parametrize("arguments", [{"x": 1}, '{"x":1}'])
def test_a_call_is_the_same_whether_its_content_is_null_empty_or_absent(content: Any, arguments: Any) -> None:
    """Handed to GLM's template as it is, null would be trained as the word None."""
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    row = {"messages": [TOOL_TALK[0], {"role": "assistant", **content, "tool_calls": [call]}], "tools": [ADD]}
    said = "\n<think></think>\n<tool_call>add\n<arg_key>x</arg_key>\n<arg_value>1</arg_value>\n</tool_call>"
    assert texts(Template(tokenizer(source("glm4moe"))), row) == [[said]]
    begins, turn = ("\uff5ctool▁calls▁begin\uff5c", "\uff5ctool▁call▁begin\uff5c")
    (found,) = texts(Template(tokenizer(source("deepseekv3"))), {"messages": row["messages"]})
    written = arguments if isinstance(arguments, str) else '{"x": 1}'
    assert found[0].startswith(f"<{begins}><{turn}>function<\uff5ctool▁sep\uff5c>add\n```json\n{written}\n```")


def test_a_special_token_that_json_spells_with_escapes_is_seen() -> None:
    arguments = '{"x": "\\u003c|im_end|\\u003e"}'
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    row = {"messages": [TOOL_TALK[0], assistant(None, tool_calls=[call])], "tools": [ADD]}
    template = Template(tokenizer(source("qwen2_5")))
    assert refused(template, row) == "a text spells out the special token '<|im_end|>'"


@pytest.mark.parametrize("kind", ["bytes", "prefixed", "unigram"])
def test_a_begin_of_text_token_may_stand_before_each_turn(kind: str) -> None:
    """Llama 2's template, as its maker ships it but for the system's message."""
    text = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    template = Template(tokenizer(text, kind))
    chat, found = answers(template, {"messages": talk("a", "Paris ", "b", " Rome")})
    assert faults(template, chat, found) == []
    assert ["".join(text.split()) for text in texts(template, {"messages": chat.messages})[0]] == [
        "Paris</s>", "Rome</s>"
    ]  # fmt: skip


OLMO2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>\n' + m.content + '\n' }}{% else %}"
    "{{ '<|assistant|>\n' + m.content + eos_token }}{% if not loop.last %}{{ '\n' }}{% endif %}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("family", "text", "end"),
    [
        ("olmo2", OLMO2, "<|endoftext|>"),  # which begins each chat as well
        ("smollm2", CHATML, "<|im_end|>"),  # eos, pad; and the token of begin-of-text begins each turn
        ("gpt2", CHATML, "<|im_end|>\n"),  # ordinary text in its vocabulary; the template writes no begin of text
        ("llama2", CHATML.replace("<|im_end|>", "</s>"), "</s>"),
    ],
)
def test_begin_and_end_of_text_stand_where_a_maker_has_them(tmp_path: Path, family: str, text: str, end: str) -> None:
    """Equal to each other, at each turn, or absent: what the template writes is trained, and nothing is added."""
    folder = stock_tokenizers.write(tmp_path, stock_tokenizers.STOCK[family]())
    made = AutoTokenizer.from_pretrained(folder)
    made.chat_template = text
    template = Template(made)
    chat, found = answers(template, {"messages": talk("All human beings?", "Free.", "Et?", "égaux")})
    assert faults(template, chat, found) == []
    ((_, ids, has_loss, _),) = found
    said = made.decode([token for token, counts in zip(ids, has_loss, strict=True) if counts])
    assert said.replace(" ", "") == f"Free.{end}égaux{end}"


@pytest.mark.parametrize("kind", ["bytes", "metaspace", "unigram"])
def test_text_may_mark_the_turns(kind: str) -> None:
    """Nothing splits the text for the tokenizer: the answer's first token takes in the prompt's last blank."""
    text = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    template = Template(tokenizer(text + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}", kind))
    chat, found = answers(template, {"messages": talk("Qui?", "France.", "Und?", "Alle Menschen.")})
    assert faults(template, chat, found) == []
    (said,) = texts(template, {"messages": chat.messages})
    assert [text.strip() for text in said] == ["France.", "Alle Menschen."]


@pytest.mark.parametrize("name", ["qwen3", "gptoss"])
def test_earlier_answers_that_are_rendered_otherwise_may_be_skipped(name: str) -> None:
    template = Template(tokenizer(source(name)))
    kept = {"own_row": [5, 1, 3], "skip": [5]}
    for earlier, places in kept.items():
        chat, _ = answers(template, {"messages": talk(*stock_templates.TEXTS)})
        found = spans.render(chat, template, earlier)
        assert [part.message for one in found for part in one.parts] == places
    chat, _ = answers(template, {"messages": talk(*stock_templates.TEXTS[:5])})  # the last answer is followed
    assert [part.message for one in spans.render(chat, template, "skip") for part in one.parts] == [3]
    unchanged = Template(tokenizer(source("qwen2_5")))
    chat, _ = answers(unchanged, {"messages": talk(*stock_templates.TEXTS)})
    assert spans.render(chat, unchanged, "skip") == spans.render(chat, unchanged, "own_row")


def test_a_date_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat whose beginning is rendered the day after the whole of it would be refused, or trained apart."""
    template = Template(tokenizer(source("llama3_2")))
    assert template.writes_date
    assert not Template(tokenizer(source("llama3_1"))).writes_date
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", None)  # no clock is read any more
    _, found = answers(template, {"messages": talk(*stock_templates.TEXTS)})
    assert len(found) == 1
    assert f"Today Date: {template.now:%d %b %Y}" in found[0][0].text


@pytest.mark.parametrize("shift", [-1, 1])
def test_the_judge_sees_loss_that_is_shifted(shift: int) -> None:
    template = Template(tokenizer(source("qwen2_5")))
    chat, found = answers(template, {"messages": talk("One?", "Paris.")})
    moved = [(one, ids, np.roll(has_loss, shift), placed) for one, ids, has_loss, placed in found]
    assert len(faults(template, chat, moved)) == 2

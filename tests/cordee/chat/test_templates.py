"""What a template reads, writes and leaves out."""

import pytest
from families import ADD, TOOL_TALK, parts, source, talk, tokenizer

from cordee.chat import base
from cordee.chat.problems import BadRowError
from cordee.chat.templates import Template
from cordee.errors import UserError


def template(name: str) -> Template:
    return Template(tokenizer(source(name)))


def test_what_a_template_reads_is_read_off_its_source() -> None:
    qwen, llama = template("qwen3"), template("llama3_1")
    assert qwen.reads("reasoning_content")
    assert qwen.reads("tool_calls")
    assert not qwen.reads("tool_call_id")
    assert not llama.reads("reasoning_content")
    assert {"tools", "enable_thinking"} <= qwen.parameters
    assert "date_string" in llama.variables - llama.parameters  # it sets today's date where none is given
    assert not qwen.has_marks
    assert template("qwen3_training").has_marks


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("qwen2_5", "<|im_start|>assistant\n"),
        ("llama3_1", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        ("gemma3", "<start_of_turn>model\n"),
        ("phi3", "<|assistant|>\n"),  # though it ends every text that asks for nothing with one token more
        ("mistral", ""),
    ],
)
def test_what_begins_an_answer_is_found_by_rendering(name: str, prompt: str) -> None:
    assert template(name).generation_prompt == prompt


def test_a_tokenizer_without_a_template_or_with_one_that_is_none_is_named() -> None:
    with pytest.raises(UserError, match="model: its tokenizer has no chat template"):
        Template(tokenizer(""))
    with pytest.raises(UserError, match="model: its chat template can't be read: "):
        Template(tokenizer("{% for m in messages %}"))


def test_a_template_that_refuses_a_chat_is_quoted() -> None:
    with pytest.raises(BadRowError, match="refuses it: Conversation roles must alternate"):
        template("gemma").text([*talk("a"), *talk("b")], {})
    with pytest.raises(BadRowError, match="refuses it: no role developer: known are system, user and assistant"):
        Template(tokenizer(base.TEMPLATE.read_text())).text(
            [{"role": "developer", "content": "a"}, *talk("b", "c")], {}
        )


@pytest.mark.parametrize(
    ("name", "messages", "left_out"),
    [
        ("qwen3", TOOL_TALK, []),
        ("llama3_1", TOOL_TALK, []),
        ("qwen2_5", [{"role": "developer", "content": "Be brief."}, *talk("a", "b")], [(0, "content")]),
        ("phi3", [*talk("a", "b"), {"role": "tool", "content": "b"}, *talk("c", "b")], [(2, "content")]),
        ("idefics3", talk("a", "b"), [(0, "content"), (1, "content")]),
        ("idefics3", parts("a", "b"), []),
        ("lfm2", [TOOL_TALK[0], {**TOOL_TALK[1], "content": "I add."}], [(1, "tool_calls")]),
        ("qwen3", talk("a", "b", "c", "d", reasoning_content="e"), []),  # of the first it drops it, as it is meant to
        ("gemma4", talk("a", "b", reasoning_content="e"), [(1, "reasoning_content")]),
    ],
)
def test_what_a_template_leaves_out_is_found(name: str, messages: list, left_out: list) -> None:
    """The texts are alike in all messages, so that none is seen in the place of another."""
    assert template(name).left_out(messages, {"tools": [ADD]}) == left_out


def test_a_tool_call_that_a_template_leaves_out_is_found_beside_one_that_it_writes() -> None:
    text = "{% for m in messages %}{{ m.content or (m.tool_calls[0].function or {}).name }}{% endfor %}"
    one, (call,) = Template(tokenizer(text)), TOOL_TALK[1]["tool_calls"]
    assert one.left_out(TOOL_TALK[:2], {}) == []
    for calls in ([call, call], [call["function"]]):
        assert one.left_out([TOOL_TALK[0], TOOL_TALK[1] | {"tool_calls": calls}], {}) == [(1, "tool_calls")]


def test_the_base_template_says_what_it_does_not_read() -> None:
    ours = Template(tokenizer(base.TEMPLATE.read_text(encoding="utf-8")))
    assert ours.has_marks
    assert ours.parameters == {"messages", "add_generation_prompt", "bos_token", "raise_exception"}


def test_what_is_left_out_is_told_of_texts_and_of_lists_of_parts_apart() -> None:
    """Qwen3's template writes nothing of a list, and a chat of the same roles with texts before it changes nothing."""
    qwen, gemma = template("qwen3"), template("gemma3")
    assert qwen.left_out(talk("a", "b"), {}) == []
    assert qwen.left_out(parts("a", "b"), {}) == [(0, "content"), (1, "content")]
    system = [{"role": "system", "content": parts("a")[0]["content"]}, *talk("a", "b")]
    assert gemma.left_out(system, {}) == []
    system[0]["content"] *= 2  # it writes the first part of the system message
    assert gemma.left_out(system, {}) == [(0, "content")]
    assert template("llama3_2").left_out(parts("a", "b"), {}) == [(0, "content"), (1, "content")]  # as Python writes it

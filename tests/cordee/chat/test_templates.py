"""What a template reads, writes and leaves out."""

import pytest
from families import ADD, TOOL_TALK, source, talk, tokenizer

from cordee.chat import base
from cordee.chat.formats import BadRowError
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
        ("phi3", ""),  # it ends every text that asks for nothing with its end token
        ("mistral", ""),
    ],
)
def test_what_begins_an_answer_is_found_by_rendering(name: str, prompt: str) -> None:
    assert template(name).generation_prompt == prompt


@pytest.mark.parametrize(
    ("name", "end"),
    [
        *(("qwen3", "<|im_end|>"), ("llama3_1", "<|eot_id|>"), ("gemma3", "<end_of_turn>"), ("phi3", "<|end|>")),
        *(("mistral", "</s>"), ("gptoss", "<|return|>"), ("glm4moe", None), ("llava_next", None)),
    ],
)
def test_what_ends_an_answer_is_found_by_rendering(name: str, end: str | None) -> None:
    found = template(name).end_of_turn
    assert (found and template(name).tokenizer.convert_ids_to_tokens(found)) == end


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
        ("idefics3", [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in talk("a", "b")], []),
        ("lfm2", [TOOL_TALK[0], {**TOOL_TALK[1], "content": "I add."}], [(1, "tool_calls")]),
        ("qwen3", talk("a", "b", "c", "d", reasoning_content="e"), []),  # of the first it drops it, as it is meant to
        ("gemma4", talk("a", "b", reasoning_content="e"), [(1, "reasoning_content")]),
    ],
)
def test_what_a_template_leaves_out_is_found(name: str, messages: list, left_out: list) -> None:
    """The texts are alike in all messages, so that none is seen in the place of another."""
    assert template(name).left_out(messages, {"tools": [ADD]}) == left_out


def test_the_base_template_says_what_it_does_not_read() -> None:
    ours = Template(tokenizer(base.TEMPLATE.read_text(encoding="utf-8")))
    assert ours.has_marks
    assert ours.parameters == {"messages", "add_generation_prompt", "bos_token", "raise_exception"}

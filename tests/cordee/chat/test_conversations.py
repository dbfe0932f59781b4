"""Where loss stands: in every family's stock template and in TRL's training variants of them."""

from collections import Counter
from pathlib import Path
from typing import Any

import encoding
import numpy as np
import pytest
from families import ADD, TEMPLATES, TOOL_TALK, parts, source, talk, tokenizer, write

from cordee.chat import base, spans
from cordee.chat.conversations import Conversation
from cordee.chat.source import Limits
from cordee.chat.templates import Template
from cordee.errors import UserError

LIMITS = Limits(max_length=4096, positions=None, vocab_size=100_000)
IMAGES = ("idefics3", "smolvlm", "llava_next")  # they take content as a list of parts
FAMILIES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
FOUR = talk("What is the capital of France?", "The capital is Paris.", "Et ça? Würde", "libres et égaux 你好")


def tokenized(
    file: Path, template: Template, *rows: dict[str, Any], notes: list[str] | None = None
) -> list[Conversation]:
    return encoding.chats(write(file, *rows), template, LIMITS, (notes if notes is not None else []).append)


def with_loss(conversation: Conversation, template: Template) -> list[str]:
    """The texts that carry loss: one for each run of tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], conversation.has_loss, [False]])))
    return [
        template.tokenizer.decode(conversation.ids[first:until], clean_up_tokenization_spaces=False)
        for first, until in edges.reshape(-1, 2)
    ]


def messages_for(name: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not name.startswith(IMAGES):
        return messages
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


@pytest.mark.parametrize("name", [*FAMILIES, "mistral"])
def test_every_familys_answers_are_found_and_its_ids_are_the_makers(tmp_path: Path, name: str) -> None:
    template, messages = Template(tokenizer(source(name))), messages_for(name, FOUR)
    found = tokenized(tmp_path / "chats.jsonl", template, {"messages": messages})
    carried = Counter(answer.message for one in found for answer in one.answers)
    assert carried == {1: 1, 3: 1}, "each answer is trained on once"
    for one in found:
        theirs = template.tokenizer.apply_chat_template(messages[: one.messages], tokenize=True, return_dict=True)
        assert one.ids.tolist() == theirs["input_ids"]
        texts = with_loss(one, template)
        assert len(texts) == len(one.answers)
        for text, answer in zip(texts, one.answers, strict=True):
            assert FOUR[answer.message]["content"] in text
            assert not any(message["content"] in text for message in FOUR if message is not FOUR[answer.message])
            assert one.has_loss[answer.first : answer.until].all()


ENDS = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "deepseek": "<\uff5cend▁of▁sentence\uff5c>",
    "diffusion_gemma": "<turn|>",
    "gemma": "<end_of_turn>",
    "gemma4": "<turn|>",
    "glm4moe": "<|user|>",
    "gptoss": "<|return|>",
    "idefics3": "<end_of_utterance>",
    "smolvlm": "<end_of_utterance>",
    "lfm2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llava_next": "</s>",
    "mistral": "</s>",
    "muse": "<|eot|>",
    "nemotron": "<|im_end|>",
    "phi3": "<|end|>",
    "qwen": "<|im_end|>",
}


@pytest.mark.parametrize("name", [*FAMILIES, "mistral"])
def test_what_ends_a_generation_is_what_training_ends_an_answer_with(name: str) -> None:
    """Cohere's template writes two special tokens, of which the last ends the turn; GLM's has only the next turn's."""
    family = max((known for known in ENDS if name.startswith(known)), key=len)
    found = spans.end_of_turn(tokenizer(source(name)))
    assert tokenizer(source(name)).convert_ids_to_tokens(found) == ENDS[family]


def test_what_ends_an_answer_may_be_the_token_of_id_0() -> None:
    """As in GPT-NeoX's vocabulary."""
    made = tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}<s>{% endfor %}")
    assert (spans.end_of_turn(made), made.convert_tokens_to_ids("<s>")) == (0, 0)


@pytest.mark.parametrize(
    "text", ["", "{% for m", "{% for m in messages %}{{ m.content }}\n{% endfor %}", "{{ m + 1 }}"]
)
def test_without_a_template_that_ends_an_answer_there_is_no_such_token(text: str) -> None:
    assert spans.end_of_turn(tokenizer(text)) is None


@pytest.mark.parametrize("name", FAMILIES)
def test_lists_of_text_parts_are_the_texts(tmp_path: Path, name: str) -> None:
    template = Template(tokenizer(source(name)))
    texts = messages_for(name, talk("What is it?", "Paris."))
    split = parts("What i|s it?", "Par|is.")
    (one,) = tokenized(tmp_path / "parts.jsonl", template, {"messages": split})
    (other,) = tokenized(tmp_path / "texts.jsonl", template, {"messages": texts})
    assert one.ids.tolist() == other.ids.tolist()
    assert one.has_loss.tolist() == other.has_loss.tolist()
    if name not in ("gemma", "gemma_training"):  # they take no system message
        chats = [{"messages": [{**chat[0], "role": "system"}, *chat]} for chat in (split, texts)]
        one, other = tokenized(tmp_path / "system.jsonl", template, *chats)
        said, text = ("".join(template.tokenizer.decode(made.ids).split()) for made in (one, other))
        assert said == text, "but for blanks: Gemma 4 writes one behind each part of a system message"


@pytest.mark.parametrize("name", [name for name in FAMILIES if name.endswith("_training")])
def test_with_marks_the_loss_is_the_marks(tmp_path: Path, name: str) -> None:
    """But for the last character before a mark ends: of its tokens transformers marks the first one only."""
    template, messages = Template(tokenizer(source(name))), messages_for(name, FOUR[:2])
    (one,) = tokenized(tmp_path / "chats.jsonl", template, {"messages": messages})
    how = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    marked = template.tokenizer.apply_chat_template(messages, **how)
    assert one.has_loss.tolist() == [mark == 1 for mark in marked["assistant_masks"]]


@pytest.mark.parametrize(
    ("name", "row", "texts"),
    [
        (
            "qwen2_5",
            {"messages": TOOL_TALK, "tools": [ADD]},
            ['<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call><|im_end|>', "Two.<|im_end|>"],
        ),
        (
            "llama3_1",
            {"messages": TOOL_TALK, "tools": [ADD]},
            ['{"name": "add", "parameters": {"x": 1}}<|eot_id|>', "Two.<|eot_id|>"],
        ),
        ("qwen2_5", {"messages": talk("a", "b", train=False) + talk("c", "d")}, ["d<|im_end|>"]),
        ("qwen2_5_training", {"messages": talk("a", "b", weight=0) + talk("c", "d")}, ["\nd<|im_end|>\n"]),
        ("phi3", {"messages": FOUR}, ["The capital is Paris.<|end|>", "libres et égaux 你好<|end|>\n</s>"]),
        ("qwen2_5", {"messages": [{"role": "assistant", "content": "Hello!"}, *talk("a", "b")]},
         ["Hello!<|im_end|>", "b<|im_end|>"]),
        ("qwen2_5", {"messages": [*talk("a", "b"), {"role": "user", "content": "thanks"}]}, ["b<|im_end|>"]),
    ],
)  # fmt: skip
def test_what_carries_loss_is_as_the_row_says(tmp_path: Path, name: str, row: dict[str, Any], texts: list[str]) -> None:
    template = Template(tokenizer(source(name)))
    (one,) = tokenized(tmp_path / "chats.jsonl", template, row)
    assert with_loss(one, template) == texts
    if "tools" in row:
        assert "Adds two numbers" in template.tokenizer.decode(one.ids[~one.has_loss])


def test_an_answer_that_ends_with_what_begins_the_next_turn_learns_to_stop_there(tmp_path: Path) -> None:
    """GLM's generation stops at `<|user|>`; its template writes nothing else after an answer."""
    template, notes = Template(tokenizer(source("glm4moe"))), []
    (one,) = tokenized(tmp_path / "chats.jsonl", template, {"messages": talk("a", "b", "c", "d")}, notes=notes)
    assert with_loss(one, template) == ["\n<think></think>\nb<|user|>", "\n<think></think>\nd"]
    assert [note.partition(" that end")[0] for note in notes] == ["1 answers"]


@pytest.mark.parametrize(
    ("name", "row", "texts"),
    [
        (
            "qwen3",
            {"messages": talk("a", "b", "c", "d", reasoning_content="e")},
            ["<think>\ne\n</think>\n\nd<|im_end|>", "<think>\ne\n</think>\n\nb<|im_end|>"],
        ),
        ("mistral", {"messages": talk("a", "b", "c", "d"), "tools": [ADD]}, [" d</s>", " b</s>"]),
        ("gptoss", {"messages": talk("a", "b", "c", "d")}, [f"<|channel|>final<|message|>{x}<|return|>" for x in "db"]),
    ],
)
def test_an_answer_that_is_rendered_differently_when_messages_follow_has_its_own_sequence(
    tmp_path: Path, name: str, row: dict[str, Any], texts: list[str]
) -> None:
    template, notes = Template(tokenizer(source(name))), []
    found = tokenized(tmp_path / "chats.jsonl", template, row, notes=notes)
    assert [with_loss(one, template) for one in found] == [[text] for text in texts]
    assert [one.messages for one in found] == [4, 2]
    assert [
        note for note in notes if "1 answers that the chat template renders differently when messages follow" in note
    ]
    row["messages"][1]["train"] = False
    (one,) = tokenized(tmp_path / "chats.jsonl", template, row)
    assert with_loss(one, template) == texts[:1]


GENERATION = (
    "{%- generation %}\n            {{- message['content'] + '<|assistant_end|>' }}\n        {%- endgeneration %}"
)


@pytest.mark.parametrize(
    ("marks", "problem"),
    [
        ("{%- generation %}{{- message.content }}{% endgeneration %}{{- '<|assistant_end|>' }}", "the end of turn"),
        ("{{ message.content + '<|assistant_end|>' }}{% generation %}{% endgeneration %}", "a token of an answer"),
        ("{{ message.content[:3] }}{% generation %}{{ message.content[3:] + eos_token }}{% endgeneration %}",
         "a token of an answer"),
    ],
)  # fmt: skip
def test_marks_that_leave_out_what_must_carry_loss_are_refused(tmp_path: Path, marks: str, problem: str) -> None:
    text = base.TEMPLATE.read_text(encoding="utf-8")
    assert GENERATION in text
    template = Template(tokenizer(text.replace(GENERATION, marks)))
    with pytest.raises(UserError, match=f"row 1: the template's generation marks leave out {problem}"):
        tokenized(tmp_path / "chats.jsonl", template, {"messages": FOUR})


def test_marks_that_take_in_a_prompt_are_refused(tmp_path: Path) -> None:
    user = "{{- '<|user_start|>' + message['content'] + '<|user_end|>' }}"
    text = base.TEMPLATE.read_text(encoding="utf-8")
    assert user in text
    template = Template(tokenizer(text.replace(user, "{% generation %}" + user + "{% endgeneration %}")))
    with pytest.raises(
        UserError, match=r"row 1: the template's generation marks take in a token of a prompt \(token 1\)"
    ):
        tokenized(tmp_path / "chats.jsonl", template, {"messages": FOUR})


def test_every_token_of_a_marked_character_carries_loss(tmp_path: Path) -> None:
    answer = "{% generation %}{{ m.content }}{% endgeneration %}{% generation %}</s>{% endgeneration %}"
    text = "{% for m in messages %}{{ m.role }}: {% if m.role == 'user' %}{{ m.content }}{% else %}" + answer
    prompt = "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    template = Template(tokenizer(text + prompt))
    messages = talk("a", "你好")
    how = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    marked = template.tokenizer.apply_chat_template(messages, **how)["assistant_masks"]
    assert 0 in marked[marked.index(1) :]  # so transformers has it
    (one,) = tokenized(tmp_path / "chats.jsonl", template, {"messages": messages})
    assert with_loss(one, template) == ["你好</s>"]


def test_a_template_that_rewrites_the_prompt_of_an_answer_is_refused(tmp_path: Path) -> None:
    """Asked, the model sees another question than it was trained after."""
    text = "{% for m in messages %}{{ m.role }}: {{ m.content | upper if add_generation_prompt else m.content }}</s>"
    template = Template(tokenizer(text + "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"))
    with pytest.raises(UserError, match=r"row 1: the chat template renders a prompt differently .* \(message 2\)"):
        tokenized(tmp_path / "chats.jsonl", template, {"messages": talk("a", "b")})


def test_an_answer_without_an_end_is_told(tmp_path: Path) -> None:
    text = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template, notes = Template(tokenizer(text + "{% if add_generation_prompt %}assistant: {% endif %}")), []
    (one,) = tokenized(tmp_path / "chats.jsonl", template, {"messages": talk("a", "b")}, notes=notes)
    assert with_loss(one, template) == ["b\n"]
    assert notes == ["1 answers that end without a special token: the model is not trained to stop"]

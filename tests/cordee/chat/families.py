"""Chat templates as their makers ship them, from the installed TRL, each with a tiny tokenizer."""

import json
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

TEMPLATES = Path(next(iter(find_spec("trl").submodule_search_locations))) / "chat_templates"
TURNED = r"<start_of_turn>|<end_of_turn>|<end_of_utterance>|<turn\|>|<\|turn>|<channel\|>|<\|channel>"
SPECIAL = re.compile(rf"<\|\w+\|>|<\uff5c[^\uff5c]+\uff5c>|{TURNED}|\[/?(?:INST|AVAILABLE_TOOLS)\]")
TEXTS = (
    "What is the capital of France? The capital of France is Paris. Answer with a tool call, name and arguments.",
    "Tous les êtres humains naissent libres et égaux en dignité et en droits. Alle Menschen sind frei.",
)
MISTRAL = (
    "{%- set last = (messages | selectattr('role', 'equalto', 'user') | list)[-1] %}{{ bos_token }}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and m == last %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST] {{ m.content }}[/INST]{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
"""In the manner of Mistral's: no header before an answer, and tools before the last user message."""


def source(name: str) -> str:
    """A family's template."""
    return MISTRAL if name == "mistral" else (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


@cache
def tokenizer(template: str, **tokens: str) -> Any:
    """A byte-level tokenizer whose special tokens are those that the template spells out."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<pad>", *sorted(set(SPECIAL.findall(template)))]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400 + len(special), special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    given = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **tokens}
    fast = PreTrainedTokenizerFast(tokenizer_object=made, **given, extra_special_tokens=special[3:])
    fast.chat_template = template
    return fast


def write(path: Path, *rows: dict[str, Any]) -> Path:
    """Rows as JSON lines, or as Parquet by the file's name."""
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def talk(*texts: str, **answer: Any) -> list[dict[str, Any]]:
    """A chat in which user and assistant take turns; each answer has the further keys of `answer`."""
    roles = ("user", "assistant")
    return [
        {"role": roles[place % 2], "content": text, **(answer if place % 2 else {})} for place, text in enumerate(texts)
    ]


ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers",
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "number", "description": "one"}},
            "required": ["x"],
        },
    },
}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
TOOL_TALK = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "Two."},
]

"""Chat templates as their makers ship them, from the installed TRL, each with a tiny tokenizer."""

import json
import re
import string
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import stock_tokenizers

TEMPLATES = Path(next(iter(find_spec("trl").submodule_search_locations))) / "chat_templates"
SPECIAL = re.compile(
    r"<\|\w+\|?>|<\w+\|>|<\uff5c[^\uff5c]+\uff5c>|\[/?(?:INST|AVAILABLE_TOOLS)\]|\[gMASK\]|<sop>"
    r"|<start_of_turn>|<end_of_turn>|<end_of_utterance>"
)
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
def tokenizer(template: str, kind: str = "bytes", **tokens: str) -> Any:
    """A tokenizer whose special tokens are those that the template spells out.

    Its kind: `bytes`, byte-level BPE; `trimmed`, the same with offsets that leave out blanks, as Llama 3's; `prefixed`,
    pieces with a blank in front of each text between special tokens, as Llama 2's; `metaspace`, pieces with a blank in
    front of the first alone; `unigram`; `stripping`, special tokens that take the blanks behind them, as Phi-3's.
    """
    from tokenizers import AddedToken, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<pad>", *sorted(set(SPECIAL.findall(template)))]
    prefix = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if kind in ("bytes", "trimmed"):
        made = byte_level(special)
        if kind == "trimmed":
            made.post_processor = processors.ByteLevel(trim_offsets=True)
    elif kind == "unigram":
        made = unigram(special)
    elif kind == "metaspace":
        pre = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        made = stock_tokenizers.pieces(["<unk>", *special], None, pre)
    else:
        made = stock_tokenizers.pieces(["<unk>", *special[: 3 if kind == "stripping" else None]], prefix)
        made.add_special_tokens([AddedToken(token, rstrip=True, normalized=False, special=True) for token in special])
    given = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **tokens}
    fast = PreTrainedTokenizerFast(tokenizer_object=made, **given, extra_special_tokens=special[3:])
    fast.chat_template = template
    return fast


def byte_level(special: list[str]) -> Any:
    """Byte-level BPE of few merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400 + len(special),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    return made


def unigram(special: list[str]) -> Any:
    """A unigram model over pieces."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=160, special_tokens=["<unk>", *special], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(
        [*TEXTS, string.ascii_letters, "0123456789 <think></think> {}[]():;\"'_/\n" + "你好"], trainer
    )
    return made


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


def parts(*texts: str, **answer: Any) -> list[dict[str, Any]]:
    """The same with each text as a list of one part; of a text with a bar, two."""
    return [
        {**message, "content": [{"type": "text", "text": text} for text in message["content"].split("|")]}
        for message in talk(*texts, **answer)
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

"""Chats with checkable answers, and a tokenizer, small enough for tests."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SPECIAL = (
    "<s>",
    "</s>",
    "<pad>",
    *(f"<|{role}_{side}|>" for role in ("system", "user", "assistant") for side in ("start", "end")),
)
LANGUAGES = {"deu": "German", "fra": "French", "ita": "Italian", "roh": "Romansh"}
TEXTS = {
    "deu": "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "fra": "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
    "ita": "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti.",
    "roh": "Tuots umans naschan libers ed eguals in dignità e drets.",
}


def chat(question: str, answer: str, **system: str) -> list[dict[str, str]]:
    """A chat of one turn, with a system message where one is given."""
    head = [{"role": "system", "content": system["system"]}] if system else []
    return [*head, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def some_chats(count: int) -> list[list[dict[str, str]]]:
    """Chats of different lengths: which language is this?"""
    tags = list(TEXTS)
    return [
        chat(f"Which language is this?\n\n{(TEXTS[tags[n % 4]] * 2)[n % 7 : 30 + n % 50]}", LANGUAGES[tags[n % 4]])
        for n in range(count)
    ]


def write_parquet(path: Path, chats: list) -> Path:
    pq.write_table(pa.table({"messages": chats}), path)
    return path


def write_lines(path: Path, chats: list) -> Path:
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats), encoding="utf-8")
    return path


def make_tokenizer(folder: Path, template: str) -> None:
    """A byte-level BPE tokenizer with the project's special tokens, trained on a few lines."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TEXTS.values(), *LANGUAGES.values()], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=list(SPECIAL[3:]),
    )
    fast.chat_template = template
    fast.save_pretrained(folder)

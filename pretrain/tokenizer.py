"""Trains a byte-level BPE tokenizer on a corpus's training split.

    python -m pretrain.tokenizer --config tokenizer.yaml

Any text can be encoded and comes back unchanged: all 256 bytes are tokens, and nothing is normalized.
Encoding puts `<s>` in front unless `add_special_tokens=False`; a rendered chat holds its own `<s>`.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from cordee import worker
from cordee.chat import base
from cordee.config import Config as BaseConfig
from cordee.config import Input
from cordee.cost import Cost
from cordee.errors import UserError
from cordee.files import write_json, write_text
from cordee.stage import Context

VERSION = 1
SPECIAL_TOKENS = ["<s>", "</s>", "<pad>", *base.TURN_TOKENS]
SMALLEST = len(SPECIAL_TOKENS) + 256

WORD = r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}\x{200C}\x{200D}]+"
PIECES = WORD + r"|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""What text is cut into before merging: Llama 3's expression, with digits one by one, and with vowel signs (\\p{M})
and joiners kept in their words (Indic scripts, Thai, Arabic)."""


class Config(BaseConfig):
    """What it learns from, and how many tokens it has."""

    corpus: Input
    """A corpus; only its `train.parquet` is learnt from."""
    vocab_size: int = Field(ge=SMALLEST)
    """Tokens in the vocabulary, the special ones and the 256 bytes included."""


def cost(config: Config, given: dict[str, Cost]) -> Cost:
    """The vocabulary is what was asked for."""
    corpus = given.get("corpus", Cost())
    return Cost(tokens=corpus.tokens, rows=corpus.rows, vocab_size=config.vocab_size)


def run(config: Config, context: Context) -> dict[str, Any]:
    """Write `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    from pretrain.data.encoding import bytes_per_token
    from pretrain.data.reading import split_file

    train, heldout = split_file(config.corpus, "train"), split_file(config.corpus, "heldout")
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PIECES), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=2,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(train, context), trainer)
    if (learnt := tokenizer.get_vocab_size()) != config.vocab_size:
        problem = f"the corpus has only {learnt - SMALLEST} merges, so at most {learnt} tokens, not {config.vocab_size}"
        raise UserError(problem, file=config.corpus, key="vocab_size")
    bos = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [bos])
    context.out.mkdir(parents=True, exist_ok=True)
    write_text(context.out / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_json(context.out / "tokenizer_config.json", _config())
    shutil.copyfile(base.TEMPLATE, context.out / base.TEMPLATE.name)
    return {"vocab_size": learnt, "bytes_per_token": bytes_per_token(context.out, heldout)}


def _texts(train: Path, context: Context) -> Iterator[list[str]]:
    """The training texts in batches, with progress."""
    from pretrain.data.reading import batches, num_rows, texts

    total, done = num_rows(train), 0
    for batch in batches(texts(train)):
        context.stop_if_asked(f"document {done} of {total}")
        yield batch
        done += len(batch)
        context.progress(done, total, "documents")


def _config() -> dict[str, Any]:
    """What `AutoTokenizer` needs; the class and the keys are those that transformers 4 and 5 both know."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "additional_special_tokens": SPECIAL_TOKENS[3:],
        "clean_up_tokenization_spaces": False,
    }


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()

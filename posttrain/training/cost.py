"""What a training with TRL will cost, from its config and the beginning of its data: rows, tokens, FLOPs, memory."""

from collections.abc import Mapping
from dataclasses import replace

from cordee import model_folder
from cordee.chat.source import BadRows, Of, Source
from cordee.cost import Cost, training_flops
from cordee.memory import Decoder
from posttrain.training import memory
from posttrain.training.settings import EPOCHS, TrlConfig

BYTES_PER_TOKEN = 3.0
"""Bytes of a chat in a token, where only a guess is possible: before it is read."""
OF_PAIRS = f"guessed at {BYTES_PER_TOKEN:.0f} bytes each, and a whole pair for either answer"
"""How a plan counts the tokens of pairs; once they are read, the prompt counts twice, and each answer once."""
LOOKED_AT = 20
"""Rows that a plan looks at."""
FORWARD = 2 / 6
"""Work of a forward through all weights, in units of one forward and backward (2 + 4 FLOPs a parameter)."""


def data_cost(config: TrlConfig, given: Mapping[str, Cost], of: Of) -> Cost:
    """Rows that all steps see and the tokens in them, with each source as often as its `weight` says.

    Args:
        config: the stage's config.
        given: the costs of its inputs.
        of: what a row has to be.

    Raises:
        UserError: the beginning of a source shows that it can't be used.
    """
    parts = [
        (source_cost(source, f"data.{place}.path", given, of, config.bad_rows), source.weight)
        for place, source in enumerate(config.data)
    ]

    def total(counts: list[float | None]) -> float | None:
        known = [count * weight for count, (_, weight) in zip(counts, parts, strict=True) if count is not None]
        return sum(known) if len(known) == len(counts) else None

    rows, tokens = total([part.rows for part, _ in parts]), total([part.tokens for part, _ in parts])
    steps, epochs = int(config.trainer.get("max_steps", -1)), float(config.trainer.get("num_train_epochs", EPOCHS))
    if steps <= 0:
        return Cost(rows=None if rows is None else rows * epochs, tokens=None if tokens is None else tokens * epochs)
    seen = float(steps * config.global_batch_size)
    return Cost(rows=seen, tokens=seen * tokens / rows if rows and tokens is not None else None)


def source_cost(source: Source, key: str, given: Mapping[str, Cost], of: Of, bad_rows: BadRows) -> Cost:
    """Rows and tokens of a source: what its beginning tells, or the stage that will make it.

    Raises:
        UserError: the beginning shows that it can't be used.
    """
    from cordee.chat import formats
    from cordee.chat.selection import files_of
    from cordee.data import rows

    if not source.path.exists():
        return given.get(key, Cost())
    found = files_of(source).documents
    if bad_rows == "error":
        formats.require_known(next(rows.batches(found, LOOKED_AT, key), []), source, of)
    names = {old for old, new in source.columns.items() if new in formats.COLUMNS}
    count, text_bytes = rows.estimate(found, key, names | formats.COLUMNS)
    kept = min(count, source.limit or count)
    return Cost(rows=kept, tokens=text_bytes / BYTES_PER_TOKEN * kept / max(count, 1.0))


def passes(config: TrlConfig) -> float:
    """Work per token, in units of one forward and backward through all weights.

    With an adapter the frozen weights need no gradient of their own.
    """
    return 1.0 - FORWARD if config.trains_adapter else 1.0


def preference_cost(
    config: TrlConfig, given: Mapping[str, Cost], of: Of, *, has_reference: bool = False, has_kl: bool = False
) -> Cost:
    """What training on answers costs at most: on all tokens of rows that are within `max_length`.

    Args:
        config: the stage's config.
        given: the costs of its inputs.
        of: what a row has to be; a pair is two sequences.
        has_reference: whether a reference reads each answer once.
        has_kl: whether model and reference read as many answers to other prompts.

    Raises:
        UserError: the data or the model can't be used.
    """
    seen = data_cost(config, given, of)
    in_row = seen.tokens / seen.rows if seen.rows and seen.tokens else config.longest  # no less than in a sequence
    sides = 2 if of == "pairs" else 1
    tokens = float(sides) * seen.rows * min(in_row, config.longest) if seen.rows else None
    epochs = 1.0 if config.trainer.get("max_steps", -1) > 0 else float(config.trainer.get("num_train_epochs", EPOCHS))
    once = (tokens or 0.0) / max(epochs, 1.0)
    forward = (once if has_reference else 0.0) + (once + (tokens or 0.0) if has_kl else 0.0)
    return training_cost(config, given, tokens, forward, sequences=sides)


def training_cost(
    config: TrlConfig,
    given: Mapping[str, Cost],
    tokens: float | None,
    forward_tokens: float = 0.0,
    *,
    sequences: int = 1,
    logit_bytes: float | None = None,
) -> Cost:
    """What training on `tokens` tokens costs.

    Args:
        config: the stage's config.
        given: the costs of its inputs; "model" is the one that matters.
        tokens: tokens over all epochs; None where they are not known yet.
        forward_tokens: tokens that are only read, by the model or by a reference.
        sequences: how many are in a row, each of at most `max_length` tokens.
        logit_bytes: for each token and each entry of the vocabulary, where all logits are held at once.

    Raises:
        UserError: the model is neither made by a stage nor a model folder.
    """
    if config.model.is_dir():
        config.require_adapter_choice()
    base = model_folder.cost(config.model, "model", given, base=config.base, base_key="base")
    decoder = base.decoder or _decoder(config)
    needed = memory.of(config, decoder, sequences, logit_bytes=logit_bytes) if decoder else None
    cost = Cost(
        tokens=tokens,
        tokens_by=OF_PAIRS if sequences > 1 and tokens else "",
        parameters=base.parameters,
        vocab_size=base.vocab_size,
        memory_bytes=needed.total if needed else None,
        memory=needed,
        decoder=decoder,
    )
    if tokens is None or base.parameters is None:
        return cost
    layers, width = (decoder.layers, decoder.width) if decoder else (0, 0)
    flops = [
        training_flops(base.parameters, count, layers, width, config.longest) for count in (tokens, forward_tokens)
    ]
    return replace(cost, flops=passes(config) * flops[0] + FORWARD * flops[1])


def _decoder(config: TrlConfig) -> Decoder | None:
    """The sizes of a model whose stage is done; None where it is not there yet."""
    if not ((config.model / "config.json").is_file() or model_folder.is_adapter(config.model)):
        return None
    return model_folder.cost(config.model, "model", {}, base=config.base, base_key="base").decoder

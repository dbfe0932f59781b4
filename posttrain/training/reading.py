"""Reads a stage's data: sources in tokens, the sequences to train on, and those that are held out."""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cordee import files
from cordee.chat import repeats
from cordee.chat.source import Of, Rules
from cordee.chat.tokenized import Tokenized, tokenize
from cordee.compute.model import sequence_limits
from cordee.errors import UserError
from cordee.stage import Context
from posttrain.training import sequences
from posttrain.training.sequences import Sequences
from posttrain.training.settings import TrlConfig

ROWS = "rows.json"
T = TypeVar("T")


def read(
    config: TrlConfig,
    of: Of,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    context: Context,
    one: Callable[[Tokenized, int], T],
) -> tuple[Sequences[T], Sequences[T]]:
    """The data of a stage in tokens, and what is held out; the main process makes what is not in the cache.

    `rows.json` says what was read, and what was left out.

    Args:
        config: the stage's config.
        of: what the rows are.
        model: limits the ids and the positions.
        tokenizer: renders and encodes.
        max_length: tokens of the longest sequence.
        context: where to write and to report.
        one: gives a sequence by its place.

    Raises:
        UserError: rows can't be used, or the weights leave none.
    """
    context.waits("the data")
    rules = Rules(sequence_limits(model, max_length), config.bad_rows, config.overlong, config.earlier_answers)
    cache = context.cache / "sequences"
    apart = config.heldout if isinstance(config.heldout, list) else []
    with PartialState().main_process_first():
        parts, others = (
            tuple(tokenize(of, tokenizer, source, rules, context, cache) for source in sources)
            for sources in (config.data, apart)
        )
    for line in repeats.lines(of, [part.told() for part in parts]):
        context.note(line)
    share = config.heldout if isinstance(config.heldout, float) else 0.0
    found, heldout = sequences.split(parts, [source.weight for source in config.data], share, context.seed, one)
    if apart:
        heldout, _ = sequences.split(others, [source.weight for source in apart], 0.0, context.seed, one)
        if known := int(np.isin(heldout.texts(), found.texts()).sum()):
            context.note(f"{known} of {len(heldout)} held-out sequences are trained on too")
    if not len(found):
        raise UserError("the weights leave no row", key="data")
    if share and not len(heldout):
        hint = "such rows are held out together; leave the key out, or name others by `heldout: [{path: FILE}]`"
        raise UserError(f"all {len(found)} rows have the same prompt", key="heldout", hint=hint)
    if context.is_main:
        told = [
            {"path": str(source.path), **part.report}
            for source, part in zip([*config.data, *apart], [*parts, *others], strict=True)
        ]
        files.write_json(context.out / ROWS, {"sources": told})
    if len(heldout):
        context.note(f"{len(heldout)} sequences are held out, {len(found)} are trained on")
    return found, heldout

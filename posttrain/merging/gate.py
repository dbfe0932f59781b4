"""The checks of a merge: what scores the same sequences, and how far the saved model may be from the one in memory."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from cordee import model_folder
from cordee.chat import conversations
from cordee.chat.templates import Template
from cordee.compute import device
from cordee.compute.logprobs import Difference, Scores, score
from cordee.compute.model import sequence_limits
from cordee.compute.tokenizer import PROBE, difference, open_tokenizer
from cordee.errors import Fault, UserError
from cordee.model_folder import ModelInput
from cordee.stage import Context
from posttrain.merging.settings import MergeConfig

SPECIAL = ("chat_template", "eos_token", "pad_token", "bos_token")
"""What of a tokenizer an adapter may differ from its base's."""


def scores(
    config: MergeConfig, context: Context, model: PreTrainedModel, sequences: list[list[int]], done: int, of: int = 4
) -> list[Scores]:
    """What a model says of the sequences; `done` checks of so many were made before."""
    context.stop_if_asked(f"check {done} of {of}")
    context.progress(done, of, "checks")
    return score(model.to(device.default()), sequences, batch_size=config.batch_size)


def figures(again: PreTrainedModel, sequences: list[list[int]], passes: int, limit: float) -> dict[str, Any]:
    """What the manifest says of the model that was saved."""
    return {
        "parameters": sum(weights.numel() for weights in again.parameters()),
        "vocab_size": model_folder.shape(again.config.to_dict()).vocab_size,
        "rows": len(sequences),
        "tokens": passes * sum(len(sequence) for sequence in sequences),
        "tolerance_nats": limit,
    }


def saved(found: Difference) -> dict[str, float]:
    """How far the model that was saved is from the one in memory."""
    return {
        "saved_max_abs_delta_logprob": found.largest,
        "saved_mean_abs_delta_logprob": found.mean,
        "saved_top1_agreement": found.top1,
    }


def sequences(config: MergeConfig, model: PreTrainedModel, tokenizer: Path) -> list[list[int]]:
    """The token ids that are scored: of the conversations that were given, or of texts of ours."""
    opened, limits = open_tokenizer(tokenizer), sequence_limits(model, None)
    if config.prompts is not None:
        return [ids for _, ids in conversations.first(config.prompts, config.rows, Template(opened), limits)]
    encoded = [opened(text)["input_ids"][: limits.positions] for text in PROBE]
    return [ids for ids in encoded if len(ids) > 1]


def check(config: MergeConfig, what: str, distance: float, limit: float, found: Difference) -> None:
    """End in a fault where log-probabilities differ by more than the limit."""
    if not distance <= limit:
        compared = "base and adapter" if config.parts else "the average"
        raise Fault(
            f"{what}, it differs from {compared} by {distance:.3g} nats, more than {limit:g} (mean "
            f"{found.mean:.3g}, largest {found.largest:.3g}; {found.top1:.2%} of the most likely tokens agree)",
            file=config.adapter,
            key="tolerance",
        )


def tokenizer(adapters: list[ModelInput], base: Path, context: Context) -> Path:
    """The folder whose tokenizer the merged model has: the base's, or that of the first adapter that differs from it.

    Raises:
        UserError: an adapter's encodes differently: it was trained on other token ids.
    """
    found = base
    for adapter in adapters:
        if not (adapter / "tokenizer.json").is_file():
            continue
        if not (base / "tokenizer.json").is_file():
            return adapter
        if problem := difference(adapter, base):
            raise UserError(f"encodes differently from {base}: {problem}", file=adapter, key="adapter")
        theirs, ours = open_tokenizer(adapter), open_tokenizer(base)
        differing = [name for name in SPECIAL if getattr(theirs, name) not in (None, getattr(ours, name))]
        differing += ["tokens"] if len(theirs) > len(ours) else []
        if not differing or found != base:
            continue
        context.note(f"the adapter was trained with another tokenizer than {base} has, and is merged with it: its "
                     f"{', '.join(differing)}")  # fmt: skip
        found = adapter
    return found

"""Merge a LoRA adapter into its base: a plain Hugging Face directory, checked against base and adapter apart.

    python -m posttrain.merge --config FILE [key=value …]

All three (base with adapter, merged, merged and opened again from the disk) score the same prompts in float32, so
that what differs is the weights and not the arithmetic of a device.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from cordee import model_folder, worker
from cordee.config import Config as StageConfig
from cordee.config import Execution, Input
from cordee.cost import Cost
from cordee.errors import Fault, UserError
from cordee.model_folder import ModelInput
from cordee.stage import Context

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cordee.compute.logprobs import Difference, Scores


VERSION = 4
OWN_TEXTS_TOKENS = 300
"""About how many tokens the texts have that are scored where no prompts are given."""
SPECIAL = ("chat_template", "eos_token", "pad_token", "bos_token")
"""What of a tokenizer an adapter may differ from its base's."""


class Config(StageConfig):
    """What is merged, and what it is checked on."""

    adapter: ModelInput
    """The LoRA adapter (`$dpo`)."""
    model: Input | None = None
    """The model that it was trained on (`$sft`); by default the one that the adapter's config names."""
    prompts: Input | None = None
    """Real conversations to compare on, parquet or JSON lines: column `messages`, or `prompt` and `chosen`; by default
    a few texts of many scripts."""
    rows: int = Field(default=32, ge=1)
    """The first so many conversations are scored; at least 1."""
    tolerance: float | None = Field(default=None, gt=0)
    """How far the merged model may be from base and adapter, in nats: of float32 weights the largest difference of a
    token's log-probability (0.001 if not given), of float16 and bfloat16, which round, the mean (0.01, 0.1)."""
    batch_size: Execution[int] = Field(default=8, ge=1)
    """Conversations that are scored at once."""


def cost(config: Config, given: Mapping[str, Cost]) -> Cost:
    """Four passes over the prompts; the weights twice in float32 (one layer's delta apart)."""
    if config.model is not None:
        base = model_folder.cost(config.model, "model", given)
    else:
        base = model_folder.cost(config.adapter, "adapter", given, base_key="model")
    tokens = 4.0 * (config.rows * 1024 if config.prompts is not None else OWN_TEXTS_TOKENS)
    if base.parameters is None:
        return Cost(tokens=tokens)
    return Cost(
        tokens=tokens,
        flops=2.0 * base.parameters * tokens,
        parameters=base.parameters,
        memory_bytes=8.0 * base.parameters + 0.6e9,
        vocab_size=base.vocab_size,
        decoder=base.decoder,
    )


def run(config: Config, context: Context) -> dict[str, Any]:
    """Merge, compare, save, open again, compare."""
    from cordee.compute import adapter, device
    from cordee.compute.logprobs import MERGE_LIMIT, compare, score
    from cordee.compute.model import open_model, remarks, save_model, tables_are_one
    from posttrain.training import adapters

    folder = model_folder.base_of(config.adapter, config.model, key="adapter", base_key="model")
    tokenizer = _tokenizer(config.adapter, folder, context)
    for remark in remarks(folder, tokenizer):
        context.note(remark)
    base = open_model(folder, key="model").eval()
    stored = base.dtype
    base = base.float()
    sequences = _sequences(config, base, tokenizer)
    dtype = str(stored).removeprefix("torch.")
    limit = config.tolerance or MERGE_LIMIT[dtype]

    def scores(model: "PreTrainedModel", done: int) -> "list[Scores]":
        context.stop_if_asked(f"check {done} of 4")
        context.progress(done, 4, "checks")
        return score(model.to(device.default()), sequences, batch_size=config.batch_size)

    adapter.fit_tables(config.adapter, base, folder, "adapter")
    was_one = tables_are_one(base)
    alone = scores(base, 0)
    adapted = adapters.open_adapter(config.adapter, base, folder)
    apart = scores(adapted, 1)
    effect = compare(alone, apart).largest
    if effect == 0:
        context.note("the adapter has no effect: merged and base are the same model")
    merged = adapters.merge(adapted)
    if was_one and not tables_are_one(merged):
        context.note("the adapter changes the embedding or the head alone: merged, they are two (tie_word_embeddings)")
    exact = limit if dtype == "float32" else MERGE_LIMIT["float32"]
    in_memory = compare(apart, scores(merged, 2))
    _check(config, "merged in memory", in_memory.largest, exact, in_memory)
    save_model(merged.to(dtype=stored), context.out, tokenizer=tokenizer, base=folder, chats=True)
    del merged, adapted, base
    again = open_model(context.out).eval()
    on_disk = compare(apart, scores(again.float(), 3))
    _check(config, "saved and opened again", on_disk.merged(dtype), limit, on_disk)
    if effect and on_disk.mean >= compare(alone, apart).mean:
        context.note(
            f"rounding to {dtype} moves log-probabilities by {on_disk.mean:.3g} nats, more than the adapter does"
        )
    context.progress(4, 4, "checks")
    return {
        "parameters": sum(weights.numel() for weights in again.parameters()),
        "vocab_size": model_folder.shape(again.config.to_dict()).vocab_size,
        "rows": len(sequences),
        "tokens": 4 * sum(len(sequence) for sequence in sequences),
        "dtype": dtype,
        "tolerance_nats": limit,
        "adapter_effect_nats": effect,
        "merged_max_abs_delta_logprob": in_memory.largest,
        "saved_max_abs_delta_logprob": on_disk.largest,
        "saved_mean_abs_delta_logprob": on_disk.mean,
        "saved_top1_agreement": on_disk.top1,
    }


def _sequences(config: Config, model: "PreTrainedModel", tokenizer: Path) -> list[list[int]]:
    """The token ids that are scored: of the conversations that were given, or of texts of ours."""
    from cordee.chat import conversations
    from cordee.chat.templates import Template
    from cordee.compute.model import sequence_limits
    from cordee.compute.tokenizer import PROBE, open_tokenizer

    opened, limits = open_tokenizer(tokenizer), sequence_limits(model, None)
    if config.prompts is not None:
        return [ids for _, ids in conversations.first(config.prompts, config.rows, Template(opened), limits)]
    encoded = [opened(text)["input_ids"][: limits.positions] for text in PROBE]
    return [ids for ids in encoded if len(ids) > 1]


def _check(config: Config, what: str, distance: float, limit: float, found: "Difference") -> None:
    """End in a fault where log-probabilities differ by more than the limit."""
    if not distance <= limit:
        raise Fault(
            f"{what}, it differs from base and adapter by {distance:.3g} nats, more than {limit:g} (mean "
            f"{found.mean:.3g}, largest {found.largest:.3g}; {found.top1:.2%} of the most likely tokens agree)",
            file=config.adapter,
            key="tolerance",
        )


def _tokenizer(adapter: Path, base: Path, context: Context) -> Path:
    """The folder whose tokenizer the merged model has: the base's, or the adapter's where that differs.

    Raises:
        UserError: the adapter's encodes differently: it was trained on other token ids.
    """
    from cordee.compute.tokenizer import difference, open_tokenizer

    if not (adapter / "tokenizer.json").is_file():
        return base
    if not (base / "tokenizer.json").is_file():
        return adapter
    if problem := difference(adapter, base):
        raise UserError(f"encodes differently from {base}: {problem}", file=adapter, key="adapter")
    theirs, ours = open_tokenizer(adapter), open_tokenizer(base)
    differing = [name for name in SPECIAL if getattr(theirs, name) not in (None, getattr(ours, name))]
    differing += ["tokens"] if len(theirs) > len(ours) else []
    if not differing:
        return base
    context.note(f"the adapter was trained with another tokenizer than {base} has, and is merged with it: its "
                 f"{', '.join(differing)}")  # fmt: skip
    return adapter


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()

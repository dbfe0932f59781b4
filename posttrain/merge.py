"""Merge a LoRA adapter into its base: a plain Hugging Face directory, checked against base and adapter apart.

    python -m posttrain.merge --config FILE [key=value …]

All three (base with adapter, merged, merged and opened again from the disk) score the same prompts in float32, so
that what differs is the weights and not the arithmetic of a device.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from cordee import model_folder, worker
from cordee.config import Config as StageConfig
from cordee.config import Execution, Input
from cordee.cost import Cost
from cordee.errors import Fault, UserError
from cordee.stage import Context

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cordee.compute.logprobs import Scores


VERSION = 1


class Config(StageConfig):
    """What is merged, and what it is checked on."""

    adapter: Input
    """The LoRA adapter (`$dpo`)."""
    model: Input
    """The model that it was trained on (`$sft`)."""
    prompts: Input
    """Real conversations, parquet or JSON lines: column `messages`, or `prompt` and `chosen`."""
    rows: int = Field(default=32, ge=1)
    """The first so many conversations are scored; at least 1."""
    tolerance: float | None = Field(default=None, gt=0)
    """Largest difference of a token's log-probability, in nats; none: 0.001 for float32 weights, 0.02 for float16,
    0.2 for bfloat16."""
    batch_size: Execution[int] = Field(default=8, ge=1)
    """Conversations that are scored at once."""


def cost(config: Config, given: Mapping[str, Cost]) -> Cost:
    """Four passes over the prompts; the weights twice in float32 (one layer's delta apart)."""
    base = model_folder.cost(config.model, "model", given)
    tokens = 4.0 * config.rows * 1024
    if base.parameters is None:
        return Cost(tokens=tokens)
    return Cost(
        tokens=tokens,
        flops=2.0 * base.parameters * tokens,
        parameters=base.parameters,
        memory_bytes=8.0 * base.parameters + 0.6e9,
        vocab_size=base.vocab_size,
    )


def run(config: Config, context: Context) -> dict[str, Any]:
    """Merge, compare, save, open again, compare."""
    from cordee.chat import conversations
    from cordee.chat.templates import Template
    from cordee.compute import device
    from cordee.compute.logprobs import MERGE_LIMIT, score
    from cordee.compute.model import open_model, remarks, save_model, sequence_limits
    from cordee.compute.tokenizer import open_tokenizer
    from posttrain import adapters

    tokenizer = open_tokenizer(config.model, key="model")
    _require_same_tokenizer(config)
    for remark in remarks(config.model):
        context.note(remark)
    base = open_model(config.model, key="model").eval()
    stored = base.dtype
    base = base.float()
    found = conversations.first(config.prompts, config.rows, Template(tokenizer), sequence_limits(base, None))
    sequences = [ids for _, ids in found]
    dtype = str(stored).removeprefix("torch.")
    limit = config.tolerance or MERGE_LIMIT[dtype]

    def scores(model: "PreTrainedModel", done: int) -> "list[Scores]":
        if context.stop_requested():
            context.stop(f"check {done} of 4")
        context.progress(done, 4, "checks")
        return score(
            model.to(device.default()), sequences, batch_size=config.batch_size, pad_token_id=tokenizer.pad_token_id
        )

    alone = scores(base, 0)
    adapted = adapters.open_adapter(config.adapter, base, config.model)
    apart = scores(adapted, 1)
    effect = _compare(alone, apart)["max"]
    if effect == 0:
        context.note("the adapter has no effect: merged and base are the same model")
    merged = adapted.merge_and_unload(safe_merge=True)
    exact = limit if dtype == "float32" else MERGE_LIMIT["float32"]
    in_memory = _check(config, "merged in memory", (apart, scores(merged, 2)), exact)
    save_model(merged.to(dtype=stored), context.out, tokenizer=config.model, chats=True)
    del merged, adapted, base
    again = open_model(context.out).eval()
    on_disk = _check(config, "saved and opened again", (apart, scores(again.float(), 3)), limit)
    context.progress(4, 4, "checks")
    return {
        "parameters": sum(weights.numel() for weights in again.parameters()),
        "vocab_size": again.config.vocab_size,
        "rows": len(sequences),
        "tokens": 4 * sum(len(sequence) for sequence in sequences),
        "dtype": dtype,
        "tolerance_nats": limit,
        "adapter_effect_nats": effect,
        "merged_max_abs_delta_logprob": in_memory["max"],
        "saved_max_abs_delta_logprob": on_disk["max"],
        "saved_mean_abs_delta_logprob": on_disk["mean"],
        "saved_top1_agreement": on_disk["top1"],
    }


def _check(config: Config, what: str, scored: "tuple[list[Scores], list[Scores]]", limit: float) -> dict[str, float]:
    """Compare, and end in a fault where a token's log-probability differs by more than the limit."""
    found = _compare(*scored)
    if not found["max"] <= limit:
        raise Fault(
            f"{what}, it differs from base and adapter by up to {found['max']:.3g} nats, more than {limit:g}, and "
            f"{found['top1']:.2%} of the most likely tokens agree",
            file=config.adapter,
            key="tolerance",
        )
    return found


def _compare(apart: "list[Scores]", other: "list[Scores]") -> dict[str, float]:
    """The largest and the mean difference of log-probabilities, in nats, and the share of equal top-1 tokens."""
    import torch

    pairs = list(zip(apart, other, strict=True))
    differences = torch.cat([(one.logprobs - two.logprobs).abs() for one, two in pairs])
    same = torch.cat([one.top1 == two.top1 for one, two in pairs])
    return {"max": differences.max().item(), "mean": differences.mean().item(), "top1": same.double().mean().item()}


def _require_same_tokenizer(config: Config) -> None:
    """Refuse an adapter that was trained on another tokenizer than its base has."""
    for name in ("tokenizer.json", "chat_template.jinja"):
        theirs, ours = config.adapter / name, config.model / name
        if theirs.is_file() and (not ours.is_file() or theirs.read_bytes() != ours.read_bytes()):
            raise UserError(f"differs from {ours}", file=theirs, key="adapter")


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()

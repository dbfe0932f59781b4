"""Merge a LoRA adapter, or several, into their base, or average models: a plain Hugging Face directory, checked.

    python -m posttrain.merge --config FILE [key=value …]

All three (base with adapter, merged, merged and opened again from the disk) score the same prompts in float32, so
that what differs is the weights and not the arithmetic of a device. Sums and averages are compared with float64 too.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cordee import model_folder, worker
from cordee.cost import Cost
from cordee.stage import Context
from posttrain.merging.settings import MergeConfig

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

VERSION = 4
OWN_TEXTS_TOKENS = 300
"""About how many tokens the texts have that are scored where no prompts are given."""


class Config(MergeConfig):
    """What is merged, and what it is checked on: an adapter, several, or models of one shape."""


def cost(config: Config, given: Mapping[str, Cost]) -> Cost:
    """Four passes over the prompts, of models two; the weights twice in float32 (one layer's delta apart)."""
    passes, copies = (4.0, 8.0) if config.parts else (2.0, 12.0)
    if config.model is not None:
        base = model_folder.cost(config.model, "model", given)
    elif config.adapter is not None:
        base = model_folder.cost(config.adapter, "adapter", given, base_key="model")
    elif config.checkpoints is not None:
        base = model_folder.cost(config.checkpoints, "checkpoints", given)
    else:
        key = "adapters" if config.adapters else "models"
        path = (config.adapters or config.models)[0].path
        base = model_folder.cost(path, f"{key}.0.path", given, base_key="model" if config.adapters else None)
    tokens = passes * (config.rows * 1024 if config.prompts is not None else OWN_TEXTS_TOKENS)
    if base.parameters is None:
        return Cost(tokens=tokens)
    return Cost(
        tokens=tokens,
        flops=2.0 * base.parameters * tokens,
        parameters=base.parameters,
        memory_bytes=copies * base.parameters + 0.6e9,
        vocab_size=base.vocab_size,
        decoder=base.decoder,
    )


def run(config: Config, context: Context) -> dict[str, Any]:
    """Merge, compare, save, open again, compare."""
    return _adapted(config, context) if config.parts else _averaged(config, context)


def _adapted(config: Config, context: Context) -> dict[str, Any]:
    """Merge an adapter, or what several are combined to, into their base."""
    from cordee.compute import adapter
    from cordee.compute.logprobs import MERGE_LIMIT, compare
    from cordee.compute.model import open_model, remarks, save_model, tables_are_one
    from posttrain.merging import gate
    from posttrain.training import adapters

    parts, folder = config.parts, _base(config)
    tokenizer = gate.tokenizer([part.path for part in parts], folder, context)
    for remark in remarks(folder, tokenizer):
        context.note(remark)
    base = open_model(folder, key="model").eval()
    stored = base.dtype
    base = base.float()
    sequences = gate.sequences(config, base, tokenizer)
    dtype = str(stored).removeprefix("torch.")
    limit = config.tolerance or MERGE_LIMIT[dtype]
    for part in parts:
        adapter.fit_tables(part.path, base, folder, "adapter")
    was_one = tables_are_one(base)
    alone = gate.scores(config, context, base, sequences, 0)
    adapted, told = _opened(config, context, base, folder)
    apart = gate.scores(config, context, adapted, sequences, 1)
    effect = compare(alone, apart).largest
    if effect == 0:
        context.note("the adapter has no effect: merged and base are the same model")
    merged = adapters.merge(adapted)
    if was_one and not tables_are_one(merged):
        context.note("the adapter changes the embedding or the head alone: merged, they are two (tie_word_embeddings)")
    exact = limit if dtype == "float32" else MERGE_LIMIT["float32"]
    in_memory = compare(apart, gate.scores(config, context, merged, sequences, 2))
    gate.check(config, "merged in memory", in_memory.largest, exact, in_memory)
    save_model(merged.to(dtype=stored), context.out, tokenizer=tokenizer, base=folder, chats=True)
    del merged, adapted, base
    again = open_model(context.out).eval()
    figures = gate.figures(again, sequences, 4, limit)
    on_disk = compare(apart, gate.scores(config, context, again.float(), sequences, 3))
    gate.check(config, "saved and opened again", on_disk.merged(dtype), limit, on_disk)
    if effect and on_disk.mean >= compare(alone, apart).mean:
        context.note(
            f"rounding to {dtype} moves log-probabilities by {on_disk.mean:.3g} nats, more than the adapter does"
        )
    context.progress(4, 4, "checks")
    return {
        **figures,
        "dtype": dtype,
        "adapter_effect_nats": effect,
        "merged_max_abs_delta_logprob": in_memory.largest,
        **gate.saved(on_disk),
        **told,
    }


def _averaged(config: Config, context: Context) -> dict[str, Any]:
    """Average models of one shape, weight by weight."""
    from cordee.compute.logprobs import MERGE_LIMIT, compare
    from cordee.compute.model import open_model, remarks, save_model
    from posttrain.merging import averaging, gate

    if config.checkpoints is not None:
        folders = averaging.checkpoints(config.checkpoints)
        weights = averaging.shares([1.0] * len(folders), config.decay)
    else:
        folders = [part.path for part in config.models]
        weights = averaging.shares([part.weight for part in config.models], config.decay)
    for folder, weight in zip(folders, weights, strict=True):
        context.note(f"{folder}: weight {weight:.4g}")
    last = folders[-1]
    for remark in remarks(last, last):
        context.note(remark)
    averaged, expected, stored = averaging.average(folders, weights)
    dtype = str(stored).removeprefix("torch.")
    limit = config.tolerance or MERGE_LIMIT[dtype]
    sequences = gate.sequences(config, averaged, last)
    in_memory = gate.scores(config, context, averaged, sequences, 0, of=2)
    save_model(averaged.to(device="cpu", dtype=stored), context.out, tokenizer=last, base=last, chats=True)
    del averaged
    again = open_model(context.out).eval()
    rounding = averaging.require_saved(context.out, again, expected)
    figures = gate.figures(again, sequences, 2, limit)
    on_disk = compare(in_memory, gate.scores(config, context, again.float(), sequences, 1, of=2))
    gate.check(config, "saved and opened again", on_disk.merged(dtype), limit, on_disk)
    context.progress(2, 2, "checks")
    return {
        **figures, "dtype": dtype, **gate.saved(on_disk), "models": len(folders), "largest_rounding_ulp": rounding,
    }  # fmt: skip


def _base(config: Config) -> Path:
    """The folder of the adapters' base."""
    from posttrain.merging import combining

    if config.adapter is None:
        return combining.one_base(config.adapters, config.model)
    return model_folder.base_of(config.adapter, config.model, key="adapter", base_key="model")


def _opened(
    config: Config, context: Context, base: "PreTrainedModel", folder: Path
) -> "tuple[PeftModel, dict[str, Any]]":
    """The base with its adapter, or with what several are combined to, and what the manifest says of that."""
    import torch

    from posttrain.merging import combining
    from posttrain.training import adapters

    if config.adapter is not None:
        return adapters.open_adapter(config.adapter, base, folder), {}
    torch.manual_seed(context.seed)  # DARE drops weights at random
    adapted = combining.combine(config.adapters, config, base, folder)
    found = combining.distance(adapted, config.adapters)
    combining.require_exact(config, found)
    if config.combination in combining.SUMS and found.relative_error > combining.EXACT:
        context.note(
            f"{config.combination} is {found.relative_error:.1%} of its size away from the weighted sum of the "
            f"adapters, over {found.modules} modules; `cat` is that sum"
        )
    told = {"adapters": len(config.adapters), "combination": config.combination}
    return adapted, told | {"sum_relative_error": found.relative_error}


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()

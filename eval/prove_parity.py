"""Proves that every form of a merged checkpoint gives the same log-probabilities: transformers, vLLM, adapter, merged.

    cordee prove RECIPE parity

The numbers in the report are vLLM's; this says how far they are from the model that was trained.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from cordee import files, worker
from cordee.config import Config as Keys
from cordee.config import Execution, Input
from cordee.errors import Fault, UserError
from cordee.stage import Context

if TYPE_CHECKING:
    from cordee.compute.logprobs import Scores

PROVES = "posttrain.merge"
ADAPTER_LIMIT = 1e-3
"""Nats, in float32: merging only adds in another order."""
ENGINE_LIMIT = 0.05
"""Nats: vLLM holds xIELU's scalars in bfloat16, whatever dtype was asked for."""
ROUNDED_LIMIT = 5e-3
"""Nats, against transformers with those scalars rounded in the same way: what else differs."""
TOP1_LIMIT = 0.99
"""Share of tokens at which both hold the same token most likely."""


class Config(Keys):
    """The merged checkpoint and what it was merged from."""

    artifact: Input
    """The merged checkpoint."""
    adapter: Input
    """The adapter that was merged."""
    model: Input
    """The model that the adapter was trained on."""
    prompts: Input
    """A parquet file of chats (`messages`) or pairs (`prompt`, `chosen`)."""
    rows: int = Field(default=32, ge=1)
    """How many of its first rows are compared."""
    max_length: int = Field(default=1024, ge=2)
    """Longest row, in tokens."""
    batch_size: Execution[int] = Field(default=8, ge=1)
    """Rows that transformers scores at once."""


def run(config: Config, context: Context) -> dict[str, Any]:
    """Score the same tokens in each form, and write `certificate.json`.

    Raises:
        Fault: two forms differ by more than their limit.
    """
    import torch
    from peft import PeftModel

    from cordee.compute import engine
    from cordee.compute.logprobs import score
    from cordee.compute.model import open_model

    ids = _encode(config)

    def scored(model: Any) -> "list[Scores]":
        return score(model.eval(), ids, batch_size=config.batch_size)

    merged = scored(open_model(config.artifact, dtype=torch.float32))
    base = open_model(config.model, dtype=torch.float32)
    before = scored(base)
    unmerged = scored(PeftModel.from_pretrained(base, str(config.adapter)))
    served = engine.start(config.artifact, config.max_length, context.seed).score(ids)
    rounded = open_model(config.artifact, dtype=torch.float32)
    with torch.no_grad():
        for name, value in [*rounded.named_parameters(), *rounded.named_buffers()]:
            if ".act_fn." in name:
                value.copy_(value.to(torch.bfloat16))
    checks = [
        _check("adapter and merged, in transformers: max |Δlogprob| in nats", _apart(unmerged, merged), ADAPTER_LIMIT),
        _check("transformers and vLLM: max |Δlogprob| in nats", _apart(merged, served), ENGINE_LIMIT),
        _check("the same, xIELU's scalars rounded as vLLM holds them", _apart(scored(rounded), served), ROUNDED_LIMIT),
        _check("transformers and vLLM: same most likely token", _agreement(merged, served), TOP1_LIMIT, at_least=True),
    ]
    tokens = sum(map(len, ids))
    effect = f"the adapter itself moves log-probabilities by up to {_apart(before, merged):.3g} nats"
    certificate = {
        "proof": "parity",
        "of": PROVES,
        "claim": "the adapter, the merged checkpoint and vLLM give the same log-probabilities",
        "passed": all(check["passed"] for check in checks),
        "checks": checks,
        "evidence": [f"{len(ids)} rows, {tokens} tokens", effect],
    }
    for check in checks:
        if not check["passed"]:
            raise Fault(f"{check['name']}: {check['value']:.3g}, the limit is {check['limit']}", file=config.artifact)
    files.write_json(context.out / "certificate.json", certificate)
    return {"rows": len(ids), "tokens": tokens, "max_difference_nats": checks[1]["value"]}


def _encode(config: Config) -> list[list[int]]:
    """The first rows as token ids through the chat template, checked to be the same in every folder."""
    import pyarrow.parquet

    from cordee.compute.model import open_tokenizer

    for name in ("tokenizer.json", "chat_template.jinja"):
        if (config.artifact / name).read_bytes() != (config.model / name).read_bytes():
            raise Fault(f"differs from {config.model / name}", file=config.artifact / name)
    tokenizer = open_tokenizer(config.artifact)
    rows = pyarrow.parquet.read_table(config.prompts).slice(0, config.rows).to_pylist()
    encoded = []
    for number, row in enumerate(rows):
        messages = row["messages"] if "messages" in row else [*row["prompt"], *row["chosen"]]
        ids = list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"])
        if len(ids) >= config.max_length:
            raise UserError(f"row {number} has {len(ids)} tokens", file=Path(config.prompts), key="max_length")
        encoded.append(ids)
    return encoded


def _apart(one: "list[Scores]", other: "list[Scores]") -> float:
    """The largest difference of two log-probabilities of the same token, in nats."""
    return max(float((a.logprobs - b.logprobs).abs().max()) for a, b in zip(one, other, strict=True))


def _agreement(one: "list[Scores]", other: "list[Scores]") -> float:
    """The share of tokens at which both hold the same token most likely."""
    same = sum(int((a.top1 == b.top1).sum()) for a, b in zip(one, other, strict=True))
    return same / sum(len(a.top1) for a in one)


def _check(name: str, value: float, limit: float, *, at_least: bool = False) -> dict[str, Any]:
    return {"name": name, "value": value, "limit": limit, "passed": value >= limit if at_least else value <= limit}


def main() -> None:
    """The door."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()

"""Proves that a merged checkpoint is one model in every form: transformers, vLLM, lm-eval, adapter apart and merged.

    cordee prove RECIPE parity

Same chats, same token ids; same ids, same log-probabilities. vLLM starts on the model that the adapter was trained on
and is given the merged weights by a reload, as in every measurement. All is computed in float32.
"""

from typing import Any

from pydantic import Field

from cordee import certificate, worker
from cordee.certificate import Certificate, at_least, at_most
from cordee.config import Config as Keys
from cordee.config import Execution, Input
from cordee.stage import Context

VERSION = 1
PROVES = "posttrain.merge"
CLAIM = (
    "training, vLLM and lm-eval see the same token ids, and adapter, merged checkpoint and vLLM give the same "
    "log-probabilities"
)
ENGINE_LIMIT = 0.05
"""Nats: vLLM computes xIELU's slopes in bfloat16, whatever type was asked for."""
SERVED_LIMIT = 1e-3
"""Nats, against transformers with the slopes that vLLM has: what else differs."""
TOP1_LIMIT = 0.99
"""Share of tokens at which both hold the same token most likely; near ties may fall either way."""


class Config(Keys):
    """The merged checkpoint and what it was merged from."""

    artifact: Input
    """The merged checkpoint."""
    adapter: Input
    """The adapter that was merged."""
    model: Input
    """The model that the adapter was trained on."""
    prompts: Input
    """Chats (`messages`) or pairs (`prompt`, `chosen`), parquet or JSON lines."""
    rows: int = Field(default=32, ge=1)
    """How many of its first rows are compared."""
    max_length: int | None = Field(default=None, ge=2)
    """Longest row, in tokens; without it, all positions of the model."""
    batch_size: Execution[int] = Field(default=8, ge=1)
    """Rows that transformers scores at once."""


def run(config: Config, context: Context) -> dict[str, Any]:
    """Encode and score the same chats in each form, and write `certificate.json`.

    Raises:
        Fault: two forms differ by more than their limit; no certificate is written.
    """
    import torch
    from peft import PeftModel

    from cordee.compute import engine, probe
    from cordee.compute.logprobs import MERGE_LIMIT, score
    from cordee.compute.model import open_model, stop_token_ids
    from eval import backends, parity

    engine.choose("vllm")
    engine.require_one_engine({"model": config.model, "artifact": config.artifact})
    length = engine.longest_request(config.artifact, config.max_length)
    chats, ids = parity.read(config.prompts, config.rows, config.artifact, length - 1)

    def scored(model: Any, done: int) -> Any:
        if context.stop_requested():
            context.stop(f"form {done} of 5")
        context.progress(done, 5, "forms")
        return score(model.eval(), ids, batch_size=config.batch_size)

    stored = open_model(config.artifact)
    dtype = str(stored.dtype).removeprefix("torch.")
    merged = scored(stored.float(), 0)
    as_served = scored(probe.as_served(stored), 1)
    base = open_model(config.model, dtype=torch.float32)
    before = scored(base, 2)
    unmerged = scored(PeftModel.from_pretrained(base, str(config.adapter)), 3)
    del stored, base
    context.progress(4, 5, "forms")
    models = backends.Models(engine.Settings("vllm", length, dtype="float32"), [config.model, config.artifact])
    models.open(config.model)
    lm = models.open(config.artifact)
    served = engine.Engine(lm.model, models.probes).score(ids)
    otherwise = parity.otherwise_in_lm_eval(lm, chats, ids, stop_token_ids(config.artifact))
    checks = [
        at_most("chats that vLLM encodes otherwise than training", parity.otherwise_in_vllm(lm.model, chats, ids), 0),
        at_most("chats that lm-eval encodes otherwise than training", otherwise, 0),
        at_most("adapter and merged: max |Δlogprob| in nats", parity.apart(unmerged, merged), MERGE_LIMIT[dtype]),
        at_most("transformers and vLLM: max |Δlogprob| in nats", parity.apart(merged, served), ENGINE_LIMIT),
        at_most("the same, with the slopes of xIELU that vLLM has", parity.apart(as_served, served), SERVED_LIMIT),
        at_least("same most likely token", parity.agreement(merged, served), TOP1_LIMIT),
    ]
    effect = parity.apart(before, merged)
    evidence = [
        f"{len(ids)} chats, {sum(map(len, ids))} tokens; all in float32, weights stored in {dtype}",
        f"the adapter moves log-probabilities by up to {effect:.3g} nats",
        f"vLLM {models.settings.describe()['version']}",
    ]
    proven = Certificate(proof="parity", of=PROVES, claim=CLAIM, checks=tuple(checks), evidence=evidence)
    certificate.write(context.out, proven)
    return {
        "rows": len(ids), "tokens": sum(map(len, ids)), "max_difference_nats": checks[3].value,
        "adapter_effect_nats": effect,
    }  # fmt: skip


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()

"""Proves that a merged checkpoint is one model in every form: transformers, vLLM, lm-eval, adapter apart and merged.

    cordee prove RECIPE parity

Same chats, same token ids; same ids, same log-probabilities. vLLM starts on the model that the adapter was trained on
and is given the merged weights by a reload, as in every measurement. All is computed in float32.
"""

from typing import Any

from pydantic import Field

from cordee import certificate, model_folder, worker
from cordee.certificate import Certificate, Conditions, at_least, at_most
from cordee.config import Execution, Input
from cordee.model_folder import ModelInput
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


class Config(Conditions):
    """The merged checkpoint and what it was merged from."""

    artifact: Input
    """The merged checkpoint."""
    adapter: ModelInput
    """The adapter that was merged."""
    model: Input | None = None
    """The model that the adapter was trained on; by default the one that its config names."""
    prompts: Input | None = None
    """Chats (`messages`) or pairs (`prompt`, `chosen`), parquet or JSON lines; by default a few texts of many scripts
    as questions and answers."""
    rows: int = Field(default=32, ge=1)
    """How many of its first rows are compared."""
    max_length: int | None = Field(default=None, ge=2)
    """Longest row, in tokens; without it, all positions of the model."""
    batch_size: Execution[int] = Field(default=8, ge=1)
    """Rows that transformers scores at once."""

    def num_gpus(self) -> int:
        """One, for one form after the other."""
        return 1


def run(config: Config, context: Context) -> dict[str, Any]:
    """Encode and score the same chats in each form, and write `certificate.json`.

    Raises:
        Fault: two forms differ by more than their limit; no certificate is written.
    """
    import torch

    from cordee.compute import adapter, engine, probe, serving
    from cordee.compute.logprobs import MERGE_LIMIT, MERGE_MEASURE, compare, score
    from cordee.compute.model import open_model, stop_token_ids
    from eval.measuring import backends, parity

    settings = engine.Settings("vllm", config.max_length, "float32", enforce_eager=True)
    folder = model_folder.base_of(config.adapter, config.model, key="adapter", base_key="model")
    serving.require_served({"model": folder, "artifact": config.artifact}, settings)
    length = engine.longest_request(config.artifact, config.max_length)
    chats, ids = parity.read(config.prompts, config.rows, config.artifact, length - 1)

    def scored(model: Any, done: int) -> Any:
        context.stop_if_asked(f"form {done} of 5")
        context.progress(done, 5, "forms")
        return score(model.eval(), ids, batch_size=config.batch_size)

    stored = open_model(config.artifact)
    dtype = str(stored.dtype).removeprefix("torch.")
    merged = scored(stored.float(), 0)
    as_served = scored(probe.as_served(stored), 1)
    base = open_model(folder, dtype=torch.float32)
    adapter.fit_tables(config.adapter, base, folder)
    before, unmerged = scored(base, 2), scored(adapter.open_on(config.adapter, base, folder), 3)
    del stored, base
    context.progress(4, 5, "forms")
    models = backends.Models(settings, [folder, config.artifact])
    models.open(folder)
    lm = models.open(config.artifact)
    served = models.score(ids)
    by_vllm = parity.encoded_differently_by_vllm(lm.model, chats, ids)
    by_lm_eval = parity.encoded_differently_by_lm_eval(lm, chats, ids, stop_token_ids(config.artifact))
    told, joined = compare(merged, served), compare(unmerged, merged).merged(dtype)
    checks = [
        at_most("chats that vLLM encodes differently from training", by_vllm, 0),
        at_most("chats that lm-eval encodes differently from training", by_lm_eval, 0),
        at_most(f"adapter and merged: {MERGE_MEASURE[dtype]} |Δlogprob| in nats", joined, MERGE_LIMIT[dtype]),
        at_most("transformers and vLLM: max |Δlogprob| in nats", told.largest, ENGINE_LIMIT),
        at_most("the same, with the slopes of xIELU that vLLM has", compare(as_served, served).largest, SERVED_LIMIT),
        at_least("same most likely token", told.top1, TOP1_LIMIT),
    ]
    effect = compare(before, merged).largest
    evidence = [
        f"{len(ids)} chats, {sum(map(len, ids))} tokens; all in float32, weights stored in {dtype}",
        f"the adapter moves log-probabilities by up to {effect:.3g} nats",
        f"vLLM {settings.describe()['version']}",
    ]
    proven = Certificate(
        proof="parity", of=PROVES, claim=CLAIM, conditions=config.conditions, checks=tuple(checks), evidence=evidence
    )
    certificate.write(context.out, proven)
    told_of = {"max_difference_nats": checks[3].value, "adapter_effect_nats": effect}
    return {"rows": len(ids), "tokens": sum(map(len, ids)), **told_of}


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()

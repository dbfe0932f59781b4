"""How likely given tokens are as the next one after a prompt: what a judge is asked."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from cordee.errors import Fault

if TYPE_CHECKING:
    from cordee.compute.engine import Engine


def by_vllm(engine: "Engine", prompts: Sequence[Sequence[int]], tokens: Sequence[int]) -> torch.Tensor:
    """Log-probabilities `[prompts, tokens]` by vLLM, float64, in nats, before any sampling setting.

    Args:
        engine: holds the model.
        prompts: token ids `[seq]` of each.
        tokens: ids of the tokens, none twice.

    Raises:
        Fault: vLLM does not give them.
    """
    from vllm import SamplingParams

    asked = SamplingParams(
        temperature=0, max_tokens=1, logprobs=len(tokens), logprob_token_ids=list(tokens), detokenize=False
    )
    rows: list[list[float]] = []
    for output in engine.ask(prompts, asked):
        held: dict[int, Any] = output.outputs[0].logprobs[0]
        if missing := [token for token in tokens if token not in held]:
            raise Fault(f"vLLM gives no log-probability of {len(missing)} of {len(tokens)} tokens")
        rows.append([held[token].logprob for token in tokens])
    return torch.tensor(rows, dtype=torch.float64).reshape(len(prompts), len(tokens))


def by_transformers(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], tokens: Sequence[int], *, batch_size: int
) -> torch.Tensor:
    """Log-probabilities `[prompts, tokens]` by transformers, float64, in nats; prompts of about one length together.

    The model is used as it is: put it in evaluation mode and on its device first.
    """
    where = next(model.parameters()).device
    found = torch.zeros(len(prompts), len(tokens), dtype=torch.float64)
    order = sorted(range(len(prompts)), key=lambda at: -len(prompts[at]))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        lengths = [len(prompts[at]) for at in places]
        rows = [[*prompts[at]] + [0] * (lengths[0] - len(prompts[at])) for at in places]
        mask = [[1] * length + [0] * (lengths[0] - length) for length in lengths]
        with torch.no_grad():
            logits = model(
                input_ids=torch.tensor(rows, device=where), attention_mask=torch.tensor(mask, device=where),
                use_cache=False,
            ).logits  # [batch, seq, vocab]  # fmt: skip
            last = logits[torch.arange(len(places)), torch.tensor(lengths) - 1].double().log_softmax(-1).cpu()
        found[places] = last[:, list(tokens)]
    return found

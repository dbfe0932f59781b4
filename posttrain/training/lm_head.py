"""The log-probabilities that TRL trains on are those of the model's own logits.

TRL's fused LM head computes them from the last hidden states and the head's weights, without the logits. It knows what
many architectures do to their logits, and leaves out the rest: RecurrentGemma's and xLSTM's caps, ModernBERT's layer
before its decoder.
"""

import functools
import types
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from transformers import Trainer
from trl.trainer.utils import FusedCausalLMOutput

from cordee.stage import Context
from posttrain.training.settings import IGNORED

TOLERANCE = 1e-3
"""How many nats the two may differ by in float32; in bfloat16, by the rounding of the largest logit."""
TOKENS = 64


def use_own_logits(trainer: Trainer, ids: Sequence[int], context: Context) -> None:
    """Compute the log-probabilities from the model's own logits where TRL's fused LM head gives others, and note it.

    Args:
        trainer: that of TRL.
        ids: a sequence of the data; the two are compared on its beginning.
        context: is told.
    """
    found: list[tuple[float, float]] = [(0.0, 0.0)]
    if trainer.accelerator.is_main_process:  # with FSDP the others may have no weights yet
        found = [_difference(trainer.model, ids, getattr(trainer, "temperature", 1.0))]
    difference, tolerance = broadcast_object_list(found)[0]
    if difference <= tolerance:
        return
    problem = f"TRL's fused LM head leaves out a part of this model: log-probabilities are off by {difference:.3g} nats"
    context.note(f"{problem}; the loss is computed from the model's logits, which take more memory")
    for model in (trainer.model, getattr(trainer, "ref_model", None)):
        if model is not None:
            base = model.get_base_model() if isinstance(model, PeftModel) else model
            _replace_fused_forward(base, getattr(trainer, "temperature", 1.0))


def _difference(model: Any, ids: Sequence[int], temperature: float) -> tuple[float, float]:
    """The largest difference of a token's log-probability, in nats, and the largest that rounding explains."""
    tokens = torch.tensor([[int(token) for token in ids[:TOKENS]]], device=model.device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        fused = model(input_ids=tokens, labels=tokens, fused_lm_head=True).log_probs
        logits = model(input_ids=tokens, use_cache=False).logits / temperature
    model.train(was_training)
    rounding = 2 * torch.finfo(model.dtype).eps * float(logits.abs().max())
    own = _of_logits(logits, tokens)["log_probs"]
    return float((fused - own).abs().max()), max(TOLERANCE, rounding)


def _replace_fused_forward(model: torch.nn.Module, temperature: float) -> None:
    """Have `model(…, labels=labels, fused_lm_head=True)` return what TRL's head does, of the model's own logits."""
    given = model.forward

    @functools.wraps(type(model).forward)
    def forward(_self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **inputs: Any) -> Any:
        if not fused_lm_head:
            return given(*args, **inputs) if labels is None else given(*args, labels=labels, **inputs)
        outputs = given(*args, **inputs)
        fields = _of_logits(outputs.logits / temperature, labels)
        return FusedCausalLMOutput(**fields, aux_loss=getattr(outputs, "aux_loss", None))

    model.forward = types.MethodType(forward, model)


def _of_logits(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """The fields of TRL's `FusedCausalLMOutput`, `[batch, seq - 1]` each, 0 where the label is -100.

    Args:
        logits: `[batch, seq, vocabulary]`.
        labels: `[batch, seq]`.
    """
    wanted = labels[:, 1:].to(logits.device)
    mask = wanted != IGNORED
    scores, wanted = logits[:, :-1][mask].float(), wanted[mask]  # [tokens, vocabulary], [tokens]
    logprobs = scores.log_softmax(-1)
    fields = {"log_probs": logprobs.gather(-1, wanted[:, None])[:, 0]}
    with torch.no_grad():
        fields["entropy"] = -(logprobs.exp() * logprobs).sum(-1)
        fields["log_sum_sq_probs"] = (2 * logprobs).logsumexp(-1)
        fields["mean_logits"] = scores.mean(-1)
        fields["is_top1"] = scores.argmax(-1) == wanted
    spread = {name: value.new_zeros(mask.shape).masked_scatter(mask, value) for name, value in fields.items()}
    return {**spread, "label_mask": mask}

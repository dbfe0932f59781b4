"""The cost of a stage before it starts, in closed form and without torch.

Training FLOPs follow Kaplan et al. 2020 (arXiv 2001.08361, section 2.1): per token 2 FLOPs per parameter in the forward
and 4 in the backward pass, plus 12 · layers · width · context for attention.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cordee.memory import Decoder, Memory


@dataclass(frozen=True)
class Cost:
    """The known quantities of a stage's work; None if not known yet."""

    tokens: float | None = None
    """Tokens that the stage trains on, generates or scores."""
    tokens_by: str = ""
    """How the tokens are counted, where a plan is to say it."""
    flops: float | None = None
    parameters: float | None = None
    memory_bytes: float | None = None
    """Peak memory of one process."""
    seconds: float | None = None
    """Only if measured."""
    vocab_size: int | None = None
    rows: float | None = None
    """Documents, chats or pairs of the stage's output."""
    memory: Memory | None = None
    """Of a training, what the memory is needed for."""
    decoder: Decoder | None = field(default=None, compare=False, repr=False)
    """The sizes of the model that is made or read, for the stages that read it."""


SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
"""The fields of a model's config that determine its size."""


def decoder_parameters(model: Mapping[str, Any], vocab_size: int) -> int:
    """Number of parameters of an Apertus decoder, from its config with all fields of `SHAPE`.

    Per layer: attention `q, k, v, o`, QK-norms, the two matrices of a non-gated MLP, xIELU's two scalars
    (its `beta` and `eps` are fixed) and two RMSNorms; then the last norm, the embedding, and the output head.
    """
    width, heads = int(model["hidden_size"]), int(model["num_attention_heads"])
    head_dim = int(model.get("head_dim") or width // heads)
    key_value = int(model["num_key_value_heads"]) * head_dim
    attention = 2 * width * heads * head_dim + 2 * width * key_value + 2 * head_dim
    layer = attention + 2 * width * int(model["intermediate_size"]) + 2 + 2 * width
    tables = 1 if model.get("tie_word_embeddings") else 2
    return int(model["num_hidden_layers"]) * layer + width + tables * vocab_size * width


def training_flops(parameters: float, tokens: float, layers: int, width: int, context: int) -> float:
    """FLOPs to train on `tokens` tokens."""
    return tokens * (6.0 * parameters + 12.0 * layers * width * context)

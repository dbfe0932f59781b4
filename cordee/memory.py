"""The memory of a training on one device before it starts, term by term in closed form and without torch.

What training keeps is counted as Korthikanti et al. 2022 (arXiv 2205.05198, section 4.1, equation 2) count it: every
tensor that a layer's backward pass reads. Their 34 bytes per token, layer and width are those of a GPT with dropout
and an MLP of four widths; here the same count is made of what transformers computes, from the model's own shapes.
How weights, gradients and moments are divided over devices follows Rajbhandari et al. 2020 (arXiv 1910.02054,
section 3, figure 1).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

RUNTIME_BYTES = 0.6e9
"""The libraries, and on a GPU CUDA's context."""
HEAD_TOKENS, HEAD_COLUMNS, FOLDED = 4096, 32768, 7
"""TRL's fused LM head has a buffer for logits of so many tokens and entries of the vocabulary; without Triton it also
has so many pieces of float32."""
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
CROSS_ENTROPY_BYTES = 12.0
"""Of a cross-entropy of all logits: these, log-probabilities and their gradient, in float32."""
FIELDS = (
    ("num_hidden_layers", "n_layer", "n_layers"),
    ("hidden_size", "n_embd", "d_model"),
    ("num_attention_heads", "n_head", "n_heads"),
    ("vocab_size",),
)
"""What configs call the number of layers, the width, the number of heads, and the rows of the embedding."""
_IN_LAYER, _VISION = re.compile(r"\.\d+\."), re.compile(r"vision|visual")
STATES = {"sgd": 0, "adafactor": 0, "lion": 1, "rmsprop": 1, "adagrad": 1, "ademamix": 3}
"""Numbers that an optimizer keeps of each weight, by a word in its name; of the Adams, and any other, 2."""


@dataclass(frozen=True)
class Decoder:
    """The sizes of a decoder; of a mixture of experts, of those that work on one token."""

    layers: int
    width: int
    query_width: int
    """Heads times the width of one."""
    key_width: int
    """The same of keys, and of values."""
    mlp_width: int
    vocab_size: int
    """Rows of the embedding and of the head."""
    parameters: int
    matrices: Mapping[str, tuple[int, int]]
    """The shape of each matrix in a layer by its module's name, such as `model.layers.0.mlp.up_proj`."""
    activation: str
    """Of the MLP."""
    normed_queries: bool = False
    """Whether queries and keys have norms of their own."""

    @classmethod
    def of(cls, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], parameters: int) -> "Decoder | None":
        """From the fields of a language model's config; None where it lacks one that is needed.

        Args:
            config: as transformers writes it.
            shapes: of the model's weights, by their names.
            parameters: of the whole model.
        """
        layers, width, heads, vocab_size = (
            next((config[name] for name in names if isinstance(config.get(name), int)), 0) for names in FIELDS
        )
        matrices = {
            name.removesuffix(".weight"): (int(shape[0]), int(shape[1]))
            for name, shape in shapes.items()
            if len(shape) == 2 and _IN_LAYER.search(name) and not _VISION.search(name)
        }
        if not (width and layers and heads and vocab_size and matrices):
            return None
        head = config.get("head_dim") or width // heads
        mlp = config.get("moe_intermediate_size") or config.get("intermediate_size") or 4 * width
        return cls(
            layers,
            width,
            query_width=heads * head,
            key_width=(config.get("num_key_value_heads") or heads) * head,
            mlp_width=(config.get("num_experts_per_tok") or 1) * mlp,
            vocab_size=vocab_size,
            parameters=parameters,
            matrices=matrices,
            activation=str(config.get("hidden_act") or config.get("hidden_activation") or "gelu"),
            normed_queries=any("q_norm" in name for name in shapes),
        )

    @property
    def in_matrices(self) -> int:
        """Parameters in the layers' matrices."""
        return sum(rows * columns for rows, columns in self.matrices.values())

    @property
    def head(self) -> int:
        """Parameters of the LM head."""
        return self.vocab_size * self.width

    @property
    def is_gated(self) -> bool:
        """Whether the MLP multiplies two halves."""
        return any("gate" in name for name in self.matrices)


def apertus_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of an Apertus model's matrices before it is made, from a config with all fields of its shape."""
    width, mlp, heads = (config[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads"))
    head = config.get("head_dim") or width // heads
    queries, keys = heads * head, config["num_key_value_heads"] * head
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "mlp.up_proj": (mlp, width),
        "mlp.down_proj": (width, mlp),
        "self_attn.q_norm": (head,),
    }
    places = range(config["num_hidden_layers"])
    return {f"model.layers.{place}.{name}.weight": shape for place in places for name, shape in layer.items()}


@dataclass(frozen=True)
class Training:
    """What the memory of a training depends on, beside the model."""

    tokens: float
    """In the rows that one device works on at once."""
    stored: float = 4
    """Bytes of a weight as the model is opened."""
    in_matrices: float | None = None
    """Bytes of a weight in the layers' matrices where these are quantized."""
    computed: int = 4
    """Bytes of a number in matrix products."""
    adapter: tuple[tuple[int, int], ...] | None = None
    """Rank and width of the input of each adapted matrix; None: all weights are trained."""
    trained: float | None = None
    """Parameters that are trained; None: all."""
    optim: str = "adamw_torch"
    """The optimizer by transformers' name."""
    recomputes: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again: nothing, a layer's tensors but those that products of matrices and
    attention give, or all from the layer's input."""
    devices: int = 1
    sharded: bool = False
    """Whether weights, gradients and moments are divided over the devices, or each has all of them."""
    reshards: bool = True
    """Whether a layer's weights are given back after the forward pass, where they are sharded."""
    logit_bytes: float | None = None
    """Bytes for each token and each entry of the vocabulary where all logits are held at once; None where they are
    computed piece by piece, of tokens with loss."""
    is_gpu: bool = True


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a training step."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    """What sharded weights are put together to: two layers and the head, with one layer's gradients."""
    casts: float
    """Copies of float32 weights in the type of the matrix products."""
    activations: float
    """What the backward pass reads."""
    logits: float
    """With the gradients of the head and of its input."""
    frozen: float = 0.0
    """Weights of other models that are only read: a teacher, a reference, vLLM's copy."""
    runtime: float = RUNTIME_BYTES

    @property
    def total(self) -> float:
        """The sum of all terms."""
        return float(sum(getattr(self, term.name) for term in fields(self)))

    def __str__(self) -> str:
        """`22.1 GB = weights 16.1 + …`, without the terms that do not count."""
        terms = {term.name: getattr(self, term.name) / 1e9 for term in fields(self)}
        told = " + ".join(f"{name} {value:.3g}" for name, value in terms.items() if value >= 0.01)
        return f"{self.total / 1e9:.3g} GB = {told}"


def of_training(model: Decoder, how: Training) -> Memory:
    """The memory of a training on one device.

    With N devices that shard (1 otherwise), w bytes a stored weight, c a number in matrix products, P parameters, T
    tokens at once:

    - weights: w P / N; gradients: w P_trained / N, and the same again in the buckets of DDP; optimizer: its states.
      What is trained is float32 where it is sharded, as accelerate has it, and an adapter is, but bfloat16 on
      quantized weights, as TRL has it.
    - gathered: c (2 layers + head), all weights where they are not resharded, and c for the gradients of a layer.
    - casts: c P in matrices, where w is 4, c is 2, and autocast copies; of frozen weights, those of one layer where
      there is checkpointing, since no cache keeps them.
    - activations: T layers a, with `layer_bytes` a; with checkpointing T (layers (r width + p) + a), r bytes a number
      between layers, `product_bytes` p if it is selective; and the last norm's, T (4 + r) width.
    - logits: c · 32768 for each of at most 4096 tokens, and on a CPU 28 for each entry of the vocabulary up to 32768;
      4 T width, and the head's gradient in float32 where it is trained. Where all are held at once, T vocabulary times
      `logit_bytes`, such as `CROSS_ENTROPY_BYTES`.
    """
    shards = how.devices if how.sharded else 1
    trained = model.parameters if how.trained is None else how.trained
    is_adapter = how.adapter is not None
    matrices = model.in_matrices
    kept = how.stored if is_adapter or not how.sharded else max(how.stored, 4)
    base = matrices * (how.in_matrices or kept) + (model.parameters - matrices) * kept
    kind = (2 if how.in_matrices else 4) if is_adapter else kept
    weights = base + (kind * trained if is_adapter else 0.0)
    copies = 1 if how.sharded or how.devices == 1 else 2
    per_layer = matrices / model.layers
    gathered = 0.0
    if how.sharded and how.devices > 1:
        whole = 2 * per_layer + model.head if how.reshards else float(model.parameters)
        gathered = how.computed * (whole + (0.0 if is_adapter else per_layer))
    casts = 0.0
    if how.stored > how.computed and not how.sharded and not how.in_matrices:
        casts = how.computed * (per_layer if is_adapter and how.recomputes != "none" else matrices)
    residual = how.computed if how.sharded else max(how.computed, how.stored)
    layer = layer_bytes(model, residual, how.computed, how.adapter)
    layers = model.layers * layer
    if how.recomputes != "none":
        kept = product_bytes(model, how.computed) if how.recomputes == "selective" else 0.0
        layers = model.layers * (residual * model.width + kept) + layer
    return Memory(
        weights=weights / shards,
        gradients=copies * kind * trained / shards,
        optimizer=optimizer_bytes(how.optim, kind) * trained / shards,
        gathered=gathered,
        casts=casts,
        activations=how.tokens * (layers + (4 + residual) * model.width),
        logits=_logits(model, how, trains_head=not is_adapter),
    )


def layer_bytes(
    model: Decoder, residual: float, computed: float, adapter: Sequence[tuple[int, int]] | None = None
) -> float:
    """Bytes of one token that the backward pass of one layer reads, as transformers computes it without own kernels.

    With h the width, q and k those of queries and keys, f the MLP's, r bytes of a number between layers and c in matrix
    products:

    - two RMSNorms: their input and their normalized input, (4 + r) h each, since they compute in float32; and of
      queries and keys, where the model has them: (4 + c) (q + k);
    - their outputs, c h each, which autocast (r > c) copies for each matrix that reads them;
    - attention that keeps no scores (sdpa, flash): queries, keys, values and its result, c (2 q + 2 k);
    - the MLP: gate, its activation, the other half, and the product, 4 c f; without a gate 2 c f; with xIELU, which is
      made of single operations, (4 c + r) f and a mask, f;
    - of a LoRA adapter, the input of each adapted matrix, of which PEFT makes a copy unless c is 4, and what its first
      factor makes of it: c (n + rank). Frozen weights then need none of their inputs: not the normalized ones, nor the
      norms' outputs, nor the product.

    With r = c = 2, and without dropout's masks, GPT's 34 h are 16 h + 8 h + 16 h here: norms in float32 keep more.
    """
    h, f, trains = model.width, model.mlp_width, adapter is None
    norms = 2 * (4 + residual * trains) * h
    if trains:
        norms += computed * h * (max(2.0, len(model.matrices) / model.layers - 2) if residual > computed else 2.0)
    if model.normed_queries:
        norms += (4 + computed * trains) * (model.query_width + model.key_width)
    attention = computed * (2 * model.query_width + 2 * model.key_width)
    if model.activation == "xielu":
        kept = (2 + 2 * trains) * computed + residual + 1
    else:
        kept = ((3 if model.is_gated else 1) + trains) * computed
    ranks = sum(rank for rank, _ in adapter or ()) / model.layers
    inputs = sum(columns for _, columns in adapter or ()) / model.layers
    adapted = computed * (ranks + (min(inputs, 2 * h + f) if computed == 4 else inputs))
    return norms + attention + kept * f + adapted


def product_bytes(model: Decoder, computed: float) -> float:
    """Bytes of one token that a layer's products of matrices and attention give: c (2 q + 2 k + 2 h + f or 2 f)."""
    halves = 2 if model.is_gated else 1
    attention = 2 * model.query_width + 2 * model.key_width
    return computed * (attention + 2 * model.width + halves * model.mlp_width)


def optimizer_bytes(optim: str, kind: float) -> float:
    """Bytes that an optimizer keeps of each weight of `kind` bytes, by transformers' name of it.

    Those of torch keep their moments as the weights are; those of bitsandbytes in float32, or in 8 bits by name.
    """
    states = next((count for word, count in STATES.items() if word in optim), 2)
    if "8bit" in optim:
        return float(states)
    return states * (4 if "32bit" in optim or "ademamix" in optim else kind)


def _logits(model: Decoder, how: Training, *, trains_head: bool) -> float:
    """The bytes of the LM head's work."""
    if how.logit_bytes is not None:
        return how.logit_bytes * how.tokens * model.vocab_size
    folded = 0 if how.is_gpu else 4 * FOLDED * min(model.vocab_size, HEAD_COLUMNS)
    tile = min(how.tokens, HEAD_TOKENS) * (how.computed * HEAD_COLUMNS + folded)
    return tile + 4 * how.tokens * model.width + (4 * model.head if trains_head else 0)

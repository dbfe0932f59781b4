"""Tiny random models of the known architectures, large enough for vLLM's kernels, each with a tokenizer of its kind."""

import dataclasses
from pathlib import Path
from typing import Any

import stock_tokenizers
import torch
import transformers

from cordee.compute.model import save_model
from cordee.errors import CordeeError

WIDTH = {
    "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 256,
}  # fmt: skip
HEADS = {"head_dim": 64}
GEMMA = HEADS | {"query_pre_attn_scalar": 64, "sliding_window": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
NARROW = EXPERTS | {"moe_intermediate_size": 64}
TEXT = {
    **WIDTH, **GEMMA, "model_type": "gemma3_text", "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
VISION = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 28,
    "patch_size": 14, "model_type": "siglip_vision_model",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Kind:
    """A family's config, by its class and fields, its tokenizer, and whether it ties its embedding and its head."""

    config: str
    tokenizer: str
    ties: tuple[bool, ...]
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    model: str = "AutoModelForCausalLM"


KINDS = {
    "Llama": Kind("LlamaConfig", "llama3", (False, True)),
    "Qwen 2": Kind("Qwen2Config", "qwen2", (False, True)),
    "Qwen 3": Kind("Qwen3Config", "qwen3", (False, True), HEADS),
    "Gemma 2": Kind("Gemma2Config", "gemma", (True,), GEMMA),
    "Gemma 3, text": Kind("Gemma3TextConfig", "gemma", (True,), GEMMA),
    "Gemma 3, with images": Kind(
        "Gemma3Config", "gemma", (True,), {"text_config": TEXT, "vision_config": VISION, "mm_tokens_per_image": 4},
        "AutoModelForImageTextToText",
    ),
    "Mistral": Kind("MistralConfig", "mistral_tekken", (False,), HEADS),
    "OLMo 2": Kind("Olmo2Config", "olmo2", (False,)),
    "OLMo 3": Kind("Olmo3Config", "olmo2", (False,), {"sliding_window": 16}),
    "SmolLM3": Kind("SmolLM3Config", "llama3", (False, True)),
    "Phi 3": Kind("Phi3Config", "phi3", (False,)),
    "GPT-2": Kind("GPT2Config", "gpt2", (True,), {"n_embd": 128, "n_layer": 2, "n_head": 2}),
    "GPT-NeoX": Kind("GPTNeoXConfig", "pythia", (False, True)),
    # a window longer than the probe: vLLM's has a token more than transformers'
    "Cohere 2": Kind("Cohere2Config", "gpt2", (True,), {"sliding_window": 64}),
    "Apertus": Kind("ApertusConfig", "mistral_tekken", (False, True)),
    "Mixtral": Kind("MixtralConfig", "llama2", (False,), {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen 2 MoE": Kind("Qwen2MoeConfig", "qwen2", (False,), NARROW | {"shared_expert_intermediate_size": 64}),
    "Qwen 3 MoE": Kind("Qwen3MoeConfig", "qwen3", (False,), NARROW | HEADS),
    "OLMoE": Kind("OlmoeConfig", "pythia", (False,), EXPERTS),
}  # fmt: skip
CASES = [(name, tied) for name, kind in KINDS.items() for tied in kind.ties]


def make(folder: Path, name: str, *, tied: bool, seed: int, positions: int = 256) -> Path:
    """A checkpoint with random weights so large that two of them differ at every token."""
    kind = KINDS[name]
    place = stock_tokenizers.write(
        folder.with_name(f"{folder.name}-tokenizer"), stock_tokenizers.STOCK[kind.tokenizer](), beside_model=False
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    ids = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("bos", "eos", "pad")}
    size = {"vocab_size": len(tokenizer), "max_position_embeddings": positions}
    fields = ({} if "n_embd" in kind.fields else WIDTH) | kind.fields | size
    if "text_config" in kind.fields:
        fields = kind.fields | {"text_config": kind.fields["text_config"] | size | ids}
    config = getattr(transformers, kind.config)(**fields, **ids, tie_word_embeddings=tied)
    torch.manual_seed(seed)
    model = getattr(transformers, kind.model).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() > 1:
                weights.mul_(4)
    save_model(model, folder, tokenizer=place)
    return folder


def served(cases: list[tuple[str, bool]], folder: Path) -> list[tuple[tuple[str, bool], list[float | str], str]]:
    """Of each case: the differences of two checkpoints and of an adapter, or refusals; how the other weights came."""
    from chat_models import make_adapter

    from cordee.compute.engine import Settings
    from cordee.compute.serving import Engines

    folders, found = {}, []
    for at, case in enumerate(cases):
        name, tied = case
        # a base of another shape, in an engine of its own: where vLLM knows no adapters, checkpoints are served
        base = make(folder / f"{at}-base", name, tied=tied, seed=3, positions=128)
        pair = [make(folder / f"{at}-{seed}", name, tied=tied, seed=seed) for seed in (1, 2)]
        folders[case] = [*pair, make_adapter(folder / f"{at}-adapter", base, seed=4)]
    engines = Engines(
        Settings("vllm", 128, "float32", enforce_eager=True), [one for own in folders.values() for one in own]
    )
    for case, own in folders.items():
        told: list[float | str] = []
        by = []
        for one in own:
            try:
                running = engines.load(one)
                told.append(running.load(one))
                by.append(running)
            except CordeeError as error:
                told.append(error.problem.replace(str(folder), ""))
        found.append((case, told, "" if len(by) < 2 else "reload" if by[0] is by[1] else "start"))
    engines.stop()
    return found

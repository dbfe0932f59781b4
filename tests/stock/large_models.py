"""Folders of large models without their weights' bytes: a real config, and files of weights that are holes."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import stock_tokenizers

from cordee import hashes

APERTUS = {"model_type": "apertus", "architectures": ["ApertusForCausalLM"], "vocab_size": 131072,
           "hidden_act": "xielu", "max_position_embeddings": 65536, "num_key_value_heads": 8,
           "tie_word_embeddings": False}  # fmt: skip
SHAPES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 21504, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 43008, "num_hidden_layers": 80, "num_attention_heads": 64},
}
"""Of Apertus (technical report, arXiv 2509.14233, section 2.1)."""
PARAMETERS = {"8b": 8_053_338_176, "70b": 70_600_000_000}


def tensors(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """The shapes of an Apertus model's weights, as transformers names them."""
    width, mlp, heads = (config[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads"))
    head = width // heads
    keys = config["num_key_value_heads"] * head
    layer = {
        "self_attn.q_proj": [width, width], "self_attn.k_proj": [keys, width], "self_attn.v_proj": [keys, width],
        "self_attn.o_proj": [width, width], "self_attn.q_norm": [head], "self_attn.k_norm": [head],
        "mlp.up_proj": [mlp, width], "mlp.down_proj": [width, mlp],
        "attention_layernorm": [width], "feedforward_layernorm": [width],
    }  # fmt: skip
    found = {
        f"model.layers.{place}.{name}.weight": shape
        for place in range(config["num_hidden_layers"])
        for name, shape in layer.items()
    }
    table = [config["vocab_size"], width]
    return {**found, "model.norm.weight": [width], "model.embed_tokens.weight": table, "lm_head.weight": table}


def write(folder: Path, size: str) -> None:
    """A model's folder; the weights' file has its full size in bfloat16, and takes no place on the disk."""
    made, settings, _ = stock_tokenizers.smollm2()
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    stock_tokenizers.write(folder, (made, settings | {"chat_template": template}, ""), beside_model=False)
    config = {**APERTUS, **SHAPES[size]}
    (folder / "config.json").write_text(json.dumps(config))
    header, at = {}, 0
    for name, shape in tensors(config).items():
        end = at + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    told = json.dumps(header).encode()
    file = folder / "model.safetensors"
    with file.open("wb") as opened:
        opened.write(len(told).to_bytes(8, "little") + told)
        opened.truncate(8 + len(told) + at)
    state = file.stat()
    mark = [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]
    hashes.trust({str(file.resolve()): [*mark, "0" * 64]})  # 16 or 141 GB of zeros are not read

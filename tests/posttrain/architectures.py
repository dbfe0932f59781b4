"""Tiny random models of the known architectures, each with a tokenizer as its makers build theirs; how they train."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import stock_tokenizers
import torch
import transformers
from chat_samples import some_chats, write_lines
from dpo_samples import pair
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from cordee import files
from cordee.compute.model import open_model
from cordee.stage import Context
from posttrain import dpo, sft
from posttrain.training import adapter_settings, adapters

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + "
    "m['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' + m['content'] + "
    "'<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + (eos_token if m['role'] == 'assistant' else '\\n') }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
"""Templates in the manner of the families'."""

WIDTH = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDTH |= {"max_position_embeddings": 256}
GROUPED = WIDTH | {"num_key_value_heads": 1, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
NARROW = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 256}

Architecture = tuple[str, dict[str, Any], str, str]
ARCHITECTURES: dict[str, Architecture] = {
    "llama": ("LlamaConfig", GROUPED, "llama3", LLAMA3_TEMPLATE),
    "llama_tied": ("LlamaConfig", GROUPED | {"tie_word_embeddings": True}, "smollm2", CHATML),
    "llama2": ("LlamaConfig", GROUPED, "llama2", MISTRAL),
    "qwen2": ("Qwen2Config", GROUPED | {"tie_word_embeddings": True}, "qwen2", CHATML),
    "qwen3": ("Qwen3Config", GROUPED, "qwen3", CHATML),
    "gemma2": ("Gemma2Config", GROUPED, "gemma", GEMMA),
    "gemma3": ("Gemma3TextConfig", GROUPED, "gemma", GEMMA),
    "gemma3_nested": (
        "Gemma3Config",
        {
            "text_config": GROUPED,
            "vision_config": WIDTH | {"image_size": 28, "patch_size": 14},
            "mm_tokens_per_image": 4,
        },
        "gemma",
        GEMMA,
    ),
    "mistral": ("MistralConfig", GROUPED, "mistral_tekken", MISTRAL),
    "olmo2": ("Olmo2Config", WIDTH, "olmo2", PLAIN),
    "phi3": ("Phi3Config", GROUPED, "phi3", PHI3),
    "smollm3": ("SmolLM3Config", GROUPED, "smollm2", CHATML),
    "gpt2": ("GPT2Config", NARROW, "gpt2", PLAIN),
    "gpt_neox": ("GPTNeoXConfig", WIDTH, "pythia", PLAIN),
    "apertus": ("ApertusConfig", GROUPED, "metaspace", PLAIN),
    "mixtral": ("MixtralConfig", GROUPED | {"num_local_experts": 4}, "mistral_tekken", MISTRAL),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        GROUPED | EXPERTS | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
        "qwen2",
        CHATML,
    ),
    "qwen3_moe": ("Qwen3MoeConfig", GROUPED | EXPERTS | {"moe_intermediate_size": 16}, "qwen3", CHATML),
    "olmoe": ("OlmoeConfig", WIDTH | EXPERTS, "olmo2", PLAIN),
}
"""By name: the config's class and fields, the tokenizer's maker, the chat template."""


def make(folder: Path, name: str, *, change: Callable[[dict[str, Any]], None] | None = None, **fields: Any) -> Path:
    """Write a model's folder; `change` is given the settings of the tokenizer."""
    kind, own, tokenizer, template = ARCHITECTURES[name]
    made, settings, _ = stock_tokenizers.STOCK[tokenizer]()
    settings = settings | {"chat_template": template}
    if change:
        change(settings)
    stock_tokenizers.write(folder, (made, settings, ""), beside_model=False)
    names = {f"{token}_id": made.token_to_id(settings.get(token) or "") for token in ("bos_token", "eos_token")}
    names |= {"pad_token_id": made.token_to_id(settings.get("pad_token") or "")}
    sizes = names | {"vocab_size": made.get_vocab_size()}
    if "text_config" in own:
        own = own | {"text_config": own["text_config"] | sizes}
    config = getattr(transformers, kind)(**sizes, **own, **fields)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    return folder


def make_family(folder: Path, template: str, **tokens: Any) -> Path:
    """Write a Llama whose tokenizer has a family's chat template and its special tokens."""
    tokenizer = families.tokenizer(families.source(template), **tokens)
    tokenizer.save_pretrained(folder)
    names = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    shape = GROUPED | {"max_position_embeddings": 1024}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), **names, **shape)
    transformers.LlamaForCausalLM(config).float().save_pretrained(folder)
    return folder


def chats(folder: Path, count: int = 8) -> Path:
    """A file of chats."""
    return write_lines(folder / "chats.jsonl", some_chats(count))


def pairs_file(folder: Path, count: int = 8) -> Path:
    """A file of preference pairs."""
    rows = [{name: pair(number)[name] for name in ("prompt", "chosen", "rejected")} for number in range(count)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / "pairs.jsonl"


def sft_keys(model: Path, data: Path, **keys: Any) -> dict[str, Any]:
    """A training of two steps."""
    trainer = {"max_length": 256, "max_steps": 2, "learning_rate": 1e-2, "bf16": False, **keys.pop("trainer", {})}
    given = {"model": str(model), "data": [{"path": str(data)}], "global_batch_size": 4, "compile": "off"}
    return {**given, "per_device_train_batch_size": 4, "trainer": trainer, **keys}


def settings_of(folder: Path) -> dict[str, Any]:
    """A JSON file."""
    return dict(json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")))


def train(context: Context, model: Path, data: Path, **keys: Any) -> dict[str, Any]:
    """SFT of a model on a file of chats."""
    return sft.run(sft.Config.model_validate(sft_keys(model, data, **keys)), context)


def align(context: Context, model: Path, pairs: Path, **keys: Any) -> dict[str, Any]:
    """DPO of a model on a file of pairs."""
    return dpo.run(dpo.Config.model_validate(sft_keys(model, pairs, **keys)), context)


def logits(model: torch.nn.Module, folder: Path) -> torch.Tensor:
    """Of one text by the folder's tokenizer."""
    ids = AutoTokenizer.from_pretrained(folder)("All human beings are born free", add_special_tokens=False)
    with torch.no_grad():
        return model.eval()(torch.tensor([ids["input_ids"]], device=model.device)).logits.cpu()


def opened(folder: Path) -> torch.nn.Module:
    """A model in float32, or an adapter on its base."""
    if (folder / "adapter_config.json").is_file():
        base = folder / files.read_json(folder / "adapter_config.json")["base_model_name_or_path"]
        return adapters.open_adapter(folder, opened(base), base)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def mean_loss(model: Path, chats: Any) -> float:
    """The mean over all tokens with loss, chat by chat."""
    opened, total, count = AutoModelForCausalLM.from_pretrained(model, dtype="float32"), 0.0, 0
    for chat in chats:
        ids = torch.tensor(chat.ids, dtype=torch.long)
        with torch.no_grad():
            logprobs = opened(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
        for place in chat.has_loss.nonzero()[0]:
            total, count = total - float(logprobs[place - 1, ids[place]]), count + 1
    return total / count


def trained_adapter(base: Path, folder: Path, **lora: Any) -> Path:
    """An adapter with an effect, saved beside its base."""
    model = open_model(base)
    adapted = get_peft_model(model, adapter_settings.lora_config({"r": 4, **lora}, model))
    generator = torch.Generator().manual_seed(2)
    for name, weights in adapted.named_parameters():
        if "lora_B" in name:
            weights.data = torch.randn(weights.shape, generator=generator) * 0.2
    adapters.save(adapted, folder, base=base)
    return folder

"""The memory of a training: closed forms worked by hand, and the tensors that torch itself keeps."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from cordee import machine, memory
from cordee.config import Devices, Launch
from cordee.cost import Cost
from cordee.memory import Decoder, Training
from pretrain.training.recomputation import recompute

ROOT = Path(__file__).resolve().parents[2]
LLAMA = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 8,
         "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64}  # fmt: skip
TOKENS = 128


def decoder(config: dict[str, Any], model: torch.nn.Module) -> Decoder:
    shapes = {name: [*weights.shape] for name, weights in model.named_parameters()}
    found = Decoder.of(config, shapes, sum(weights.numel() for weights in model.parameters()))
    assert found
    return found


def built(kind: str, dtype: torch.dtype) -> tuple[Decoder, Any]:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**LLAMA)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype)
    return decoder(config.to_dict(), model), model


def saved(model: Any, *, autocast: bool, **options: Any) -> int:
    """The bytes that a forward pass of the layers keeps, without the weights; nothing is counted twice."""
    own = {one.untyped_storage().data_ptr() for one in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    body = (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model
    with saved_tensors_hooks(pack, lambda one: one), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        body(input_ids=torch.arange(TOKENS).reshape(2, -1) % 64, use_cache=False, **options)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Apertus", "GPTNeoX"])
@pytest.mark.parametrize(("dtype", "computed"), [("float32", 4), ("float32", 2), ("bfloat16", 2)])
def test_what_a_backward_pass_reads_is_what_torch_keeps_of_it(kind: str, dtype: str, computed: int) -> None:
    """Within 2 %; GPT-NeoX, with LayerNorm and biases, within 25 %."""
    sizes, model = built(kind, getattr(torch, dtype))
    autocast = (dtype, computed) == ("float32", 2)
    kept = saved(model, autocast=autocast)
    told = memory.of_training(sizes, Training(TOKENS, stored=memory.BYTES[dtype], computed=computed))
    assert told.activations + told.casts == pytest.approx(kept, rel=0.25 if kind == "GPTNeoX" else 0.02)
    assert (told.casts > 0) == autocast


@pytest.mark.parametrize("kind", ["Llama", "Apertus"])
@pytest.mark.parametrize(("dtype", "computed"), [("float32", 4), ("float32", 2), ("bfloat16", 2)])
def test_under_an_adapter_too(kind: str, dtype: str, computed: int) -> None:
    """Within 5 %."""
    from peft import LoraConfig, get_peft_model

    sizes, model = built(kind, getattr(torch, dtype))
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    pairs = tuple((4, columns) for _, columns in sizes.matrices.values())
    trained = sum(4 * sum(shape) for shape in sizes.matrices.values())
    assert trained == sum(weights.numel() for weights in adapted.parameters() if weights.requires_grad)
    how = Training(TOKENS, stored=memory.BYTES[dtype], computed=computed, adapter=pairs, trained=trained)
    told = memory.of_training(sizes, how)
    assert told.activations + told.casts == pytest.approx(saved(adapted, autocast=computed == 2), rel=0.05)


def test_with_checkpointing_each_layer_keeps_its_input_and_one_keeps_all() -> None:
    sizes, model = built("Llama", torch.float32)
    told = memory.of_training(sizes, Training(TOKENS, recomputes="full"))
    layer = memory.layer_bytes(sizes, 4, 4)
    assert told.activations == TOKENS * (3 * 4 * 128 + layer + 8 * 128)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    inputs = saved(model, autocast=False)
    assert inputs == pytest.approx(told.activations - TOKENS * layer, rel=0.02)


@pytest.mark.parametrize("kind", ["Llama", "Apertus"])
@pytest.mark.parametrize(
    ("dtype", "autocast", "recomputes"),
    [
        ("float32", False, "none"),
        ("float32", True, "full"),
        ("bfloat16", True, "full"),
        ("float32", False, "selective"),
        ("float32", True, "selective"),
    ],
)
def test_the_peak_of_a_step_is_what_torch_counts(
    kind: str, dtype: str, autocast: bool, recomputes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a tenth, of TRL's head, a backward pass and AdamW, without the runtime."""
    import transformers
    from torch.distributed._tools.mem_tracker import MemTracker
    from trl.trainer import utils

    torch.manual_seed(0)
    monkeypatch.setattr(utils, "_use_triton", lambda _: True)  # as the stages have it
    config = getattr(transformers, f"{kind}Config")(**LLAMA | {"vocab_size": 2000})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(getattr(torch, dtype))
    utils.add_fused_lm_head(model)
    recompute(model, recomputes)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.arange(4 * 256).reshape(4, -1) % 2000

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids, fused_lm_head=True).loss
        loss.backward()
        optimizer.step()

    step()
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        step()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    how = Training(4 * 256, stored=memory.BYTES[dtype], computed=2 if autocast else 4, is_gpu=False)
    told = memory.of_training(decoder(config.to_dict(), model), replace(how, recomputes=recomputes))
    assert told.total - told.runtime == pytest.approx(peak, rel=0.1)


@pytest.fixture
def llama_8b() -> Decoder:
    """Llama 3.1 8B: 32 layers of 4096, 8 of 32 heads' keys, an MLP of 14336, two tables of 128256."""
    config = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
              "num_key_value_heads": 8, "vocab_size": 128256, "hidden_act": "silu"}  # fmt: skip
    layer = {"self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096),
             "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096),
             "mlp.down_proj": (4096, 14336)}  # fmt: skip
    shapes: dict[str, Any] = {
        f"model.layers.{place}.{name}.weight": shape for place in range(32) for name, shape in layer.items()
    }
    shapes["model.embed_tokens.weight"] = shapes["lm_head.weight"] = (128256, 4096)
    found = Decoder.of(config, shapes, 8_030_261_248)
    assert found
    return found


def test_a_full_training_in_float32_takes_16_bytes_a_parameter(llama_8b: Decoder) -> None:
    """ZeRO's own example: 16 bytes a parameter, divided by the devices where they are sharded, but not by DDP."""
    whole = memory.of_training(llama_8b, Training(4096))
    assert whole.weights + whole.gradients + whole.optimizer == 16 * llama_8b.parameters
    sharded = memory.of_training(llama_8b, Training(4096, devices=4, sharded=True, stored=2, computed=2))
    assert sharded.weights + sharded.gradients + sharded.optimizer == 16 * llama_8b.parameters / 4
    layer, head = 218_103_808, 128256 * 4096
    assert sharded.gathered == 2 * (2 * layer + head) + 2 * layer
    kept = memory.of_training(llama_8b, Training(4096, devices=4, sharded=True, stored=2, computed=2, reshards=False))
    assert kept.gathered == 2 * llama_8b.parameters + 2 * layer
    copied = memory.of_training(llama_8b, Training(4096, devices=4))
    assert copied.weights + copied.gradients + copied.optimizer == (16 + 4) * llama_8b.parameters


def test_an_adapter_in_bfloat16_and_in_four_bits(llama_8b: Decoder) -> None:
    """Rank 16 on all matrices: 16 · Σ (rows + columns) = 41 943 040 parameters, 16 bytes each; 14.5 GB less in NF4."""
    trained = 16 * 32 * (2 * 8192 + 2 * 5120 + 3 * 18432)
    pairs = tuple((16, columns) for _, columns in llama_8b.matrices.values())
    how = Training(4096, stored=2, computed=2, adapter=pairs, trained=trained, recomputes="full")
    half = memory.of_training(llama_8b, how)
    assert trained == 41_943_040
    assert half.weights == 2 * llama_8b.parameters + 4 * trained
    assert (half.gradients, half.optimizer, half.gathered, half.casts) == (4 * trained, 8 * trained, 0, 0)
    four = memory.of_training(llama_8b, replace(how, in_matrices=0.5625))
    matrices = 32 * 218_103_808
    assert four.weights == 0.5625 * matrices + 2 * (llama_8b.parameters - matrices) + 2 * trained
    assert half.weights - four.weights == pytest.approx(10.1e9, rel=0.01)
    layer = 8 * 4096 + 2 * 2 * (4096 + 1024) + 3 * 2 * 14336
    added = sum(2 * (16 + columns) for columns in (4096,) * 6 + (14336,))
    assert half.activations == 4096 * (32 * 2 * 4096 + layer + added + 6 * 4096)


@pytest.mark.parametrize(
    ("optim", "kind", "wanted"),
    [
        ("adamw_torch", 4, 8), ("adamw_torch_fused", 2, 4), ("adamw_8bit", 4, 2), ("adamw_bnb_8bit", 2, 2),
        ("paged_adamw_32bit", 2, 8), ("paged_adamw_8bit", 4, 2), ("adafactor", 4, 0), ("sgd", 4, 0),
        ("ademamix", 4, 12), ("ademamix_8bit", 4, 3), ("lion_32bit", 4, 4), ("adamw", 4, 8),
    ],
)  # fmt: skip
def test_what_an_optimizer_keeps_of_a_weight(optim: str, kind: int, wanted: float) -> None:
    assert memory.optimizer_bytes(optim, kind) == wanted


@pytest.mark.parametrize(
    ("name", "kind"), [("AdamW", torch.float32), ("AdamW", torch.bfloat16), ("SGD", torch.float32)]
)
def test_torchs_optimizers_keep_so_much(name: str, kind: torch.dtype) -> None:
    weights = torch.nn.Parameter(torch.ones(1000, dtype=kind))
    optimizer = getattr(torch.optim, name)([weights], lr=0.1)
    weights.sum().backward()
    optimizer.step()
    kept = sum(state.nbytes for state in optimizer.state[weights].values() if state is not None and state.numel() > 1)
    assert kept == 1000 * memory.optimizer_bytes({"AdamW": "adamw_torch", "SGD": "sgd"}[name], weights.element_size())


def test_the_logits_are_a_tile_or_all_of_them(llama_8b: Decoder) -> None:
    tile = memory.of_training(llama_8b, Training(2 * 4096, computed=2, stored=2)).logits
    assert tile == 2 * 4096 * 32768 + 4 * 8192 * 4096 + 4 * 128256 * 4096
    small = replace(llama_8b, vocab_size=2000)
    folded = memory.of_training(small, Training(1024, is_gpu=False)).logits
    assert folded == 1024 * (4 * 32768 + 28 * 2000) + 4 * 1024 * 4096 + 4 * 2000 * 4096
    assert memory.of_training(llama_8b, Training(8192, logit_bytes=12)).logits == 12 * 8192 * 128256


def test_the_terms_are_told_in_a_line(llama_8b: Decoder) -> None:
    how = Training(4096, stored=2, computed=2, adapter=((16, 4096),), trained=16 * 8192, recomputes="full")
    told = memory.of_training(llama_8b, how)
    assert str(told) == f"{told.total / 1e9:.3g} GB = weights 16.1 + activations 1.75 + logits 0.336 + runtime 0.6"
    assert told.total == sum((told.weights, told.gradients, told.optimizer, told.activations, told.logits, 0.6e9))
    beside = replace(told, frozen=3e9)
    assert beside.total == told.total + 3e9
    assert str(beside).endswith("logits 0.336 + frozen 3 + runtime 0.6")


def test_a_config_that_lacks_a_size_gives_no_decoder() -> None:
    assert Decoder.of({"hidden_size": 8}, {"model.layers.0.q_proj.weight": (8, 8)}, 64) is None
    assert Decoder.of(LLAMA, {"embed.weight": (64, 128)}, 64) is None


def test_the_layers_matrices_of_a_model_that_is_not_made_are_those_that_it_will_have() -> None:
    sizes, _ = built("Apertus", torch.float32)
    made = Decoder.of({**LLAMA, "hidden_act": "xielu"}, memory.apertus_shapes(LLAMA), sizes.parameters)
    assert made == sizes


def test_an_accelerate_configuration_says_what_is_computed_on(write: Any) -> None:
    sharded = Launch(config_file=str(ROOT / "configs/accelerate/fsdp2.yaml"), num_processes=4).devices()
    assert sharded == Devices(4, are_gpus=True, sharded=True)
    assert Launch(config_file=str(ROOT / "configs/accelerate/gpu.yaml")).devices() == Devices(1, are_gpus=True)
    assert Launch(config_file=str(ROOT / "configs/accelerate/cpu-2.yaml")).devices() == Devices(1, are_gpus=False)
    assert Launch(num_processes=2).devices() == Devices(2, are_gpus=machine.has_gpu())
    told = "distributed_type: FSDP\nuse_cpu: false\nfsdp_config: {fsdp_version: 2, fsdp_reshard_after_forward: false, "
    file = write("fsdp.yaml", told + "fsdp_activation_checkpointing: true}")
    found = Launch(config_file=str(file)).devices()
    assert found == Devices(1, are_gpus=True, sharded=True, reshards=False, checkpoints=True)


def test_a_model_that_a_stage_will_make_has_the_sizes_of_what_it_is_made_from(
    llama_8b: Decoder, tmp_path: Path
) -> None:
    from posttrain import sft

    keys = {"model": str(tmp_path / "none"), "data": [{"path": str(tmp_path / "chats.jsonl")}], "precision": "float32"}
    given = {"model": Cost(parameters=llama_8b.parameters, decoder=llama_8b), "data.0.path": Cost(tokens=1e6, rows=1e3)}
    cost = sft.cost(sft.Config.model_validate({**keys, "per_device_train_batch_size": 1}), given)
    assert cost.memory == memory.of_training(llama_8b, Training(1024, is_gpu=machine.has_gpu()))
    assert (cost.memory_bytes, cost.decoder) == (cost.memory.total, llama_8b)
    assert cost.flops == 3e6 * (6 * llama_8b.parameters + 12 * 32 * 4096 * 1024)

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cordee.cost import decoder_parameters
from cordee.errors import Fault, UserError
from pretrain.data.loader import IGNORED, assemble, open_split
from pretrain.training.model import Objective, build, require_documents_apart
from pretrain.training.settings import Settings

MODELS = Path(__file__).parents[2] / "configs" / "models"
MICRO = MODELS / "apertus-micro.yaml"
SETTINGS = Settings(max_steps=9, global_batch_size=8, sequence_length=64, learning_rate=1e-3, precision="float32")


@pytest.fixture
def tokens(make_tokens):
    return make_tokens("tokens", [20, 13, 31, 40])


@pytest.fixture
def split(tokens):
    return open_split(tokens, "train", 64, "error", "data.0.tokens")


def gradients(objective):
    return {name: weights.grad.clone() for name, weights in objective.named_parameters() if weights.grad is not None}


def test_documents_of_one_row_give_the_losses_and_gradients_of_each_alone(tokens, split):
    model = build(MICRO, tokens, 64, seed=3).double()
    objective = Objective(model, SETTINGS)
    packed = assemble([(split, np.array([0, 1, 2]))], 1, 80, 2)
    together, *_ = objective(*packed.to("cpu"))
    together.sum().backward()
    packed_gradients = gradients(objective)
    objective.zero_grad()
    alone = []
    for piece in range(3):
        length = int(split.lengths[piece])
        batch = assemble([(split, np.array([piece]))], 1, length, 2)
        nats, *_ = objective(*batch.to("cpu"))
        nats.sum().backward()
        alone.append(nats.detach())
    assert torch.allclose(together[:, :64], torch.cat(alone, 1), rtol=1e-6, atol=1e-6)  # the loss itself is float32
    for name, gradient in gradients(objective).items():
        assert torch.allclose(packed_gradients[name], gradient, rtol=1e-5, atol=1e-8), name


def test_a_token_changes_no_logit_of_another_document(tokens, split):
    model = build(MICRO, tokens, 64, seed=3)
    batch = assemble([(split, np.array([0, 1]))], 1, 40, 2)
    changed = batch.input_ids.clone()
    changed[0, 4] = 77
    first, second = (
        model(input_ids=ids, position_ids=batch.position_ids, use_cache=False).logits
        for ids in (batch.input_ids, changed)
    )
    assert first[0, :4].equal(second[0, :4])
    assert not first[0, 4:20].allclose(second[0, 4:20])
    assert first[0, 20:].equal(second[0, 20:])


def test_the_loss_is_the_negative_log_probability_and_nothing_where_there_is_no_label(tokens, split):
    model = build(MICRO, tokens, 64, seed=3)
    batch = assemble([(split, np.array([1, 2]))], 1, 64, 2)
    nats, *_ = Objective(model, SETTINGS)(*batch.to("cpu"))
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits.double()
    for at in range(64):
        label = int(batch.labels[0, at])
        expected = 0.0 if label == IGNORED else float(logits[0, at].logsumexp(0) - logits[0, at, label])
        assert float(nats[0, at]) == pytest.approx(expected, abs=1e-5)


def test_a_loss_of_the_models_own_is_refused(tokens, tmp_path):
    path = tmp_path / "experts.yaml"
    shape = "hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2, num_local_experts: 2"
    path.write_text(f"{{model_type: mixtral, {shape}, num_key_value_heads: 1, output_router_logits: true}}")
    with pytest.raises(UserError, match=r"output_router_logits: the auxiliary loss of the router \(0\.001\)"):
        build(path, tokens, 64, 0)


def test_a_model_that_ignores_where_documents_begin_is_found(tokens):
    class Leaking(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.config, self._no_split_modules = model, model.config, None

        def forward(self, input_ids, position_ids, use_cache):  # noqa: ARG002 - ignoring one is the fault
            return self.model(input_ids=input_ids, use_cache=use_cache)

    model = build(MICRO, tokens, 64, seed=3)
    require_documents_apart(Objective(model, SETTINGS), torch.device("cpu"))
    with pytest.raises(Fault, match="lets documents of one row see each other"):
        require_documents_apart(Objective(Leaking(model), SETTINGS), torch.device("cpu"))


def test_a_new_model_has_the_tokens_vocabulary_and_special_tokens_and_follows_from_the_seed(tokens):
    first, same, other = (build(MICRO, tokens, 64, seed=seed) for seed in (3, 3, 4))
    assert first.config.vocab_size == 512
    assert (first.config.bos_token_id, first.config.eos_token_id, first.config.pad_token_id) == (0, 1, 2)
    assert {weights.dtype for weights in first.parameters()} == {torch.float32}
    assert all(a.equal(b) for a, b in zip(first.parameters(), same.parameters(), strict=True))
    assert not first.lm_head.weight.equal(other.lm_head.weight)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("hiden_size: 64", r"m\.yaml: hiden_size: apertus has no field 'hiden_size'; did you mean 'hidden_size'\?"),
        ("vocab_size: 100", r"m\.yaml: vocab_size: the model's vocabulary of 100 does not hold the 512"),
        ("hidden_size: wide", r"m\.yaml: model: apertus refuses it"),
        ("model_type: apertuss", r"m\.yaml: model_type: no architecture 'apertuss'; did you mean 'apertus'\?"),
        ("max_position_embeddings: 32", r"m\.yaml: max_position_embeddings: 32 positions do not hold"),
    ],
)
def test_a_model_file_that_does_not_fit_is_an_error_that_names_the_field(tokens, tmp_path, line, message):
    name = line.partition(":")[0]
    kept = [row for row in MICRO.read_text().splitlines() if not row.startswith(name)]
    (tmp_path / "m.yaml").write_text("\n".join([*kept, line]))
    with pytest.raises(UserError, match=message):
        build(tmp_path / "m.yaml", tokens, 64, seed=0)


@pytest.mark.parametrize(
    ("name", "vocab_size", "expected"), [("apertus-tiny", 8192, 7.5e6), ("apertus-8b", 131072, 8.05e9)]
)
def test_the_models_that_are_shipped_have_the_size_that_is_said(name, vocab_size, expected):
    import yaml
    from transformers import ApertusConfig, AutoModelForCausalLM

    fields = yaml.safe_load((MODELS / f"{name}.yaml").read_text())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(ApertusConfig(**{**fields, "vocab_size": vocab_size}))
    counted = sum(weights.numel() for weights in model.parameters())
    assert counted == decoder_parameters(fields, vocab_size)
    assert counted == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_what_is_computed_again_gives_the_same_gradients(tokens, split, mode, is_compiled):
    """That it keeps less is tested in tests/cordee/test_memory.py."""
    found = []
    for chosen in ("none", mode):
        settings = SETTINGS.model_copy(update={"activation_checkpointing": chosen})
        objective = Objective(build(MICRO, tokens, 64, seed=3), settings)
        step = torch.compile(objective, backend="aot_eager") if is_compiled else objective
        loss, *_ = step(*assemble([(split, np.array([0, 1, 2]))], 1, 80, 2).to("cpu"))
        loss.sum().backward()
        found.append(gradients(objective))
    assert all(found[1][name].equal(gradient) for name, gradient in found[0].items())

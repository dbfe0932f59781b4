"""Adapters that vLLM does not serve, and that merging or transformers does, as its refusal says."""

from pathlib import Path

import pytest
import torch
from chat_models import make_adapter, make_model
from peft import IA3Config, LoraConfig, get_peft_model
from tokenizers import AddedToken, Tokenizer

from cordee import files, model_folder
from cordee.compute import adapter, engine, serving
from cordee.compute.logprobs import score
from cordee.compute.model import grow_tables, open_model
from cordee.compute.tokenizer import copy_tokenizer, open_tokenizer
from cordee.errors import UserError
from cordee.stage import Context
from eval import generate

NEW = ["<|turn|>", "<|stop|>"]


@pytest.fixture(scope="session")
def grown(checkpoints, tmp_path_factory):
    """An adapter with two tokens that its base lacks, as SFT with `lora` and `added_tokens` writes it."""
    base, folder = checkpoints["first"], tmp_path_factory.mktemp("grown") / "adapter"
    model = open_model(base)
    rows = model.get_input_embeddings().weight.shape[0]
    grow_tables(model, rows + len(NEW))
    new = list(range(rows, rows + len(NEW)))
    torch.manual_seed(5)
    config = LoraConfig(
        target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM",
        trainable_token_indices={"embed_tokens": new, "lm_head": new},
    )  # fmt: skip
    adapted = get_peft_model(model, config)
    for name, weights in adapted.named_parameters():
        if "trainable_tokens_delta" in name:
            weights.data = torch.randn(weights.shape)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    copy_tokenizer(base, folder)
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    own.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in NEW])
    own.save(str(folder / "tokenizer.json"))
    assert open_tokenizer(folder).convert_tokens_to_ids(NEW) == new
    return folder


@pytest.fixture
def answers(tmp_path, held_out):
    """Answers of a folder's model by the stage, with transformers."""

    def call(folder: Path) -> list[dict[str, object]]:
        (tmp_path / "out").mkdir()
        config = {"models": {"dpo": str(folder)}, "prompts": str(held_out["language"]), "engine": "transformers"}
        context = Context(out=tmp_path / "out", seed=3, events=tmp_path / "events.jsonl")
        generate.run(generate.Config.model_validate({**config, "max_tokens": 2, "max_prompts": 1}), context)
        return files.read_json_lines(tmp_path / "out" / "samples.jsonl")

    return call


@pytest.mark.skipif(
    "not __import__('importlib.util').util.find_spec('vllm')", reason="vLLM is not installed on this platform"
)
@pytest.mark.parametrize("name", ["grown", "ia3"])
def test_what_the_refusal_of_vllm_advises_works(name, grown, checkpoints, answers, tmp_path):
    folder, hint = grown, "trainable_token_indices; merge the adapter first"
    if name == "ia3":
        folder, hint = tmp_path / "ia3", "peft_type: IA3; engine: transformers does"
        config = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
        get_peft_model(open_model(checkpoints["first"]), config).save_pretrained(folder)
    with pytest.raises(UserError) as caught:
        serving.require_served({"dpo": folder}, engine.Settings("vllm"))
    assert str(caught.value).endswith(f"models.dpo: vLLM serves no adapter with {hint}")
    assert len(answers(folder)) == 1


def test_lm_evals_own_opener_gives_an_adapter_with_new_tokens_the_same_figures(grown):
    """That of its command, which the results name with `peft`."""
    from lm_eval.models.huggingface import HFLM

    from eval.measuring import backends

    opener = backends.Models(engine.Settings("transformers", 256), [])
    lm = opener.open(grown)
    ids = [open_tokenizer(grown)(f"{NEW[0]}Tous les hommes naissent libres{NEW[1]} et égaux.")["input_ids"]]
    rows = open_model(model_folder.served_base(grown)).get_input_embeddings().weight.shape[0]
    assert {rows, rows + 1} < set(ids[0])
    (own,), (expected,) = score(lm.model.eval(), ids), score(adapter.open_served(grown), ids)
    assert own.logprobs.equal(expected.logprobs)
    command = {name: str(value) for name, value in opener.command_arguments(grown, None).items()}
    (theirs,) = score(HFLM(**command, device="cpu").model.eval(), ids)
    torch.testing.assert_close(theirs.logprobs, own.logprobs, atol=1e-5, rtol=0)


def test_an_adapter_of_plain_weights_leaves_the_tables_as_they_are(checkpoints, tmp_path):
    folder = make_adapter(tmp_path / "plain", checkpoints["first"], seed=1)
    rows = open_model(checkpoints["first"]).get_input_embeddings().weight.shape[0]
    assert adapter.open_served(folder).get_input_embeddings().weight.shape[0] == rows


def test_an_adapter_that_lm_eval_does_not_open_is_one_line(tmp_path):
    """It ties the head to the embedding once more, in which PEFT has put a layer for the trained tokens."""
    from eval.measuring import backends

    base = make_model(tmp_path / "tied", tied=True)
    folder = make_adapter(tmp_path / "adapter", base, seed=1, trainable_token_indices={"embed_tokens": [5, 6]})
    adapter.open_served(folder)
    with pytest.raises(UserError, match=r"adapter: lm-eval does not open .*; merge the adapter first$"):
        backends.Models(engine.Settings("transformers", 256), []).open(folder)

import json
import shutil
from pathlib import Path

import manifests
import pytest
import torch
from safetensors.torch import load_file, save_file

from cordee import files
from cordee.compute.model import open_model, remarks, save_model, stop_token_ids
from cordee.compute.tokenizer import open_tokenizer
from cordee.errors import Fault, UserError

SPECIAL = ("<s>", "</s>", "<pad>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>")


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE({letter: at for at, letter in enumerate([*SPECIAL, *sorted(letters)])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(list(SPECIAL))
    names = dict(zip(("bos_token", "eos_token", "pad_token"), SPECIAL, strict=False))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = (
        "{{ bos_token }}{% for message in messages %}<|assistant_start|>{{ message['content'] }}<|assistant_end|>"
        "{% endfor %}"
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return folder


def tiny(tied: bool = False) -> torch.nn.Module:
    from transformers import ApertusConfig, ApertusForCausalLM

    torch.manual_seed(0)
    config = ApertusConfig(
        vocab_size=263,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=tied,
    )
    return ApertusForCausalLM(config)


@pytest.fixture
def folder(tmp_path: Path, tokenizer_folder: Path) -> Path:
    save_model(tiny(), tmp_path / "base@1", tokenizer=tokenizer_folder)
    return tmp_path / "base@1"


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_opens_with_the_same_weights(tmp_path: Path, tokenizer_folder: Path, tied: bool) -> None:
    model = tiny(tied)
    save_model(model, tmp_path / "base@1", tokenizer=tokenizer_folder)
    opened = open_model(tmp_path / "base@1")
    for name, value in model.state_dict().items():
        assert value.equal(opened.state_dict()[name]), name


def test_a_saved_model_is_a_plain_folder_that_stops_at_every_end(folder: Path, tokenizer_folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "probe.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [1, 6] == stop_token_ids(folder)
    assert (generation["bos_token_id"], generation["pad_token_id"]) == (0, 2)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (tokenizer_folder / name).read_bytes()
    assert not list(folder.parent.glob(".*"))


MAKERS = {
    "a lone number": {"eos_token_id": 4, "temperature": 0.7, "do_sample": True, "pad_token_id": 1},
    "a list": {"eos_token_id": [6, 1], "transformers_version": "4.40.1"},
    "what transformers refuses to save": {"eos_token_id": 6, "temperature": 0.6, "do_sample": False},
    "written by transformers": {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 6},
    "a field of another version": {"eos_token_id": [6], "stop_after_thinking": [6, 4]},
}


@pytest.mark.parametrize("maker", MAKERS)
def test_the_makers_generation_config_survives_a_training(folder: Path, tmp_path: Path, maker: str) -> None:
    files.write_json(folder / "generation_config.json", MAKERS[maker])
    model = open_model(folder)
    model.generation_config.eos_token_id = [0]  # as trainers do
    for place in ("checkpoint", "trained"):
        save_model(model, tmp_path / place, tokenizer=folder, chats="6" in str(MAKERS[maker]["eos_token_id"]))
        assert files.read_json(tmp_path / place / "generation_config.json") == MAKERS[maker]
        stops = MAKERS[maker]["eos_token_id"]
        assert stop_token_ids(tmp_path / place) == (stops if isinstance(stops, list) else [stops])


LETTER = 20
"""The id of a letter in the vocabulary of these tests."""
USED, NOT_USED = "it ends every generation", "it is taken for a default and not used"
STOPS = {
    "written by transformers": ({"_from_model_config": True, "eos_token_id": LETTER}, {}, [1, 6], NOT_USED),
    "written by transformers, and beside a token": (
        {"_from_model_config": True, "eos_token_id": [LETTER, 6]},
        {},
        [LETTER, 6],
        USED,
    ),
    "in the config": (None, {"eos_token_id": LETTER}, [1, 6], NOT_USED),
    "in the config, beside a token": (None, {"text_config": {"eos_token_id": [LETTER, 4]}}, [1, 6, 4], NOT_USED),
    "in the language model's config": (None, {"language_config": {"eos_token_id": [LETTER, 4]}}, [1, 6, 4], NOT_USED),
    "the maker's own": ({"eos_token_id": [LETTER, 6]}, {}, [LETTER, 6], USED),
}


@pytest.mark.parametrize("case", STOPS)
def test_a_stop_that_is_an_ordinary_token_is_said(folder: Path, case: str) -> None:
    generation, config, stops, said = STOPS[case]
    (folder / "generation_config.json").unlink()
    own = files.read_json(folder / "config.json")
    files.write_json(folder / "config.json", {name: own[name] for name in own if name != "eos_token_id"} | config)
    if generation:
        files.write_json(folder / "generation_config.json", generation)
    assert stop_token_ids(folder) == stops
    file = "generation_config.json" if generation else "config.json"
    assert remarks(folder)[0] == f"{file} names {LETTER} as eos_token_id, '.', an ordinary token: {said}"


def test_a_default_that_is_a_token_of_another_meaning_ends_no_generation_alone(folder: Path) -> None:
    files.write_json(folder / "generation_config.json", {"_from_model_config": True, "eos_token_id": 2})  # <pad>
    assert stop_token_ids(folder) == [1, 6, 2]


def test_a_stop_that_no_token_is_is_said(folder: Path) -> None:
    files.write_json(folder / "generation_config.json", {"eos_token_id": [6, 300]})
    said = "generation_config.json names 300 as eos_token_id, which no token has: it ends every generation"
    assert remarks(folder)[0] == said


def test_a_template_that_writes_the_date_is_told(folder: Path) -> None:
    known = remarks(folder)
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template + "{%- if 0 %}{{ strftime_now('%d') }}{% endif %}")
    assert remarks(folder) == ["the chat template writes the day's date: chats have other tokens tomorrow", *known]


def test_a_training_on_chats_adds_what_ends_an_answer_and_no_other_does(folder: Path, tmp_path: Path) -> None:
    maker = {"eos_token_id": 1, "max_new_tokens": 2048}
    files.write_json(folder / "generation_config.json", maker)
    said = "the chat template ends an answer with '<|assistant_end|>', and a generation ends with '</s>'"
    assert remarks(folder) == [said]
    for chats, stops in ((True, [1, 6]), (False, 1)):
        save_model(open_model(folder), tmp_path / f"{chats}", tokenizer=folder, chats=chats)
        assert files.read_json(tmp_path / f"{chats}" / "generation_config.json") == maker | {"eos_token_id": stops}
    assert remarks(tmp_path / "True") == []
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no chat of mine') }}")
    assert remarks(folder) == []


def test_saving_into_a_folder_that_is_there_leaves_what_else_it_holds(folder: Path, tokenizer_folder: Path) -> None:
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / ".saving").mkdir()
    (folder / ".saving" / "half").write_text("a kill has left this")
    model = tiny()
    model.lm_head.weight.data += 1
    save_model(model, folder, tokenizer=tokenizer_folder)
    assert open_model(folder).lm_head.weight.equal(model.lm_head.weight)
    assert (folder / "metrics.jsonl").exists()
    assert not (folder / ".saving").exists()
    assert not (folder / "half").exists()


def test_templates_beside_the_default_are_saved_and_saved_again(folder: Path, tmp_path: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("{{ tools }}")
    for _ in range(2):
        (tmp_path / "sft@1").mkdir(exist_ok=True)
        save_model(tiny(), tmp_path / "sft@1", tokenizer=folder)
        assert open_tokenizer(tmp_path / "sft@1").chat_template["tool_use"] == "{{ tools }}"


def test_a_save_that_is_killed_before_its_end_leaves_no_model(
    folder: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose weights are already another's must not pass for the old one."""
    rename = Path.replace

    def kill(path: Path, target: Path) -> Path:
        if path.name == "tokenizer.json":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        save_model(tiny(), folder, tokenizer=tokenizer_folder)
    with pytest.raises(UserError, match=r"has no config\.json"):
        open_model(folder)


def test_the_stored_type_is_kept_unless_another_is_asked_for(tmp_path: Path, tokenizer_folder: Path) -> None:
    save_model(tiny().to(torch.bfloat16), tmp_path / "base@1", tokenizer=tokenizer_folder)
    assert open_model(tmp_path / "base@1").dtype == torch.bfloat16
    assert open_model(tmp_path / "base@1", dtype=torch.float32).dtype == torch.float32


def test_a_folder_that_is_no_model_is_named_for_what_it_is(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model: is no folder"):
        open_model(tmp_path / "nothing", key="model")
    empty = tmp_path / "empty"
    (empty / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"has no config\.json"):
        open_model(empty)
    shutil.copytree(folder, empty / "checkpoints" / "500")
    with pytest.raises(UserError, match="did you mean checkpoints/500"):
        open_model(empty / "checkpoints")
    (empty / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="is an adapter, not a model"):
        open_model(empty)
    (folder / "model.safetensors").rename(folder / "model.gguf")
    with pytest.raises(UserError, match="holds no weights"):
        open_model(folder)
    with pytest.raises(UserError, match="holds no tokenizer"):
        open_tokenizer(empty)


def test_a_truncated_checkpoint_is_a_fault(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(Fault, match="can't be opened as a model"):
        open_model(folder)


def test_a_flipped_bit_is_seen_by_the_hash_that_was_published(folder: Path) -> None:
    file = folder / "model.safetensors"
    manifests.seal(folder)
    open_model(folder)
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    with pytest.raises(Fault, match=r"model\.safetensors: is damaged"):
        open_model(folder)


def test_a_flipped_bit_in_a_checkpoint_within_an_artifact_is_seen_too(folder: Path, tmp_path: Path) -> None:
    inside = shutil.copytree(folder, tmp_path / "sft@1" / "checkpoints" / "5")
    file = inside / "model.safetensors"
    item = {"path": "checkpoints/5/model.safetensors", "bytes": file.stat().st_size, "sha256": "0" * 64}
    manifests.seal(tmp_path / "sft@1", files=[item])
    with pytest.raises(Fault, match="is damaged"):
        open_model(inside)


def test_a_manifest_of_another_program_beside_a_model_is_left_alone(folder: Path) -> None:
    folder = folder.rename(folder.with_name("base"))
    (folder / "manifest.json").write_text('{"files": 3}')
    assert open_model(folder)
    assert open_tokenizer(folder)


def test_weights_in_shards_are_opened(folder: Path) -> None:
    model = open_model(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    for name, value in open_model(folder).state_dict().items():
        assert value.equal(model.state_dict()[name]), name


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_value_that_is_not_finite_is_a_fault(value: str, folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][3, 3] = float(value)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Fault, match=r"lm_head\.weight holds values that are not finite"):
        open_model(folder)


def test_weights_that_are_missing_unknown_or_misshapen_are_a_fault(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = load_file(file)
    save_file({name: value for name, value in whole.items() if name != "lm_head.weight"}, file, {"format": "pt"})
    with pytest.raises(Fault, match=r"missing keys: lm_head\.weight"):
        open_model(folder)
    save_file({**whole, "model.extra.weight": torch.ones(2)}, file, {"format": "pt"})
    with pytest.raises(Fault, match=r"unexpected keys: model\.extra\.weight"):
        open_model(folder)
    save_file({**whole, "lm_head.weight": torch.ones(5, 32)}, file, {"format": "pt"})
    with pytest.raises(Fault, match=r"mismatched keys: .*lm_head\.weight"):
        open_model(folder)


def test_a_damaged_config_or_tokenizer_is_a_fault(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(Fault, match="can't be opened as a tokenizer"):
        open_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(Fault, match=r"config\.json: can't be read as JSON"):
        open_model(folder)


def test_gemma_2_keeps_the_softcap_of_its_attention(tmp_path):
    """transformers' sdpa leaves it out without a word."""
    from transformers import AutoModelForCausalLM, Gemma2Config

    config = Gemma2Config(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, attn_logit_softcapping=0.01, query_pre_attn_scalar=8,
    )  # fmt: skip
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weights in made.parameters():
            weights.mul_(20)
    made.save_pretrained(tmp_path)
    ids = torch.arange(32).unsqueeze(0)
    with torch.no_grad():
        ours, eager, sdpa = (
            model(ids).logits
            for model in (
                open_model(tmp_path, dtype=torch.float32),
                *(
                    AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
                    for name in ("eager", "sdpa")
                ),
            )
        )
    assert torch.equal(ours, eager)
    assert not torch.allclose(ours, sdpa, atol=1e-3)

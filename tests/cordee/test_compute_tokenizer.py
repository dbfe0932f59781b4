"""A tokenizer that is opened gives the ids of its `tokenizer.json`, or is refused by name."""

import json
from pathlib import Path
from typing import Any

import manifests
import pytest
import stock_tokenizers
from stock_tokenizers import STOCK, Made
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from cordee.compute.tokenizer import copy_tokenizer, open_tokenizer, tokenizer_folder
from cordee.errors import Fault, UserError

TEXTS = ["The capital of France", "  is\tParis.\n\n 1789, 12345 x", "ééà ça 東京 🙂 мир", "a  b", "Würde der Menschen"]


def changed(maker: str, kind: str | None = None, **settings: Any) -> Made:
    """A stock tokenizer whose settings, or the model beside it, are another's."""
    tokenizer, own, its_kind = STOCK[maker]()
    return tokenizer, own | settings, kind or its_kind


FLAGS = {"single_word": False, "lstrip": True, "rstrip": True, "normalized": False, "special": True}
WRONG = {
    "pieces named, bytes written": ("llama3", None, {"tokenizer_class": "LlamaTokenizerFast"}),
    "digits grouped": ("smollm2", None, {"tokenizer_class": "GemmaTokenizer"}),
    "bytes named, pieces written": ("llama2", None, {"tokenizer_class": "GPT2Tokenizer"}),
    "words of another language model": ("llama3", None, {"tokenizer_class": "BertTokenizer"}),
    "a class that can't read it": ("llama3", None, {"tokenizer_class": "T5Tokenizer"}),
    "implied by the model": ("llama3", "qwen2", {}),
    "tokens that the class adds": ("falcon", None, {"tokenizer_class": "LlamaTokenizer"}),
    "code from elsewhere": (
        "qwen3",
        "llama",
        {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}},
    ),
    "spaces beside a token": (
        "llama3",
        None,
        {"added_tokens_decoder": {"3": {"content": "<|end_header_id|>", **FLAGS}}},
    ),
}


def texts(tokenizer: Tokenizer) -> list[str]:
    """Texts with each added token in their midst."""
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    return [*TEXTS, *(f"der {token} Menschen{token}\n" for token in added)]


def require_same(opened: Any, folder: Path) -> None:
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert {token: opened.get_vocab().get(token) for token in own.get_vocab()} == own.get_vocab()
    assert not set(opened.get_vocab()) - set(own.get_vocab()) - {"[PAD]"}
    for special in (True, False):
        expected = [encoding.ids for encoding in own.encode_batch(texts(own), add_special_tokens=special)]
        assert opened(texts(own), add_special_tokens=special)["input_ids"] == expected


@pytest.mark.parametrize("beside_model", [True, False])
@pytest.mark.parametrize("maker", STOCK)
def test_a_stock_tokenizer_has_its_own_ids_and_tokens(tmp_path, maker, beside_model):
    folder = stock_tokenizers.write(tmp_path, STOCK[maker](), beside_model=beside_model)
    opened = open_tokenizer(folder)
    require_same(opened, folder)
    require_same(AutoTokenizer.from_pretrained(tokenizer_folder(folder)), folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        if settings.get(name):
            assert getattr(opened, name) == settings[name]


@pytest.mark.parametrize("case", WRONG)
def test_a_class_that_encodes_otherwise_is_not_used(tmp_path, case):
    maker, kind, settings = WRONG[case]
    folder = stock_tokenizers.write(tmp_path / "a", changed(maker, kind, chat_template="{{ messages }}", **settings))
    with pytest.raises(Exception, match=r".*"):  # the trap, as transformers has it
        require_same(AutoTokenizer.from_pretrained(folder, trust_remote_code=False), folder)
    for _ in range(2):  # the second time without a probe
        opened = open_tokenizer(folder)
        require_same(opened, folder)
        assert opened.eos_token == STOCK[maker]()[1]["eos_token"]
        assert opened.chat_template == "{{ messages }}"
    assert tokenizer_folder(folder) != folder
    require_same(AutoTokenizer.from_pretrained(tokenizer_folder(folder)), folder)


def test_a_copy_holds_the_same_bytes_but_for_the_class_that_was_wrong(tmp_path):
    right = stock_tokenizers.write(tmp_path / "right", STOCK["llama3"]())
    wrong = stock_tokenizers.write(tmp_path / "wrong", changed("llama3", tokenizer_class="LlamaTokenizer"))
    for folder in (right, wrong):
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        (copy := folder / "copy").mkdir()
        copy_tokenizer(folder, copy)
        require_same(AutoTokenizer.from_pretrained(copy), folder)
        for name in ("tokenizer.json", "chat_template.jinja"):
            assert (copy / name).read_bytes() == (folder / name).read_bytes()
    assert (right / "copy/tokenizer_config.json").read_bytes() == (right / "tokenizer_config.json").read_bytes()
    before, after = (json.loads((path / "tokenizer_config.json").read_text()) for path in (wrong, wrong / "copy"))
    assert after == before | {"tokenizer_class": "PreTrainedTokenizerFast"}


@pytest.mark.parametrize("settings", [{}, {"tokenizer_class": "LlamaTokenizer"}])
def test_templates_beside_the_default_are_copied_opened_and_hashed(tmp_path, settings):
    folder = stock_tokenizers.write(tmp_path / "sft@1", changed("llama3", **settings))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    tool_use = folder / "additional_chat_templates/tool_use.jinja"
    tool_use.parent.mkdir()
    for text in ("{{ tools }}", "{{ tools }} and more"):
        tool_use.write_text(text)
        assert open_tokenizer(folder).chat_template == {"default": "{{ messages }}", "tool_use": text}
    (copy := tmp_path / "copy").mkdir()
    copy_tokenizer(folder, copy)
    assert open_tokenizer(copy).get_chat_template(tools=[{}]) == "{{ tools }} and more"
    manifests.seal(folder)
    tool_use.write_text("{{ tools }} and else")
    with pytest.raises(Fault, match=r"tool_use\.jinja: is damaged"):
        open_tokenizer(folder)


def test_a_tokenizer_that_can_not_be_opened_rightly_is_refused_by_name(tmp_path):
    folder = stock_tokenizers.write(tmp_path, changed("llama3", split_special_tokens=True))
    said = (
        r"tokenizer_config\.json: model: transformers does not open it with the ids of tokenizer\.json: .* encodes 'a <"
    )
    with pytest.raises(UserError, match=said):
        open_tokenizer(folder, key="model")


def test_a_file_that_was_changed_since_is_opened_anew(tmp_path):
    folder = stock_tokenizers.write(tmp_path, STOCK["llama3"]())
    open_tokenizer(folder)
    stock_tokenizers.write(tmp_path, changed("llama3", tokenizer_class="GemmaTokenizer"))
    require_same(open_tokenizer(folder), folder)
    (folder / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(Fault, match=r"tokenizer\.json: can't be opened as a tokenizer"):
        open_tokenizer(folder)

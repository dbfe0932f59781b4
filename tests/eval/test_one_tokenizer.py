"""lm-eval and vLLM open a folder by `AutoTokenizer` themselves: what they would do with a wrong class is seen.

And it does not reach them where they are given `tokenizer_folder`.
"""

import importlib.util
import json
import shutil

import pytest
import torch

from cordee.compute.model import open_model, stop_token_ids
from cordee.compute.tokenizer import open_tokenizer, tokenizer_folder
from eval.measuring import parity

CHATS = [
    [{"role": "user", "content": f"Which  language\tis {text}?"}, {"role": "assistant", "content": f"{text}, 1789"}]
    for text in ("Alle Menschen", "Tous les hommes")
]


def encode(tokenizer):
    return [tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"] for chat in CHATS]


@pytest.fixture
def misnamed(checkpoints, tmp_path):
    """A byte-level tokenizer that names the class of another kind."""
    folder = shutil.copytree(checkpoints["first"], tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "LlamaTokenizerFast"}))
    return folder


def test_lm_eval_sends_what_training_saw(misnamed, checkpoints, tmp_path):
    from lm_eval.models.huggingface import HFLM

    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    chats, trained = parity.read(file, len(CHATS), misnamed, 500)
    assert trained == encode(open_tokenizer(checkpoints["first"]))
    model = open_model(misnamed, dtype=torch.float32)
    by_itself, given = (
        HFLM(pretrained=model, tokenizer=str(folder), add_bos_token=False)
        for folder in (misnamed, tokenizer_folder(misnamed))
    )
    ends = stop_token_ids(misnamed)
    assert parity.encoded_differently_by_lm_eval(by_itself, chats, trained, ends) == len(CHATS)
    assert {ids[-1] for ids in trained} < {*ends}
    begin = trained[0][0]
    for behind, count in (
        [[], 0],
        [ends, 0],
        [[begin, *ends], 0],
        [[begin], len(CHATS)],
    ):  # as Cohere's two, GLM's none
        ids = [[*ids[:-1], *behind] for ids in trained]
        assert parity.encoded_differently_by_lm_eval(given, chats, ids, ends) == count


@pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vLLM is not installed")
def test_vllm_encodes_what_training_saw(misnamed):
    from cordee.compute import engine

    engine.prepare()
    from vllm.tokenizers import get_tokenizer

    trained = encode(open_tokenizer(misnamed))
    place = engine.Settings("vllm", 64).for_vllm(misnamed)["tokenizer"]
    assert encode(get_tokenizer(str(misnamed))) != trained
    assert encode(get_tokenizer(place)) == trained

"""A model's folder from an attacker, and a resume point with planted pickles: no code of theirs ever runs."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import chats, make, sft_keys
from peft import LoraConfig, get_peft_model
from stopping import StopsAfter
from transformers import AutoModelForCausalLM

from cordee import files, model_folder
from cordee.chat.templates import Template
from cordee.compute import adapter, resume
from cordee.compute.model import open_config, open_model, open_shapes
from cordee.compute.tokenizer import open_tokenizer
from cordee.errors import CordeeError, Stopped, UserError
from cordee.stage import Context
from posttrain import sft

NewContext = Callable[[str], Context]
PICKLES = ["pytorch_model.bin", "adapter_model.bin", "model.pt", "consolidated.00.pth", "weights.ckpt"]


class Planted:
    """Makes a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def plant(path: Path, mark: Path, *, old: bool = False) -> None:
    """A pickle in torch's format, or a plain one."""
    if old:
        path.write_bytes(pickle.dumps(Planted(mark)))
    else:
        torch.save({"weight": Planted(mark)}, path)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A folder that is made if code of a planted file runs."""
    return tmp_path / "it-ran"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make(tmp_path / "base", "llama")


def test_the_plants_would_run_where_they_are_unpickled(tmp_path: Path, mark: Path) -> None:
    for old in (False, True):
        plant(tmp_path / "planted", mark, old=old)
        if old:
            pickle.loads((tmp_path / "planted").read_bytes())  # noqa: S301 - our own
        else:
            torch.load(tmp_path / "planted", weights_only=False)
        mark.rmdir()


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", PICKLES)
def test_no_pickle_in_a_model_s_folder_is_opened(base: Path, mark: Path, name: str, *, old: bool) -> None:
    plant(base / name, mark, old=old)
    if not name.startswith("adapter"):
        expected = open_model(base).get_input_embeddings().weight  # beside safetensors it does not count
        (base / "model.safetensors").rename(base.parent / "kept.safetensors")
        with pytest.raises(
            UserError, match=r"no safetensors, and .* is a pickle, which can run code: it is not opened"
        ):
            open_model(base, key="model")
        (base.parent / "kept.safetensors").rename(base / "model.safetensors")
        assert open_model(base).get_input_embeddings().weight.equal(expected)
    assert not mark.exists()


@pytest.mark.parametrize("name", PICKLES)
def test_no_pickle_in_an_adapters_folder_is_opened(base: Path, tmp_path: Path, mark: Path, name: str) -> None:
    folder = tmp_path / "adapter"
    opened = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(opened, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(folder)
    plant(folder / name, mark)
    if model_folder.is_adapter(folder):
        assert adapter.open_served(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CordeeError):
        adapter.open_served(folder)
    with pytest.raises(CordeeError):
        adapter.weights(folder)
    assert not mark.exists()


def own_code(folder: Path, mark: Path, kind: str) -> None:
    """Code in a model's folder, as its maker's remote code is."""
    (folder / "own.py").write_text(
        f"import os; os.mkdir({str(mark)!r})\n"
        "from transformers import LlamaConfig as OwnConfig, LlamaForCausalLM as Own, LlamaTokenizerFast as OwnTokens\n"
    )
    config = files.read_json(folder / "config.json")
    told = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.OwnTokens", None]}
    files.write_json(folder / "config.json", config | {"auto_map": told, "model_type": kind})
    file = folder / "tokenizer_config.json"
    files.write_json(file, files.read_json(file) | {"auto_map": {"AutoTokenizer": ["own.OwnTokens", None]}})


def test_code_in_a_model_s_folder_is_not_run(base: Path, mark: Path) -> None:
    own_code(base, mark, "llama")
    assert open_model(base)  # by transformers' own class
    assert open_shapes(base)
    assert open_tokenizer(base)
    own_code(base, mark, "own")
    for opens in (open_model, open_shapes, open_config):
        with pytest.raises(UserError, match="has no model 'own', and code in a model's folder is not run"):
            opens(base)
    assert open_tokenizer(base)
    assert not mark.exists()


def test_nothing_asks_whether_code_may_run(base: Path, tmp_path: Path, mark: Path) -> None:
    """A person who answers `y` to whatever is asked has not run it either."""
    own_code(base, mark, "own")
    data = chats(tmp_path)
    command = [sys.executable, "-P", "-c", "from cordee.cli import main; main()"]
    for words in (["chat", str(base)], ["data", str(data), "--model", str(base)]):
        done = subprocess.run([*command, *words], input="y\n" * 9, capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert "code in a model's folder is not run" in done.stderr
    assert not mark.exists()


CONFIGS: list[dict[str, Any]] = [
    {"attn_implementation": "owner/kernel"},
    {"_attn_implementation": "owner/kernel@main"},
    {"_attn_implementation_internal": "owner/kernel"},
    {"attn_implementation": {"text_config": "owner/kernel"}},
    {"text_config": {"_experts_implementation_internal": "owner/kernel"}},
    {"trust_remote_code": True},
    {"vision_config": {"layers": {"trust_remote_code": "yes"}}},
    {"parts": [{"trust_remote_code": True}]},
]


@pytest.mark.parametrize("fields", CONFIGS, ids=json.dumps)
def test_a_config_that_asks_for_code_is_refused(base: Path, fields: dict[str, Any]) -> None:
    files.write_json(base / "config.json", files.read_json(base / "config.json") | fields)
    with pytest.raises(UserError, match=r"config\.json: .*asks for code that is none of transformers'"):
        open_model(base)


def test_an_adapters_config_names_no_module(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    opened = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(opened, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(folder)
    file = folder / "adapter_config.json"
    files.write_json(file, files.read_json(file) | {"megatron_config": {"a": 1}, "megatron_core": "antigravity"})
    with pytest.raises(UserError, match=r"megatron_config: .* asks for code"):
        adapter.open_served(folder)


@pytest.mark.parametrize("fields", [{"attn_implementation": "sdpa"}, {"trust_remote_code": False}])
def test_a_config_that_asks_for_none_is_opened(base: Path, fields: dict[str, Any]) -> None:
    files.write_json(base / "config.json", files.read_json(base / "config.json") | fields)
    assert open_model(base)


def test_a_kernel_of_the_hub_is_named_by_the_recipe_alone(base: Path, tmp_path: Path, context: Context) -> None:
    """It is asked for, and is not here; the folder's own config is not what asked."""
    keys = sft_keys(base, chats(tmp_path))
    keys["trainer"]["model_init_kwargs"] = {"attn_implementation": "owner/kernel"}
    with pytest.raises(UserError, match=r"trainer\.model_init_kwargs: transformers refuses it: `kernels` is"):
        sft.run(sft.Config.model_validate(keys), context)


REACHING = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.mkdir('MARK') }}",
    "{{ raise_exception.__globals__['__builtins__']['__import__']('os').mkdir('MARK') }}",
    "{{ messages | attr('__class__') }}",
    "{{ ('{0.__class__}' | attr('format'))(messages) }}",
    "{{ '%s'.__class__.format('{0.__init__.__globals__}', raise_exception) }}",
    "{% set a = messages.append({'role': 'system', 'content': 'x'}) %}{{ messages }}",
    "{% include '/etc/passwd' %}",
]


@pytest.mark.parametrize("text", REACHING)
def test_a_chat_template_reaches_nothing(base: Path, mark: Path, text: str) -> None:
    """It fails, or writes what a sandbox gives in the place of what it reached for: nothing."""
    (base / "chat_template.jinja").write_text(text.replace("MARK", str(mark)))
    messages = [{"role": "user", "content": "hello"}]
    try:
        tokenizer = open_tokenizer(base)
        template = Template(tokenizer)
        said = template.text(template.readable(messages, {}), {}, add_generation_prompt=True)
    except Exception:  # noqa: BLE001 - the sandbox's own errors, or ours of one line
        said = ""
    assert not mark.exists()
    for inside in ("<class", "subclasses", "__globals__", "root:", "'system'"):
        assert inside not in said


@pytest.mark.parametrize("name", [*PICKLES, "optimizer.pt", "rng_state.pth", "shard-1-of-2.safetensors"])
def test_a_resume_point_holds_no_pickle_and_one_beside_it_is_not_opened(
    base: Path, tmp_path: Path, mark: Path, new_context: NewContext, name: str
) -> None:
    keys = sft_keys(base, chats(tmp_path)) | {"resume_steps": 1}
    keys["trainer"]["max_steps"] = 4
    config, context = sft.Config.model_validate(keys), new_context("run")
    with pytest.raises(Stopped):
        sft.run(config, StopsAfter(context.out, context.seed, context.events, steps=2))
    newest, _ = resume.newest(context.out / "resume")
    assert newest
    assert {path.suffix for path in newest.folder.iterdir()} == {".json", ".safetensors"}
    plant(newest.folder / name, mark)
    with pytest.raises(Stopped):
        sft.run(config, StopsAfter(context.out, context.seed, context.events, steps=1))
    assert f"{name} is no part of it" in context.events.read_text()
    assert not mark.exists()

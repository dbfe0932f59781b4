"""What answers in a chat: transformers or vLLM, each of which continues token ids and gives the text piece by piece."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    TextIteratorStreamer,
    set_seed,
)
from transformers.utils import logging

from cordee import model_folder
from cordee.compute import adapter, device, engine, serving
from cordee.compute.tokenizer import open_tokenizer
from cordee.errors import UserError

UNLIMITED = 2**31
"""Positions of a model whose config names no number of them."""
DEFAULT_TOP_K = 50
"""What transformers samples from where a generation config does not say."""
NOT_IN_VLLM = (
    *("num_beams", "typical_p", "epsilon_cutoff", "eta_cutoff", "no_repeat_ngram_size", "bad_words_ids"),
    *("suppress_tokens", "begin_suppress_tokens", "sequence_bias", "min_length", "exponential_decay_length_penalty"),
)
"""Fields of a generation config that change what transformers generates and that vLLM does not have."""
_NEUTRAL: tuple[Any, ...] = (None, 0, 1, [], {})


@dataclass(frozen=True)
class Settings:
    """How answers are generated; None: as the model's own generation config says."""

    max_tokens: int
    """Longest answer, in tokens."""
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0


class Generator(Protocol):
    """A model or an adapter that was opened."""

    tokenizer: PreTrainedTokenizerBase
    longest: int
    """Tokens that the model reads at most."""

    def pieces(self, ids: Sequence[int]) -> Iterator[str]:
        """The text that follows token ids `[seq]`, piece by piece; closing it early ends the generation."""


class Transformers:
    """A model or an adapter in transformers."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        """Open it.

        Raises:
            UserError: the folder is no model.
            Fault: it is damaged.
        """
        logging.disable_progress_bar()
        self.folder, self.settings = folder, settings
        self.model = adapter.open_served(folder).eval().to(device.default())
        self.tokenizer = open_tokenizer(model_folder.tokenizer_of(folder))
        self.longest = model_folder.shape(self.model.config.to_dict()).positions or UNLIMITED
        set_seed(settings.seed)

    def pieces(self, ids: Sequence[int]) -> Iterator[str]:
        """The text that follows."""
        config = _config(self.model.generation_config, self.settings)
        pad = self.tokenizer.pad_token_id
        config.eos_token_id = adapter.stop_token_ids(self.folder)
        config.pad_token_id = self.tokenizer.eos_token_id if pad is None else pad
        config.max_length = None
        config.max_new_tokens = min(self.settings.max_tokens, self.longest - len(ids))

        def work(streamer: TextIteratorStreamer, stop: threading.Event) -> None:
            with torch.no_grad():
                self.model.generate(
                    input_ids=torch.tensor([ids], device=self.model.device),
                    attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=self.model.device),
                    generation_config=config,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([lambda *_, **__: stop.is_set()]),
                )

        yield from _streamed(self.tokenizer, work, skip_prompt=True)


class Vllm:
    """A model or an adapter in vLLM, in the dtype that it is stored in; proven to be what the folder holds."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        """Start vLLM.

        Raises:
            UserError: the folder is no model, vLLM is not installed or does not serve it, or the model's generation
                config has fields that vLLM does not know.
            Fault: it is damaged, or vLLM holds other weights.
        """
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its warnings would stand in the chat
        self.folder, self.settings = folder, settings
        base = model_folder.served_base(folder)
        asked = engine.Settings("vllm", dtype=serving.stored_dtype(base), enforce_eager=True, draws=True)
        serving.require_served({"MODEL": folder}, asked)
        self.sampling = _sampling(base, settings)
        self.tokenizer = open_tokenizer(model_folder.tokenizer_of(folder))
        self.longest = engine.longest_request(folder, None)
        self.engines = serving.Engines(asked, [folder])
        self.engine = self.engines.load(folder)
        self.answers = 0

    def pieces(self, ids: Sequence[int]) -> Iterator[str]:
        """The text that follows."""
        from vllm import SamplingParams

        asked = SamplingParams(
            **self.sampling,
            max_tokens=min(self.settings.max_tokens, self.longest - len(ids)),
            seed=self.settings.seed + self.answers,  # else one text said twice would be answered alike
            ignore_eos=True,
            stop_token_ids=adapter.stop_token_ids(self.folder),
            detokenize=False,
        )
        self.answers += 1
        running = self.engine.llm.llm_engine

        def work(streamer: TextIteratorStreamer, stop: threading.Event) -> None:
            (prompt,) = running.renderer.render_cmpl([{"prompt_token_ids": list(ids)}])
            request = running.add_request(f"chat-{self.answers}", prompt, asked, lora_request=self.engine.request)
            known = 0
            while running.has_unfinished_requests():
                if stop.is_set():
                    running.abort_request([request], internal=True)
                    break
                for output in running.step():
                    said = output.outputs[0].token_ids
                    streamer.put(torch.tensor(said[known:]))
                    known = len(said)
            streamer.end()

        yield from _streamed(self.tokenizer, work)


def _streamed(
    tokenizer: PreTrainedTokenizerBase,
    work: Callable[[TextIteratorStreamer, threading.Event], None],
    *,
    skip_prompt: bool = False,
) -> Iterator[str]:
    """Text as a generation in a thread of its own puts it into a streamer; it is to end once the event is set."""
    kept = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=skip_prompt, **kept)
    stop = threading.Event()
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work(streamer, stop)
        except BaseException as error:  # noqa: BLE001 - raised again below, in the thread that waits
            failed.append(error)
            streamer.end()

    worker = threading.Thread(target=run, daemon=True)
    worker.start()
    try:
        yield from filter(None, streamer)
    finally:
        stop.set()
        worker.join()
    if failed:
        raise failed[0]


def _config(own: GenerationConfig, settings: Settings) -> GenerationConfig:
    """A model's generation config with what was asked for in its place."""
    config = GenerationConfig.from_dict(own.to_dict())
    if settings.temperature is not None:
        config.do_sample = settings.temperature > 0
        config.temperature = settings.temperature or None
    if settings.top_p is not None:
        config.top_p = settings.top_p
    return config


def _sampling(base: Path, settings: Settings) -> dict[str, Any]:
    """Arguments of vLLM for what transformers does by a model's generation config.

    Raises:
        UserError: it sets what vLLM does not have.
    """
    own = GenerationConfig()
    if (base / "generation_config.json").is_file():
        own = GenerationConfig.from_pretrained(base, local_files_only=True)
    config = _config(own, settings)
    if refused := [name for name in NOT_IN_VLLM if getattr(config, name, None) not in _NEUTRAL]:
        problem = f"vLLM does not know {', '.join(refused)}"
        raise UserError(problem, file=base / "generation_config.json", hint="--engine transformers does")
    penalty = {"repetition_penalty": config.repetition_penalty or 1.0}
    if not config.do_sample:
        return {"temperature": 0.0, **penalty}
    return {
        "temperature": 1.0 if config.temperature is None else config.temperature,
        "top_p": 1.0 if config.top_p is None else config.top_p,
        "top_k": DEFAULT_TOP_K if config.top_k is None else config.top_k,
        "min_p": config.min_p or 0.0,
        **penalty,
    }

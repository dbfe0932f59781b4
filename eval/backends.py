"""lm-eval's own vLLM and transformers backends, with what they do silently made an error.

A request that they would cut at the left, a begin-of-text token that would stand twice, a special token spelled out in
a document, other ids than training saw.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from cordee.chat.templates import special_tokens
from cordee.compute import device, engine
from cordee.compute.model import open_model
from cordee.compute.tokenizer import open_tokenizer
from cordee.errors import Fault, UserError

REQUESTS_AT_ONCE = 256
"""Requests that vLLM is handed before anyone is told how far it is."""
TURNS = [{"role": "user", "content": "Which language is this?\n\nAll human beings are born free."}]


class _Guarded:
    """Mixed into lm-eval's backends."""

    watch: Callable[[int], None]
    """Told how many requests come next; may raise to end the measurement."""
    asked: Sequence[Any] = ()
    # The requests whose tokens are scored; none for rolling log-likelihoods, which read long documents in windows.

    def loglikelihood(self, requests: list[Any], *arguments: Any, **options: Any) -> Any:
        self._require_plain(requests)
        self.asked = requests
        try:
            return super().loglikelihood(requests, *arguments, **options)
        finally:
            self.asked = ()

    def loglikelihood_rolling(self, requests: list[Any], *arguments: Any, **options: Any) -> Any:
        self._require_plain(requests)
        return super().loglikelihood_rolling(requests, *arguments, **options)

    def _loglikelihood_tokens(self, requests: list[Any], *arguments: Any, **options: Any) -> Any:
        for request, (_, context, continuation) in zip(self.asked, requests, strict=bool(self.asked)):
            self._require_fits(request, len(context) + len(continuation), 0)
        for _, context, continuation in requests:
            self._require_one_start([*context[:2], *continuation[:1]])
        return super()._loglikelihood_tokens(requests, *arguments, **options)

    def generate_until(self, requests: list[Any], *arguments: Any, **options: Any) -> Any:
        self._require_plain(requests)
        for request in requests:
            text, wanted = request.args
            ids = self.tok_encode(text)
            self._require_fits(request, len(ids), wanted.get("max_gen_toks", self.max_gen_toks))
            self._require_one_start(ids)
        return super().generate_until(requests, *arguments, **options)

    def _require_plain(self, requests: list[Any]) -> None:
        pattern = special_tokens(self.tokenizer)
        for request in requests:
            for name, value in request.doc.items():
                if isinstance(value, str) and (found := pattern.search(value)):
                    document = f"document {request.doc_id} of {request.task_name}"
                    raise UserError(f"{document} spells out the special token {found.group()!r}: {name}", key="data")

    def _require_fits(self, request: Any, tokens: int, generated: int) -> None:
        # vLLM wants a place for one token that it generates, even where only log-probabilities are asked for.
        limit = self.max_length - 1 - generated
        if tokens > limit:
            document = f"document {request.doc_id} of {request.task_name}"
            raise UserError(f"{document} has {tokens} tokens, and {limit} fit", key="max_length")

    def _require_one_start(self, ids: Sequence[int]) -> None:
        start = self.tokenizer.bos_token_id
        if start is not None and list(ids[:2]) == [start, start]:
            raise Fault("lm-eval sends the begin-of-text token twice")


class _TransformersLM(_Guarded, HFLM):
    def _model_call(self, inps: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        self.watch(len(inps))
        return super()._model_call(inps, *arguments, **options)

    def _model_generate(self, context: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        self.watch(len(context))
        return super()._model_generate(context, *arguments, **options)


class Models:
    """Opens one checkpoint after the other, in one engine where that is vLLM."""

    def __init__(
        self, name: str, max_length: int, batch_size: int, seed: int, *, watch: Callable[[int], None] | None = None,
        dtype: str = "auto",
    ) -> None:  # fmt: skip
        self.name, self.max_length, self.batch_size, self.seed = name, max_length, batch_size, seed
        self.watch, self.dtype = watch or (lambda _requests: None), dtype
        self.served: tuple[Any, engine.Engine] | None = None

    def open(self, folder: Path) -> Any:
        """The lm-eval model for a checkpoint; vLLM is started once and then given other weights."""
        if self.name == "transformers":
            lm: Any = _TransformersLM(
                pretrained=open_model(folder, dtype=torch.float32).eval().to(device.default()),
                tokenizer=open_tokenizer(folder), batch_size=self.batch_size, max_length=self.max_length,
                add_bos_token=False,
            )  # fmt: skip
        elif self.served is None:
            lm = self._start(folder)
            served = engine.Engine(lm.model)
            served.check(folder)
            self.served = lm, served
        else:
            lm = self.served[0]
            self.served[1].load(folder)
        lm.watch = self.watch
        _require_same_ids(lm, folder)
        return lm

    def _start(self, folder: Path) -> Any:
        engine.prepare()  # before lm-eval's backend is imported: it asks for vLLM's version
        from lm_eval.models.vllm_causallms import VLLM

        class VllmLM(_Guarded, VLLM):
            def _model_generate(
                self, requests: list[list[int]], generate: bool = False, sampling_params: Any = None
            ) -> list[Any]:
                outputs = []
                for start in range(0, len(requests), REQUESTS_AT_ONCE):
                    these = slice(start, start + REQUESTS_AT_ONCE)
                    self.watch(len(requests[these]))
                    params = sampling_params[these] if isinstance(sampling_params, list) else sampling_params
                    outputs += super()._model_generate(requests[these], generate, params)
                return outputs

        settings = engine.settings(folder, self.max_length, self.seed, self.dtype)
        length = settings.pop("max_model_len")
        # Each text brings its own begin-of-text token: the chat template writes it, and rolling windows prefix it.
        return VllmLM(
            pretrained=str(folder), batch_size="auto", max_length=length, add_bos_token=False,
            max_batch_size=settings["max_num_seqs"], **settings,
        )  # fmt: skip


def _require_same_ids(lm: Any, folder: Path) -> None:
    """Check that lm-eval sends a chat as the very ids that training saw.

    Raises:
        Fault: the ids differ.
    """
    tokenizer = open_tokenizer(folder)
    if tokenizer.chat_template is None:  # a task that asks in chats is refused later on
        return
    trained = tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, tokenize=True, return_dict=True)
    sent = lm.tok_encode(lm.apply_chat_template(TURNS))
    if list(trained["input_ids"]) != list(sent):
        raise Fault(f"lm-eval sends other ids than the chat template gives: {sent[:4]}…", file=folder)

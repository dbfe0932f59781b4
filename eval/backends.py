"""lm-eval's own vLLM and transformers backends, so that figures are those of the `lm_eval` command.

lm-eval decides on the begin-of-text token: the tokenizer adds it where it does so by itself, and not to a text that
begins with it already, as most chat templates write it. One thing it does in silence is an error here: a request that
it would cut at the left.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import configure_pad_token, normalize_gen_kwargs

from cordee.compute import device, engine
from cordee.compute.model import open_model
from cordee.compute.tokenizer import open_tokenizer
from cordee.errors import Fault, UserError

REQUESTS_AT_ONCE = 256
"""Requests that vLLM is handed before anyone is told how far it is."""
TURNS = [{"role": "user", "content": "Which language is this?\n\nAll human beings are born free."}]
Scored = tuple[Any, list[int], list[int]]
"""A request as lm-eval scores it: its cache key, the ids of the context and those of the continuation."""


class _Guarded(TemplateLM):
    """Mixed into lm-eval's backends."""

    watch: Callable[[int], None]
    """Told how many requests come next; may raise to end the measurement."""
    command_model: str
    """lm-eval's name for the backend."""
    command_arguments: dict[str, Any]
    """The `model_args` of lm-eval's command for the same figures."""
    dtype: str
    """What it computes in."""
    note = ""
    """What distinguishes the ids of chats from those of training."""
    beyond: int
    """How many more tokens than `max_length` a scored request may have before lm-eval cuts it."""
    asked: Sequence[Any] = ()
    # The requests whose tokens are scored; none for rolling log-likelihoods, which read long documents in windows.

    def loglikelihood(self, requests: list[Any], *arguments: Any, **options: Any) -> Any:
        self.asked = requests
        try:
            return super().loglikelihood(requests, *arguments, **options)
        finally:
            self.asked = ()

    def _loglikelihood_tokens(self, requests: list[Scored], *arguments: Any, **options: Any) -> Any:
        """Score the requests; one without a context that is too long in windows, any other too long one is an error."""
        limit = self.max_length + self.beyond
        too_long = []
        parts, owners = [], []
        for index, (key, context, continuation) in enumerate(requests):
            own = [(key, context, continuation)]
            if self.asked and (tokens := len(context) + len(continuation)) > limit:
                if self.asked[index].args[0]:
                    too_long.append((self.asked[index], tokens, limit))
                    continue
                own = _windows([*context, *continuation], self.max_length - 1)
            parts += own
            owners += [index] * len(own)
        _require_all_fit(too_long, len(requests))
        answers = super()._loglikelihood_tokens(parts, *arguments, **options)
        if len(parts) == len(requests):
            return answers
        summed = [(0.0, True)] * len(requests)
        for owner, (logprob, is_greedy) in zip(owners, answers, strict=True):
            before, were_greedy = summed[owner]
            summed[owner] = before + logprob, were_greedy and is_greedy
        return summed

    def generate_until(self, requests: list[Any], *arguments: Any, **options: Any) -> Any:
        too_long = []
        for request in requests:
            text, wanted = request.args
            limit = self.max_length - normalize_gen_kwargs(dict(wanted), self.max_gen_toks)["max_gen_toks"]
            if (tokens := len(self.tok_encode(text))) > limit:
                too_long.append((request, tokens, limit))
        _require_all_fit(too_long, len(requests))
        return super().generate_until(requests, *arguments, **options)


def _windows(ids: list[int], length: int) -> list[Scored]:
    """Parts of at most `length` tokens, each of which begins with the last token of the one before."""
    starts = range(0, len(ids) - 1, length - 1)
    return [(None, ids[start : start + 1], ids[start + 1 : start + length]) for start in starts]


def _require_all_fit(too_long: list[tuple[Any, int, int]], count: int) -> None:
    if too_long:
        first = [f"document {ask.doc_id} of {ask.task_name} has {tokens} tokens" for ask, tokens, _ in too_long[:3]]
        raise UserError(
            f"{len(too_long)} of {count} requests don't fit: {', '.join(first)}; {too_long[0][2]} fit",
            key="max_length",
        )


class _TransformersLM(_Guarded, HFLM):
    command_model = "hf"
    beyond = 1  # the last token is predicted and not read

    def _model_call(self, inps: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        self.watch(len(inps))
        return super()._model_call(inps, *arguments, **options)

    def _model_generate(self, context: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        self.watch(len(context))
        return super()._model_generate(context, *arguments, **options)


class Models:
    """Opens one checkpoint after the other, in one engine where that is vLLM."""

    def __init__(
        self, settings: engine.Settings, folders: Iterable[Path], *, batch_size: int = 1,
        watch: Callable[[int], None] | None = None,
    ) -> None:  # fmt: skip
        self.settings, self.batch_size = settings, batch_size
        self.watch = watch or (lambda _requests: None)
        self.served: tuple[Any, engine.Engine] | None = None
        self.probes = engine.probes(folders) if settings.name == "vllm" else {}

    def open(self, folder: Path) -> Any:
        """The lm-eval model for a checkpoint; vLLM is started once and then given other weights."""
        if self.settings.name == "transformers":
            lm: Any = _TransformersLM(
                pretrained=open_model(folder, dtype=self.settings.torch_dtype).to(device.default()),
                tokenizer=open_tokenizer(folder), batch_size=self.batch_size,
                max_length=engine.longest_request(folder, self.settings.max_length),
            )  # fmt: skip
        elif self.served is None:
            lm = self._start(folder)
            self.served = lm, engine.Engine(lm.model, self.probes)
            self.served[1].check(folder)
            lm.serve(folder)
        else:
            lm, served = self.served
            served.load(folder)
            lm.serve(folder)
        lm.dtype = self.served[1].dtype if self.served else str(lm.model.dtype).removeprefix("torch.")
        lm.watch = self.watch
        lm.command_arguments = {"pretrained": folder.resolve(), **self.settings.command_arguments}
        lm.note = _other_ids(lm, folder)
        return lm

    def _start(self, folder: Path) -> Any:
        engine.prepare()  # before lm-eval's backend is imported: it asks for vLLM's version
        from lm_eval.models.vllm_causallms import VLLM

        class VllmLM(_Guarded, VLLM):
            command_model = "vllm"
            beyond = -1  # vLLM generates a token, even where only log-probabilities are asked for

            def serve(self, folder: Path) -> None:
                """Take a checkpoint's own tokenizer, chat template and stop tokens."""
                self.tokenizer = configure_pad_token(open_tokenizer(folder))
                self.hf_chat_template = self.tokenizer.chat_template
                self.ends = engine.ends(folder, self.tokenizer)

            def _model_generate(
                self, requests: list[list[int]], generate: bool = False, sampling_params: Any = None
            ) -> list[Any]:
                for params in sampling_params or []:  # vLLM itself would stop where the first checkpoint stops
                    params.ignore_eos = True
                    params.stop_token_ids = sorted({*params.stop_token_ids, *self.ends})
                outputs = []
                for start in range(0, len(requests), REQUESTS_AT_ONCE):
                    these = slice(start, start + REQUESTS_AT_ONCE)
                    self.watch(len(requests[these]))
                    params = sampling_params[these] if sampling_params else None
                    outputs += super()._model_generate(requests[these], generate, params)
                return outputs

        return VllmLM(pretrained=str(folder), batch_size="auto", **self.settings.for_vllm(folder))


def _other_ids(lm: Any, folder: Path) -> str:
    """How the ids that lm-eval sends of a chat differ from those of the chat template, which training sees.

    Raises:
        Fault: by more than special tokens at their ends.
    """
    if lm.tokenizer.chat_template is None:  # a task that asks in chats is refused later on
        return ""
    tokenizer = open_tokenizer(folder)
    text = lm.apply_chat_template(TURNS)
    trained = tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, tokenize=True, return_dict=True)
    expected, sent = list(trained["input_ids"]), list(lm.tok_encode(text))
    if sent == expected:
        return ""
    around = tokenizer("")["input_ids"]
    if lm.tok_encode(text, add_special_tokens=False) != expected or len(sent) != len(expected) + len(around):
        raise Fault(f"lm-eval sends other ids than the chat template gives: {sent[:4]}…", file=folder)
    return f"lm-eval sends chats with {tokenizer.decode(around)!r} added by the tokenizer, which training does not see"

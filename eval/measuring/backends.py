"""lm-eval's own vLLM and transformers backends, so that figures are those of the `lm_eval` command.

lm-eval decides on the begin-of-text token: the tokenizer adds it where it does so by itself, and not to a text that
begins with it already, as most chat templates write it. One thing it does in silence is an error here: a request that
it would cut at the left.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import configure_pad_token, normalize_gen_kwargs

from cordee import model_folder
from cordee.compute import adapter, device, engine
from cordee.compute.logprobs import Scores
from cordee.compute.model import attention
from cordee.compute.serving import Engines
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

    def begin(self) -> None:
        """Forget what earlier requests left behind, as a command that has just started."""

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
    """Opens one checkpoint or adapter after the other, in one engine where that is vLLM and can serve them."""

    def __init__(
        self, settings: engine.Settings, folders: Sequence[Path], *, batch_size: int | str = 1,
        watch: Callable[[int], None] | None = None,
    ) -> None:  # fmt: skip
        self.settings, self.batch_size = settings, batch_size
        self.watch = watch or (lambda _requests: None)
        self.engines = Engines(settings, folders, self._start) if settings.name == "vllm" else None
        self.lm: Any = None

    def in_turn(self, models: Mapping[str, Path]) -> list[str]:
        """The names of models in an order in which no engine is started twice."""
        return self.engines.in_turn(models) if self.engines else list(models)

    def open(self, folder: Path) -> Any:
        """The lm-eval model for a checkpoint or an adapter; where vLLM can serve it, the same one as before."""
        base, tokenizer = model_folder.served_base(folder), open_tokenizer(model_folder.tokenizer_of(folder))
        if self.engines:
            served = self.engines.load(folder)
            lm = self.lm
            lm.serve(tokenizer, engine.ends(folder, tokenizer), served.request)
            lm.dtype = served.dtype
        else:
            opened = adapter.open_served(folder, dtype=self.settings.torch_dtype).to(device.default())
            try:
                opened.tie_weights()  # as lm-eval does, which can't where PEFT has put a layer of its own there
            except AttributeError as error:
                problem = "lm-eval does not open an adapter that changes one table for the embedding and the head"
                raise UserError(problem, file=folder, hint="merge the adapter first") from error
            lm = _TransformersLM(
                pretrained=opened, tokenizer=tokenizer, batch_size=self.batch_size,
                max_length=engine.longest_request(folder, self.settings.max_length),
            )  # fmt: skip
            lm.dtype = str(lm.model.dtype).removeprefix("torch.")
        lm.watch = self.watch
        lm.command_arguments = {"pretrained": base.resolve(), **self.settings.command_arguments}
        lm.command_arguments |= {} if self.engines else attention(base)
        if base != folder:
            lm.command_arguments |= self._of_adapter(folder)
        lm.note = _other_ids(lm, folder)
        return lm

    def score(self, sequences: Sequence[Sequence[int]]) -> list[Scores]:
        """What vLLM says of token ids by the model that was opened last."""
        if not self.engines or not self.engines.running:
            raise Fault("no vLLM runs")
        return self.engines.running.score(sequences)

    def close(self) -> None:
        """Free the engine."""
        if self.engines:
            self.engines.stop()

    def _of_adapter(self, folder: Path) -> dict[str, Any]:
        """The `model_args` of lm-eval's command for an adapter."""
        tokenizer = {"tokenizer": folder.resolve()} if model_folder.tokenizer_of(folder) == folder else {}
        if not self.engines:
            return {"peft": folder.resolve(), **tokenizer}
        return {"lora_local_path": folder.resolve(), "max_lora_rank": self.lm.max_lora_rank, **tokenizer}

    def _start(self, model: str, arguments: Mapping[str, Any]) -> Any:
        """Start lm-eval's backend; returns its vLLM."""
        from lm_eval.models.vllm_causallms import VLLM

        class VllmLM(_Guarded, VLLM):
            command_model = "vllm"
            beyond = -1  # vLLM generates a token, even where only log-probabilities are asked for

            def begin(self) -> None:
                """Empty the prefix cache: an answer computed from it is rounded differently."""
                self.model.reset_prefix_cache()

            def serve(self, tokenizer: Any, ends: set[int], request: Any) -> None:
                """Take a checkpoint's own tokenizer, chat template and stop tokens, and the adapter, if any."""
                self.tokenizer = configure_pad_token(tokenizer)
                self.hf_chat_template = self.tokenizer.chat_template
                self.ends, self.lora_request = ends, request

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

        self.lm = VllmLM(pretrained=model, batch_size=self.batch_size, **arguments)
        self.lm.max_lora_rank = arguments.get("max_lora_rank")
        return self.lm.model


def _other_ids(lm: Any, folder: Path) -> str:
    """How the ids that lm-eval sends of a chat differ from those of the chat template, which training sees.

    Raises:
        Fault: by more than special tokens at their ends.
    """
    if lm.tokenizer.chat_template is None:  # a task that asks in chats is refused later on
        return ""
    tokenizer = open_tokenizer(model_folder.tokenizer_of(folder))
    text = lm.apply_chat_template(TURNS)
    trained = tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, tokenize=True, return_dict=True)
    expected, sent = list(trained["input_ids"]), list(lm.tok_encode(text))
    if sent == expected:
        return ""
    around = tokenizer("")["input_ids"]
    if lm.tok_encode(text, add_special_tokens=False) != expected or len(sent) != len(expected) + len(around):
        raise Fault(f"lm-eval sends other ids than the chat template gives: {sent[:4]}…", file=folder)
    return f"lm-eval sends chats with {tokenizer.decode(around)!r} added by the tokenizer, which training does not see"

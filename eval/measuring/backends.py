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
from cordee.compute.serving import Engines, groups
from cordee.compute.tokenizer import open_tokenizer
from cordee.errors import Fault, UserError

REQUESTS_AT_ONCE = 256 if torch.cuda.is_available() else 64
"""Requests that vLLM is handed together with `batch_size: auto`: their answers are kept when all of them are there."""
TURNS = [{"role": "user", "content": "Which language is this?\n\nAll human beings are born free."}]
Scored = tuple[Any, list[int], list[int]]
"""A request as lm-eval scores it: its cache key, the ids of the context and those of the continuation."""


class _Guarded(TemplateLM):
    """Mixed into lm-eval's backends."""

    watch: Callable[[int], None]
    """Told how many requests come next; may raise to end the measurement."""
    dtype: str
    """What it computes in."""
    max_lora_rank: int | None = None
    """The largest rank of an adapter that vLLM has a place for."""
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
        watch: Callable[[int], None] | None = None, waits: Callable[[str], None] | None = None,
    ) -> None:  # fmt: skip
        self.settings, self.batch_size = settings, batch_size
        self.watch, self.waits = watch or (lambda _requests: None), waits or (lambda _text: None)
        self.is_vllm, self.folders = settings.name == "vllm", folders
        self.command_model = "vllm" if self.is_vllm else "hf"
        """lm-eval's name for the backend."""
        self.chat_template_args = {"enable_thinking": True} if self.is_vllm else {}
        """What lm-eval's backend tells chat templates."""
        self.engines: Engines | None = None
        self.lm: Any = None

    def in_turn(self, models: Mapping[str, Path]) -> list[str]:
        """The names of models in an order in which no engine is started twice."""
        if not self.is_vllm:
            return list(models)
        return [name for group in groups(self.folders, self.settings) for name in models if models[name] in group]

    def open(self, folder: Path) -> Any:
        """The lm-eval model for a checkpoint or an adapter; where vLLM can serve it, the same one as before."""
        self.waits(f"{self.settings.name} with {folder}")
        tokenizer = open_tokenizer(model_folder.tokenizer_of(folder))
        if self.is_vllm:
            self.engines = self.engines or Engines(self.settings, self.folders, self._start)
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

    def command_arguments(self, folder: Path, max_lora_rank: int | None) -> dict[str, Any]:
        """The `model_args` of lm-eval's command for the same figures."""
        base = model_folder.served_base(folder)
        arguments = {"pretrained": base.resolve(), **self.settings.command_arguments}
        arguments |= {} if self.is_vllm else attention(base)
        if base == folder:
            return arguments
        own = {"lora_local_path": folder.resolve(), "max_lora_rank": max_lora_rank}
        arguments |= own if self.is_vllm else {"peft": folder.resolve()}
        return arguments | ({"tokenizer": folder.resolve()} if model_folder.tokenizer_of(folder) == folder else {})

    def _start(self, model: str, arguments: Mapping[str, Any]) -> Any:
        """Start lm-eval's backend; returns its vLLM."""
        from lm_eval.models.vllm_causallms import VLLM

        class VllmLM(_Guarded, VLLM):
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
                self.watch(len(requests))
                return list(super()._model_generate(requests, generate, sampling_params))

        at_once = REQUESTS_AT_ONCE if self.batch_size == "auto" else self.batch_size
        self.lm = VllmLM(pretrained=model, batch_size=at_once, **arguments)
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

"""What models have answered so far: the same weights are not asked the same by the same engine again, in any recipe.

`<cache>/answers/<model and engine>/` has a file for each process that asked. Each line is a checksum and a JSON list:
first what the engine said of itself, then the digest of each request and its answer. What a kill cut off is asked anew.
"""

import hashlib
import json
import os
import time
import uuid
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from lm_eval.api.model import LM, TemplateLM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import configure_pad_token

from cordee import files, hashes, machine, model_folder
from cordee.compute import engine
from cordee.compute.tokenizer import open_tokenizer
from eval.measuring.backends import Models

VERSION = 1
"""Raised when the same request gets another answer: these are not found again."""
WEIGHTS_AND_TOKENS = (*files.MODEL_SUFFIXES, ".bin")
"""The files of a model's folder that its answers depend on end with these."""

FACTS = ("dtype", "note", "max_lora_rank")


Share = Callable[[Path, str, list[list[Any]]], None]
"""Asks a folder's model requests of a kind, which are in groups of equal ones."""


class Answers:
    """The answers of one model in one engine."""

    def __init__(self, cache: Path, key: Mapping[str, Any]) -> None:
        self.folder = cache / "answers" / _digest(key)[:32]
        self.facts: dict[str, Any] = {}
        """What the engine said of itself when it had started."""
        self.known: dict[str, Any] = {}
        self._file: TextIO | None = None
        if self.folder.is_dir():
            os.utime(self.folder)  # when it was last used, for `cordee clean`
        self.read()

    def read(self) -> None:
        """Read what all processes have kept so far."""
        for path in sorted(self.folder.glob("*.jsonl")):
            lines = _lines(path)
            if facts := next(lines, None):
                self.facts = facts[1]
                self.known |= dict(lines)

    def start(self, facts: dict[str, Any]) -> None:
        """Begin this process's file."""
        self.facts = facts
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = (self.folder / f"{uuid.uuid4().hex}.jsonl").open("w", encoding="utf-8")
        self._write("facts", facts)

    def add(self, key: str, answer: Any) -> None:
        """Keep an answer, unless it is known."""
        if key not in self.known:
            self.known[key] = answer
            self._write(key, answer)

    def sync(self) -> None:
        """Have the disk keep what was added."""
        if self._file:
            os.fsync(self._file.fileno())
            files.sync_folder(self.folder)

    def _write(self, key: str, value: Any) -> None:
        if self._file:
            text = json.dumps([key, value])
            self._file.write(f"{zlib.crc32(text.encode()):08x} {text}\n")
            self._file.flush()


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """A file's lines, up to the first one that is not as it was written."""
    with path.open("rb") as file:
        for line in file:
            checksum, _, text = line.partition(b" ")
            text = text.removesuffix(b"\n")
            if not line.endswith(b"\n") or checksum != f"{zlib.crc32(text):08x}".encode():
                return
            key, value = json.loads(text)
            yield key, value


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def key_of(folder: Path, settings: engine.Settings, batch_size: int | str) -> dict[str, Any]:
    """What a model's answers depend on, besides the requests: its files, and all that changes how they are rounded."""
    folders = dict.fromkeys((model_folder.served_base(folder), model_folder.tokenizer_of(folder), folder))
    return {
        "version": [VERSION, *map(version, ("lm_eval", "torch", "transformers"))],
        "engine": [settings.describe(), settings.command_arguments, batch_size, machine.gpu() or _processor()],
        "files": [
            {path.name: hashes.of_file(path) for path in sorted(one.iterdir()) if path.suffix in WEIGHTS_AND_TOKENS}
            for one in folders
        ],
    }


def _processor() -> list[Any]:
    """What sums are rounded by on a CPU: its instruction sets and the number of threads."""
    return [machine.instruction_sets(), machine.cores()]


class Asked(LM):
    """A model for lm-eval that starts its engine for the first request whose answer is not known."""

    def __init__(self, models: Models, folder: Path, cache: Path, share: Share | None = None) -> None:
        """Read its answers.

        Args:
            models: what opens it.
            folder: the model or the adapter.
            cache: where answers are kept.
            share: has other processes answer and keep the answers, in the place of an engine in this one.
        """
        super().__init__()
        self.share = share
        self.models, self.folder = models, folder
        self.command_model, self.batch_size = models.command_model, models.batch_size
        self.tokenizer = configure_pad_token(open_tokenizer(model_folder.tokenizer_of(folder)))
        self.chat_template_args = models.chat_template_args
        self.answers = Answers(cache, key_of(folder, models.settings, models.batch_size))
        self.asked = self.found = 0
        """Requests, and how many of them had an answer."""
        self.starting_s = 0.0
        """What the start of its engine took, in seconds."""
        self._lm: Any = None

    apply_chat_template = HFLM.apply_chat_template
    chat_template = TemplateLM.chat_template

    @property
    def tokenizer_name(self) -> str:
        """Where the tokenizer lies, as lm-eval names a file by it."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    @property
    def facts(self) -> dict[str, Any]:
        """What its engine says, or said, of itself."""
        if not self.answers.facts:
            self._started()
        return self.answers.facts

    @property
    def dtype(self) -> str:
        """What is or was computed in."""
        return str(self.facts["dtype"])

    @property
    def note(self) -> str:
        """What distinguishes the ids of chats from those of training."""
        return str(self.facts["note"])

    @property
    def command_arguments(self) -> dict[str, Any]:
        """The `model_args` of lm-eval's command for the same figures."""
        return self.models.command_arguments(self.folder, self.facts["max_lora_rank"])

    def begin(self) -> None:
        """Forget what earlier requests left behind, as a command that has just started."""
        if self._lm is not None:
            self._lm.begin()

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, and whether it is the most likely one."""
        return [(answer[0], answer[1]) for answer in self.ask("loglikelihood", requests, disable_tqdm)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text."""
        return self.ask("loglikelihood_rolling", requests, disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """A text for each request."""
        return self.ask("generate_until", requests, disable_tqdm)

    def ask(self, kind: str, requests: Sequence[Any], disable_tqdm: bool = True) -> list[Any]:
        """The answers to requests of a kind, by lm-eval's name of it; those that are not known are asked for."""
        seen: Counter[str] = Counter()
        keys = []
        for request in requests:  # a request that comes several times has as many answers
            digest = _digest([kind, *request.args])
            keys.append(f"{digest}-{seen[digest]}")
            seen[digest] += 1
        # All answers to a request together: an engine that starts again would draw the first one again.
        again = {key.partition("-")[0] for key in keys if key not in self.answers.known}
        missing = [(key, ask) for key, ask in zip(keys, requests, strict=True) if key.partition("-")[0] in again]
        self.asked += len(keys)
        self.found += len(keys) - len(missing)
        if missing and self.share:
            equal: dict[str, list[Any]] = {}
            for key, request in missing:
                equal.setdefault(key.partition("-")[0], []).append(request)
            self.share(self.folder, kind, list(equal.values()))
            self.answers.read()
        elif missing:
            lm = self._started()
            lm.set_cache_hook(_Hook(self.answers, kind, missing))
            given = getattr(lm, kind)([ask for _, ask in missing], disable_tqdm=disable_tqdm)
            for (key, _), answer in zip(missing, given, strict=True):
                self.answers.add(key, answer)
            self.answers.sync()
        return [self.answers.known[key] for key in keys]

    def _started(self) -> Any:
        if self._lm is None:
            began = time.monotonic()
            self._lm = self.models.open(self.folder)
            self._lm.begin()
            self.answers.start({name: getattr(self._lm, name) for name in FACTS})
            self.starting_s = time.monotonic() - began
        return self._lm


class _Hook:
    """Given to lm-eval's backends, which tell it of each answer as soon as they have it."""

    def __init__(self, answers: Answers, kind: str, missing: Sequence[tuple[str, Any]]) -> None:
        self.answers, self.kind = answers, kind
        self.keys: dict[Any, list[str]] = defaultdict(list)
        told = defaultdict(set)
        for key, request in missing:
            self.keys[self._name(request.args)].append(key)
            told[self._name(request.args)].add(key.partition("-")[0])
        for name, digests in told.items():  # the same prompt with other settings: told apart when all have come
            if len(digests) > 1:
                del self.keys[name]

    def add_partial(self, kind: str, arguments: Sequence[Any], answer: Any) -> None:
        """Keep an answer; lm-eval's name for this method."""
        if kind == self.kind and (keys := self.keys.get(self._name(arguments))):
            self.answers.add(keys.pop(0), answer)

    def _name(self, arguments: Sequence[Any]) -> Any:
        """What lm-eval and its backends call the same: of a generation's settings, each has its own form."""
        return arguments[0] if self.kind == "generate_until" else tuple(arguments)

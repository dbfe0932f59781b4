"""A chat with a model or an adapter on a terminal: each answer appears while transformers generates it."""

import json
import readline  # noqa: F401 - gives `input` its editing and its history
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList, TextIteratorStreamer, set_seed
from transformers.utils import logging

from cordee import files, model_folder
from cordee.chat.problems import BadRowError
from cordee.chat.spelling import Message
from cordee.chat.templates import Template
from cordee.chat.values import texts_in
from cordee.compute import adapter, device
from cordee.compute import model as compute
from cordee.compute.tokenizer import open_tokenizer
from cordee.errors import UserError

UNLIMITED = 2**31
"""Positions of a model whose config names no number of them."""
HELP = "/reset begins a new chat, /system TEXT sets the system prompt, /save FILE stores the chat, /quit or Ctrl-D ends"


@dataclass(frozen=True)
class Settings:
    """How answers are generated; None: as the model's own generation config says."""

    max_tokens: int
    """Longest answer, in tokens."""
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0


@dataclass
class Chat:
    """The turns so far, and the model that answers."""

    folder: Path
    """Of the model or the adapter."""
    settings: Settings
    base: Path | None = None
    """The adapter's base, where it is not the one that its config names."""
    system: str = ""
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Open the model and its tokenizer.

        Raises:
            UserError: the folder is no model.
            Fault: it is damaged.
        """
        logging.disable_progress_bar()
        if self.base:
            opened = adapter.open_on(self.folder, compute.open_model(self.base), self.base)
        else:
            opened = adapter.open_served(self.folder)
        self.model = opened.eval().to(device.default())
        self.tokenizer = open_tokenizer(model_folder.tokenizer_of(self.folder))
        self.template = Template(self.tokenizer) if self.tokenizer.chat_template else None
        self.longest = model_folder.shape(self.model.config.to_dict()).positions or UNLIMITED
        set_seed(self.settings.seed)

    def answer(self, text: str) -> Iterator[str]:
        """The answer to a turn, piece by piece; both are kept as turns. Closing it early keeps what was said so far.

        A model without a chat template continues the text as it stands, and keeps nothing.

        Raises:
            UserError: the turn spells out a special token, or the chat has grown longer than the model reads.
        """
        coming: list[Message] = [*self.messages, {"role": "user", "content": text}]
        ids = self._encode(coming)
        if len(ids) >= self.longest:
            problem = f"the chat has {len(ids)} tokens, and the model reads {self.longest}"
            raise UserError(problem, hint="/reset begins a new one")
        said = ""
        try:
            for piece in self._generate(ids):
                said += piece
                yield piece
        finally:
            if self.template:
                self.messages = [*coming, {"role": "assistant", "content": said}]

    def save(self, path: Path) -> None:
        """Add the chat to a file of JSON lines, as a row of `messages`."""
        row = json.dumps({"messages": [*self._system(), *self.messages]}, ensure_ascii=False)
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        files.write_text(path, f"{before}{row}\n")

    def _system(self) -> list[Message]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _encode(self, messages: list[Message]) -> list[int]:
        """The token ids `[seq]` of the turns, up to where the answer begins."""
        if self.template is None:
            return list(self.tokenizer(messages[-1]["content"])["input_ids"])
        chat = [*self._system(), *messages]
        try:
            self.template.require_plain(texts_in(chat))
            readable = self.template.readable(chat, {})
            self.template.require_written(readable, {})
            written = self.template.text(readable, {}, add_generation_prompt=True)
        except BadRowError as error:
            raise UserError(error.problem) from error
        return list(self.template.encode([written])["input_ids"][0])

    def _generate(self, ids: list[int]) -> Iterator[str]:
        """Pieces of the text that follows."""
        kept = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, **kept)
        stop = threading.Event()
        failed: list[BaseException] = []
        config = self._config(len(ids))

        def work() -> None:
            try:
                with torch.no_grad():
                    self.model.generate(
                        input_ids=torch.tensor([ids], device=self.model.device),
                        attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=self.model.device),
                        generation_config=config,
                        streamer=streamer,
                        stopping_criteria=StoppingCriteriaList([lambda *_, **__: stop.is_set()]),
                    )
            except BaseException as error:  # noqa: BLE001 - raised again below, in the thread that waits
                failed.append(error)
                streamer.end()

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            yield from filter(None, streamer)
        finally:
            stop.set()
            worker.join()
        if failed:
            raise failed[0]

    def _config(self, length: int) -> GenerationConfig:
        """How the next answer is generated."""
        config = GenerationConfig.from_dict(self.model.generation_config.to_dict())
        pad = self.tokenizer.pad_token_id
        config.eos_token_id = adapter.stop_token_ids(self.folder)
        config.pad_token_id = self.tokenizer.eos_token_id if pad is None else pad
        config.max_length = None
        config.max_new_tokens = min(self.settings.max_tokens, self.longest - length)
        if self.settings.temperature is not None:
            config.do_sample = self.settings.temperature > 0
            config.temperature = self.settings.temperature or None
        if self.settings.top_p is not None:
            config.top_p = self.settings.top_p
        return config


def plain(text: str) -> str:
    """A text without the signs by which it could steer a terminal."""
    return "".join(sign for sign in text if sign in "\n\t" or (sign.isprintable() or sign == "\u200d"))


def run(chat: Chat, read: Callable[[str], str], write: Callable[[str], Any], prompt: str = "> ") -> None:
    """Read turns and write answers until the input ends; with a prompt, Ctrl-C ends an answer or forgets a line."""
    if chat.template is None:
        write("This model has no chat template: it continues each text as it stands.\n")
    while True:
        try:
            line = read(prompt)
        except EOFError:
            write("\n")
            return
        except KeyboardInterrupt:
            if not prompt:
                raise
            write("\n")  # an answer may have ended just before it was to be interrupted
            continue
        try:
            if not _command(chat, line.strip(), write):
                return
        except UserError as error:
            write(f"{error}\n")


def _command(chat: Chat, line: str, write: Callable[[str], Any]) -> bool:
    """Do what a line says, or have it answered; returns whether to go on."""
    word, _, rest = line.partition(" ")
    match word:
        case "":
            pass
        case "/quit" | "/exit":
            return False
        case "/reset":
            chat.messages = []
        case "/system":
            chat.system = rest
        case "/save" if rest:
            chat.save(Path(rest).expanduser())
            write(f"saved to {rest}\n")
        case _ if word.startswith("/") and "/" not in word[1:]:
            write(f"{HELP}\n")
        case _:
            _say(chat, line, write)
    return True


def _say(chat: Chat, line: str, write: Callable[[str], Any]) -> None:
    """Write an answer as it comes; Ctrl-C ends it."""
    pieces = chat.answer(line)
    try:
        for piece in pieces:
            write(plain(piece))
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]
    write("\n")


def on_terminal(chat: Chat) -> None:
    """Chat on the terminal; from a pipe, each line is a turn."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        sys.stdout.write(f"{HELP}\n")

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    run(chat, input, write, "\n> " if is_terminal else "")

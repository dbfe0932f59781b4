"""A chat: the turns so far, and an answer to the next one, piece by piece."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cordee import files
from cordee.chat.problems import BadRowError
from cordee.chat.spelling import Message
from cordee.chat.templates import Template
from cordee.chat.values import texts_in
from cordee.compute.generators import Generator
from cordee.errors import UserError


@dataclass
class Chat:
    """The turns so far, and what answers."""

    generator: Generator
    system: str = ""
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Read the chat template.

        Raises:
            UserError: it can't be read.
        """
        tokenizer = self.generator.tokenizer
        self.template = Template(tokenizer) if tokenizer.chat_template else None

    def answer(self, text: str) -> Iterator[str]:
        """The answer to a turn, piece by piece; both are kept as turns. Closing it early keeps what was said so far.

        A model without a chat template continues the text as it stands, and keeps nothing.

        Raises:
            UserError: the turn spells out a special token, or the chat has grown longer than the model reads.
        """
        coming: list[Message] = [*self.messages, {"role": "user", "content": text}]
        ids = self._encode(coming)
        if len(ids) >= self.generator.longest:
            problem = f"the chat has {len(ids)} tokens, and the model reads {self.generator.longest}"
            raise UserError(problem, hint="/reset begins a new one")
        said = ""
        try:
            for piece in self.generator.pieces(ids):
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
            return list(self.generator.tokenizer(messages[-1]["content"])["input_ids"])
        return encode(self.template, [*self._system(), *messages])


def encode(template: Template, chat: list[Message]) -> list[int]:
    """The token ids `[seq]` of a chat, up to where the next answer begins.

    Raises:
        UserError: a turn spells out a special token, or the template does not take the chat.
    """
    try:
        template.require_plain(texts_in(chat))
        readable = template.readable(chat, {})
        template.require_written(readable, {})
        written = template.text(readable, {}, add_generation_prompt=True)
    except BadRowError as error:
        raise UserError(error.problem) from error
    return list(template.encode([written])["input_ids"][0])

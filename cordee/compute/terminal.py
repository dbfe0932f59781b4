"""A chat on a terminal, or from a pipe: turns are read, and answers written as they come."""

import readline  # noqa: F401 - gives `input` its editing and its history
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cordee.compute.talk import Chat
from cordee.errors import UserError
from cordee.shown import plain

HELP = "/reset begins a new chat, /system TEXT sets the system prompt, /save FILE stores the chat, /quit or Ctrl-D ends"


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


def converse(chat: Chat) -> None:
    """Chat on the terminal; from a pipe, each line is a turn."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        sys.stdout.write(f"{HELP}\n")

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    run(chat, input, write, "\n> " if is_terminal else "")

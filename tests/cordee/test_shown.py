"""What may be shown and stored: planted tokens, keys and passwords, markup and signs that steer a terminal."""

import io

import pytest
from rich.table import Table

from cordee import shown
from cordee.display import Display, screen
from cordee.errors import Fault, UserError

CREDENTIALS = [
    "hf_" + "aB3" * 11,
    "sk-" + "proj-" + "x9" * 20,
    "ghp_" + "A1b2" * 9,
    "github_pat_" + "11A" * 10,
    "glpat-" + "a1" * 10,
    "AKIA" + "ABCD" * 4,
    "xoxb-" + "123456-abcdef",
    "eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.SflKxwRJSMeKKF2Q",
]
HARMLESS = [
    "https://example.org/a@b", "user@example.org", "hf_home", "sk-learn", "$base/checkpoints/500", "<|im_start|>",
    "posttrain.sft", "a/b@main", "hub:owner/name@refs%2Fpr%2F1", "gh_pages", "eyJ", "0" * 64, "data/AKIA.txt",
]  # fmt: skip
STEERING = "a\x1b[2Jb\x1b]0;title\x07c\x9b31md\re\u202ef"
"""Clears the screen, sets the title, colours in eight bits, goes back on the line, turns it around."""


@pytest.mark.parametrize("secret", CREDENTIALS)
def test_a_credential_is_seen_and_hidden_by_its_form(secret):
    assert shown.credential(f"x={secret}")
    assert shown.hidden(f"can't read {secret}: no") == "can't read ***: no"
    assert shown.hidden(f"https://user:{secret}@host/a") == "https://***@host/a"


@pytest.mark.parametrize("text", HARMLESS)
def test_other_texts_are_none(text):
    assert not shown.credential(text)
    assert shown.hidden(text) == text


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET", "MY_PASSWORD"])
def test_what_stands_in_the_environment_is_hidden_whatever_its_form(name, monkeypatch):
    monkeypatch.setenv(name, "quite-ordinary-7")
    assert shown.credential("a quite-ordinary-7 b")
    assert (
        str(Fault("said quite-ordinary-7", file="/x/quite-ordinary-7", hint="not quite-ordinary-7")).count("***") == 3
    )
    monkeypatch.setenv(name, "/home/me/.keys/7-is-a-path")
    assert shown.hidden("/home/me/.keys/7-is-a-path") == "/home/me/.keys/7-is-a-path"


def test_an_error_is_one_line_that_steers_nothing():
    said = str(UserError(f"bad {STEERING}\nnext", file="a\x1b[1mb", key="c\x07"))
    assert said == "a[1mb: c: bad a[2Jb]0;titlec31md efnext".replace("efnext", "ef next")


def written(show):
    """What a call writes to a screen that is a terminal, without colours."""
    out = io.StringIO()
    console = screen()
    console.file, console._force_terminal, console.no_color = out, True, True
    show(console)
    return out.getvalue()


def test_no_text_steers_the_terminal_or_counts_as_markup():
    table = Table(title=f"[bold]t[/bold]{STEERING}")
    table.add_column(f"[link=http://x]c{STEERING}")
    table.add_row(f"[red]:smile:{STEERING}")
    for text in (written(lambda out: out.print(table)), written(lambda out: out.print(f"[bold]x {STEERING}"))):
        for sign in ("\x07", "\x9b", "\r", "\u202e", "\x1b[2J", "\x1b]", "http://x]c\x1b"):
            assert sign not in text
        assert "[bold]" in text
    assert "[link=http://x]c" in written(lambda out: out.print(table))
    assert ":smile:" in written(lambda out: out.print(table))


def test_no_note_of_a_stage_steers_the_bars():
    def show(console):
        with Display(console) as display:
            display.begin("sft", f"[red]{STEERING}")
            display.event("sft", {"event": "note", "time": 0.0, "text": f"[bold]note {STEERING}"})
            display.event("sft", {"event": "waits", "time": 0.0, "text": STEERING})
            display.end("sft", f"[blink]{STEERING}")

    text = written(show)
    assert "[bold]note" in text
    assert "[blink]" in text
    for sign in ("\x07", "\x9b", "\u202e", "\x1b[2J", "\x1b]0"):
        assert sign not in text

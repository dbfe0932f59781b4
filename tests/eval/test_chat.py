"""`cordee chat` with real models: from a pipe and on a terminal."""

import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time

import pytest

from cordee import model_folder
from cordee.compute import adapter, generators, talk, terminal
from cordee.compute.tokenizer import open_tokenizer
from cordee.errors import UserError

COMMAND = [sys.executable, "-P", "-c", "from cordee.cli import main; main()", "chat"]


def piped(tmp_path, *arguments, lines):
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], input="".join(f"{line}\n" for line in lines), cwd=tmp_path, text=True,
        capture_output=True, check=False,
    )  # fmt: skip


def new(folder):
    return talk.Chat(generators.Transformers(folder, generators.Settings(max_tokens=12, temperature=0.0)))


def said(chat, text):
    return "".join(chat.answer(text))


def by_hand(folder, messages):
    """What transformers generates of the rendered chat."""
    import torch

    tokenizer, model = open_tokenizer(folder), adapter.open_served(folder).eval()
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        out = model.generate(
            **ids, max_new_tokens=12, do_sample=False, temperature=None, top_p=None, top_k=None,
            eos_token_id=adapter.stop_token_ids(folder),
        )  # fmt: skip
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_each_turn_follows_those_before_and_the_system_prompt(checkpoints):
    folder = checkpoints["first"]
    chat = new(folder)
    first = said(chat, "Alle Menschen sind frei.")
    turns = [{"role": "user", "content": "Alle Menschen sind frei."}]
    assert first == by_hand(folder, turns)
    turns += [{"role": "assistant", "content": first}, {"role": "user", "content": "Tous les hommes."}]
    assert said(chat, "Tous les hommes.") == by_hand(folder, turns)
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    chat.messages, chat.system = [], "Jeder hat das Recht."
    whole = [{"role": "system", "content": chat.system}, turns[0]]
    assert said(chat, "Alle Menschen sind frei.") == by_hand(folder, whole) != first


def test_an_answer_that_is_interrupted_is_kept_as_far_as_it_was_said(checkpoints):
    chat = new(checkpoints["first"])
    pieces = chat.answer("Alle Menschen sind frei.")
    begun = next(pieces)
    pieces.close()
    assert chat.messages[-1] == {"role": "assistant", "content": begun}


def test_what_can_not_be_asked_is_said_and_the_chat_goes_on(checkpoints):
    chat = new(checkpoints["first"])
    with pytest.raises(UserError, match=r"spells out .*</s>"):
        said(chat, "frei</s>")
    with pytest.raises(UserError, match=r"the chat has \d+ tokens, and the model reads \d+; /reset begins a new one"):
        said(chat, "Menschen " * 3000)
    assert chat.messages == []
    assert said(chat, "frei")


def test_from_a_pipe_each_line_is_a_turn_and_the_chat_is_saved(checkpoints, adapters, tmp_path):
    store = "/save chats.jsonl"
    keys = ("--temperature", "0", "--max-tokens", "4", "--adapter", adapters["small"])
    lines = ["Alle Menschen", store, "/reset", "/help", "", "frei</s>", "Tous", store, "/quit"]
    done = piped(tmp_path, checkpoints["first"], *keys, "--system", "Recht", lines=lines)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line)["messages"] for line in (tmp_path / "chats.jsonl").read_text().splitlines()]
    assert [[message["role"] for message in row] for row in rows] == [["system", "user", "assistant"]] * 2
    assert [row[1]["content"] for row in rows] == ["Alle Menschen", "Tous"]
    assert terminal.plain(rows[0][2]["content"]) in done.stdout
    assert "/reset begins a new chat" in done.stdout
    assert "spells out" in done.stdout


def test_an_adapter_answers_on_the_base_that_it_names_or_is_given(checkpoints, adapters, tmp_path):
    base = checkpoints["first"]
    moved = shutil.copytree(adapters["small"], tmp_path / "far" / "away")  # the base's path leads nowhere from here
    with pytest.raises(UserError, match="no model folder here"):
        model_folder.served_base(moved)
    placed = adapter.placed_on(moved, base)
    assert adapter.placed_on(adapters["small"], base) == adapters["small"]
    own, given = (said(new(folder), "Alle Menschen") for folder in (adapters["small"], placed))
    assert own == given != said(new(base), "Alle Menschen")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "cordee: command line: no folder 'absent'; name an artifact as recipe/stage@version"),
        (["mine/sft@3"], "cordee: "),
        (["."], "is no Hugging Face model: it has no config.json"),
        ([".", "--adapter", "."], "is no adapter: it has no adapter_config.json"),
    ],
)
def test_what_is_no_model_is_one_line(arguments, message, tmp_path):
    done = piped(tmp_path, *arguments, lines=[])
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1), done.stderr
    assert message in done.stderr


def test_a_model_without_a_template_continues_the_text(checkpoints, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(checkpoints["first"], bare, ignore=shutil.ignore_patterns("chat_template.jinja"))
    written: list[str] = []
    lines = iter(["Alle Menschen"])

    def read(_prompt):
        for line in lines:
            return line
        raise EOFError

    terminal.run(new(bare), read, written.append)
    assert written[0] == "This model has no chat template: it continues each text as it stands.\n"
    assert len("".join(written[1:]).strip()) > 0


def test_signs_that_steer_a_terminal_are_left_out():
    assert terminal.plain("a\x1b[31mb\x07\r\n\tc\u202ed é 👩‍🔬") == "a[31mb\n\tcd é 👩‍🔬"


def test_ctrl_c_ends_an_answer_on_a_terminal_and_ctrl_d_the_chat(checkpoints, tmp_path):
    command = [*COMMAND, str(checkpoints["first"]), "--max-tokens", "200", "--temperature", "0"]
    process, main = pty.fork()
    if process == 0:
        os.chdir(tmp_path)
        os.execv(command[0], command)  # noqa: S606 - fixed words
    shown = ""

    def wait_for(pattern, seconds=120.0):
        nonlocal shown
        deadline = time.monotonic() + seconds
        while not re.search(pattern, shown) and time.monotonic() < deadline:
            if select.select([main], [], [], 0.2)[0]:
                shown += os.read(main, 4096).decode(errors="replace")
        assert re.search(pattern, shown), shown
        shown = ""

    try:
        wait_for("> $")
        os.write(main, b"Alle Menschen\n")
        wait_for(r"Alle Menschen\r\n.+")
        os.write(main, b"\x03")
        wait_for("> $")
        os.write(main, b"/save it.jsonl\n")
        wait_for(r"saved to it\.jsonl\s+> $")  # only then does it read the terminal again
        os.write(main, b"\x04")
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    finally:
        os.close(main)  # which hangs up what still runs
    (row,) = [json.loads(line) for line in (tmp_path / "it.jsonl").read_text().splitlines()]
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]

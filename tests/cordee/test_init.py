"""`cordee init`: the recipe that it writes plans and, in the long tests, runs as it stands."""

import json
import os
import pty
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import stock_tokenizers
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cordee import init, yaml12

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WIDTH = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = ["Summer", "winter", "rain", "snow", "wind", "sun", "cloud", "storm"]


def make_model(folder, template=CHATML):
    made, settings, _ = stock_tokenizers.smollm2()
    settings = settings | ({"chat_template": template} if template else {})
    stock_tokenizers.write(folder, (made, settings, ""), beside_model=False)
    ids = {f"{name}_token_id": made.token_to_id(settings[f"{name}_token"]) for name in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=made.get_vocab_size(), max_position_embeddings=2048, num_key_value_heads=1, tie_word_embeddings=True,
        **WIDTH, **ids,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def have(tmp_path):
    """A model with a chat template, one without, chats, pairs, texts, questions and data of the hub."""
    make_model(tmp_path / "model")
    make_model(tmp_path / "base", template="")
    said = [(f"What is {word}?", f"{word} is weather number {at}.") for at, word in enumerate(WORDS * 5)]
    lines(tmp_path / "my chats.jsonl", [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
        for asked, answer in said
    ])  # fmt: skip
    lines(tmp_path / "pairs.jsonl", [{"prompt": a, "chosen": b, "rejected": "I do not know."} for a, b in said])
    pq.write_table(pa.table({"text": [f"{a} {b} " * 8 for a, b in said] * 5}), tmp_path / "texts.parquet")
    lines(tmp_path / "q.jsonl", [{"question": a, "answer": b} for a, b in said[:4]])
    lines(tmp_path / "odd.jsonl", [{"a": 1, "b": 2}])
    return tmp_path


CASES = {
    "model and chats": ["--model", "model", "--chats", "my chats.jsonl", "--questions", "q.jsonl"],
    "model and pairs": ["--model", "model", "--pairs", "pairs.jsonl"],
    "base model and chats": ["--model", "base", "--chats", "my chats.jsonl"],
    "chats, then pairs": ["--model", "model", "--chats", "my chats.jsonl", "--pairs", "pairs.jsonl"],
    "questions as chats": ["--model", "model", "--chats", "q.jsonl"],
    "corpus": ["--corpus", "texts.parquet"],
    "model and questions": ["--model", "model", "--questions", "q.jsonl"],
}


@pytest.mark.parametrize("name", CASES)
def test_what_it_writes_can_be_planned(name, have, cordee):
    began = time.monotonic()
    done = cordee("init", "mine.yaml", *CASES[name])
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 10, "3 s on a machine without other load"
    assert done.stdout.endswith("wrote mine.yaml: look at it, then\n  cordee plan mine.yaml\n  cordee run mine.yaml\n")
    planned = cordee("plan", "mine.yaml")
    assert planned.returncode == 0, planned.stderr
    again = cordee("init", "mine.yaml", *CASES[name])
    assert (again.returncode, again.stderr) == (
        2,
        "cordee: mine.yaml: is there already; name another file\n",
    )
    text = (have / "mine.yaml").read_text()
    stages = yaml12.read(have / "mine.yaml")["stages"]
    assert max(map(len, text.splitlines())) <= 160
    if name == "questions as chats":
        assert stages["sft"]["data"] == [{"path": "q.jsonl", "columns": {"question": "prompt", "answer": "completion"}}]
        assert stages["answers"]["columns"] == {"question": "prompt"}
    elif "chats" in name and name != "base model and chats":
        assert "lora" not in stages["sft"], "so small a model is trained whole"
        assert stages["sft"]["data"] == [{"path": "my chats.jsonl"}]
    if name == "base model and chats":
        assert stages["sft"]["chat_template"] == "chatml"


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", CASES)
def test_what_it_writes_runs_as_it_stands(name, have, cordee):
    assert cordee("init", "mine.yaml", *CASES[name]).returncode == 0
    done = cordee("run", "mine.yaml", timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (have / "runs" / "mine" / "report@1" / "index.html").exists()


def test_an_adapter_is_trained_of_a_larger_model(have, monkeypatch):
    monkeypatch.chdir(have)
    monkeypatch.setattr(init, "SMALL", 1000)
    init.write(init.Has(model=Path("model"), chats=Path("my chats.jsonl"), pairs=Path("pairs.jsonl")), Path("r.yaml"))
    stages = yaml12.read(Path("r.yaml"))["stages"]
    assert stages["sft"]["lora"]["r"] == 16
    assert stages["dpo"]["model"] == "$merged"
    assert stages["answers"]["models"] == {"before": "model", "sft": "$merged", "dpo": "$aligned"}
    assert stages["sft"]["trainer"]["num_train_epochs"] == 3
    assert stages["sft"]["trainer"]["max_length"] == 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "cordee: command line: there is nothing to do; `--model M --chats FILE`"),
        (["--chats", "my chats.jsonl"], "cordee: command line: a model is needed; --model FOLDER"),
        (["--model", "absent", "--chats", "my chats.jsonl"], "cordee: absent: --model: is no folder"),
        (["--model", "model", "--chats", "absent.jsonl"], "cordee: absent.jsonl: --chats: "),
        (["--model", "model", "--chats", "odd.jsonl"], "can't be told what it is: its columns are 'a', 'b'"),
        (
            ["--model", "model", "--chats", "pairs.jsonl"],
            "the shape 'preference pair'; give it as --pairs",
        ),
        (["--model", "model", "--pairs", "my chats.jsonl"], "holds rows of the shape 'messages'; give it as --chats"),
        (["--corpus", "q.jsonl"], "has no column `text`"),
        (["--model", "model", "--tasks", "gsm8kk"], "no task, group, tag or file 'gsm8kk'"),
    ],
)
def test_what_nothing_can_be_made_of_is_one_line(arguments, message, have, cordee):
    done = cordee("init", "mine.yaml", *arguments)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1), done.stderr
    assert message in done.stderr
    assert have


def test_on_a_terminal_it_asks(have):
    process, main = pty.fork()
    if process == 0:
        os.chdir(have)
        command = [sys.executable, "-P", "-c", "from cordee.cli import main; main()", "init", "asked.yaml"]
        os.execvp(command[0], command)  # noqa: S606 - fixed words
    shown, answers = "", ["model", "my chats.jsonl", "", "", "q.jsonl"]
    try:
        while chunk := os.read(main, 4096).decode(errors="replace"):
            shown += chunk
            if shown.rstrip().endswith(":") and "none)" in shown[-12:] and answers:
                os.write(main, f"{answers.pop(0)}\n".encode())
                shown = ""
    except OSError:  # the other end is closed
        pass
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0, shown
    assert set(yaml12.read(have / "asked.yaml")["stages"]) == {"sft", "answers", "benchmark", "report"}


@pytest.mark.parametrize("turns", [1, 3])
def test_the_lengths_that_init_counts_hold_what_the_template_adds(turns, tmp_path):
    from cordee import look
    from cordee.compute.tokenizer import open_tokenizer

    template = "{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}" + CHATML  # as SmolLM2 has one
    make_model(model := tmp_path / "model", template)
    messages = [{"role": role, "content": "How are you today?"} for _ in range(turns) for role in ("user", "assistant")]
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n")
    (counted,) = look.look(path, model, "--chats").lengths
    exact = len(open_tokenizer(model).apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"])
    assert exact <= counted <= exact + 4 * turns + 4

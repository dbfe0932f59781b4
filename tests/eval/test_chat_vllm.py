"""`cordee chat --engine vllm`: it answers what transformers answers."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cordee.compute import generators, talk
from cordee.errors import UserError

pytest.importorskip("vllm", reason="vLLM is not installed on this platform")
GREEDY = generators.Settings(max_tokens=16, temperature=0.0)
TURNS = ("Alle Menschen sind frei.", "Tous les hommes", "Jeder hat das Recht auf Leben.")
SMOLLM2 = Path(__file__).resolve().parents[2] / "models" / "smollm2"


@pytest.fixture(scope="module")
def served(adapters):
    """An adapter in vLLM, whose engine serves its base too."""
    opened = generators.Vllm(adapters["small"], GREEDY)
    yield opened
    opened.engines.stop()


@pytest.fixture
def by_transformers(adapters):
    return generators.Transformers(adapters["small"], GREEDY)


def said(chat, text):
    return list(chat.answer(text))


def test_each_turn_is_answered_as_by_transformers(served, by_transformers):
    chats = [talk.Chat(generator, "Recht") for generator in (served, by_transformers)]
    answers = [[said(chat, turn) for chat in chats] for turn in TURNS]
    assert all(one == other for one, other in answers)
    assert chats[0].messages == chats[1].messages


def test_an_answer_comes_word_by_word(served, monkeypatch):
    space = served.tokenizer.convert_tokens_to_ids("Ġ")
    monkeypatch.setattr(served, "sampling", {"temperature": 0.0, "logit_bias": {space: 100.0}})
    assert list(served.pieces([0, 5, 6])) == [" "] * GREEDY.max_tokens


def test_an_answer_that_is_interrupted_is_kept_and_the_next_one_is_right(served, by_transformers):
    chat = talk.Chat(served)
    pieces = chat.answer(TURNS[0])
    begun = next(pieces)
    pieces.close()
    assert chat.messages[-1] == {"role": "assistant", "content": begun}
    assert not served.engine.llm.llm_engine.has_unfinished_requests()
    chat.messages = []
    assert said(chat, TURNS[1]) == said(talk.Chat(by_transformers), TURNS[1])


def test_it_ends_at_the_end_of_a_turn(served, monkeypatch):
    """At a token that it says in the midst of an answer, as if that ended a turn."""
    ids = talk.encode(talk.Chat(served).template, [{"role": "user", "content": TURNS[0]}])
    running = served.engine.llm.llm_engine

    def tokens():
        seen = []
        step = running.step
        with monkeypatch.context() as watched:
            watched.setattr(running, "step", lambda: seen.extend(step()) or seen[-1:])
            list(served.pieces(ids))
        return seen[-1].outputs[0].token_ids

    whole = list(tokens())
    end = next(token for token in whole[1:] if token != whole[0])
    with monkeypatch.context() as planted:
        planted.setattr(generators.adapter, "stop_token_ids", lambda _folder: [end])
        assert list(tokens()) == whole[: whole.index(end) + 1]


def test_what_is_sampled_follows_the_seed(served, monkeypatch):
    def answers(seed):
        settings = generators.Settings(max_tokens=12, temperature=1.5, top_p=0.9, seed=seed)
        monkeypatch.setattr(served, "settings", settings)
        monkeypatch.setattr(served, "sampling", generators._sampling(served.folder, settings))
        monkeypatch.setattr(served, "answers", 0)
        return ["".join(served.pieces([0, 5, 6])) for _ in range(2)]

    assert answers(1) == answers(1) != answers(2)
    assert len(set(answers(1))) == 2


def test_what_is_sampled_from_is_what_transformers_samples_from(checkpoints, tmp_path):
    base = shutil.copytree(checkpoints["first"], tmp_path / "base")
    file, asked = base / "generation_config.json", generators.Settings(8)
    assert generators._sampling(base, asked) == {"temperature": 0.0, "repetition_penalty": 1.0}
    file.write_text(json.dumps({"do_sample": True, "temperature": 0.6, "repetition_penalty": 1.2}))
    found = {"temperature": 0.6, "top_p": 1.0, "top_k": 50, "min_p": 0.0, "repetition_penalty": 1.2}
    assert generators._sampling(base, asked) == found
    file.write_text(json.dumps({"do_sample": True, "no_repeat_ngram_size": 3, "num_beams": 1}))
    with pytest.raises(UserError, match=r"vLLM does not know no_repeat_ngram_size; --engine transformers does"):
        generators._sampling(base, asked)


@pytest.mark.long
@pytest.mark.skipif(not SMOLLM2.exists(), reason="`make smollm2` builds it")
def test_smollm2_is_answered_alike_by_both_engines(tmp_path):
    command = [sys.executable, "-P", "-c", "from cordee.cli import main; main()", "chat", str(SMOLLM2)]
    answers = []
    for engine in ("transformers", "vllm"):
        lines = ("What is the capital of France?", "And of Italy?", f"/save {engine}.jsonl")
        done = subprocess.run(
            [*command, "--temperature", "0", "--max-tokens", "48", "--engine", engine], cwd=tmp_path, text=True,
            input="".join(f"{line}\n" for line in lines), capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        answers.append(json.loads((tmp_path / f"{engine}.jsonl").read_text())["messages"])
    assert answers[0] == answers[1]
    assert re.search("Paris", answers[0][1]["content"])

"""A judge's reward is the expectation over the words that it may say, by hand and in either engine."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reward_samples import answer, notes, rows_in, score_config, written

from cordee import peek
from cordee.errors import UserError
from cordee.stage import Context
from posttrain import score
from posttrain.rewards import judge
from posttrain.rewards.settings import Reward

NewContext = Callable[[str], Context]
PROMPT = [{"role": "user", "content": "Which language is this?"}]


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    file = tmp_path / "constitution.md"
    file.write_text("Name the language, and {nothing} else.\n")
    return file


def opened(folder: Path, **keys: Any) -> judge.Judge:
    reward = Reward.model_validate({"judge": str(folder), "engine": "transformers", "dtype": "float32", **keys})
    return judge.open_judge(reward, folder, lambda _: None)


def next_probabilities(folder: Path, request: str) -> dict[str, float]:
    """Of each token of a digit or letter, in float64, from the whole rendering of a request."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    chat = [{"role": "user", "content": request}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
    with torch.no_grad():
        probabilities = model(torch.tensor([ids])).logits[0, -1].softmax(-1)
    return {word: float(probabilities[tokenizer.convert_tokens_to_ids(word)]) for word in "123456789AB"}


def test_a_rating_is_the_mean_over_the_digits_by_their_probability(model_folder: Path, rules: Path) -> None:
    said = [[{"role": "assistant", "content": text}] for text in ("German", "I don't know", "German")]
    found = opened(model_folder, constitution=str(rules)).measure([PROMPT] * 3, said, {})
    for text, figures in zip(("German", "I don't know"), found, strict=False):
        request = judge.RATE.format(
            constitution=rules.read_text().strip(), prompt="user: Which language is this?", answer=text
        )
        by_word = next_probabilities(model_folder, request)
        digits = [by_word[word] for word in "123456789"]
        mean = sum((at + 1) * share for at, share in enumerate(digits)) / sum(digits)
        assert figures == {"reward": pytest.approx(mean, rel=1e-4), "mass": pytest.approx(sum(digits), rel=1e-3)}
    assert found[0] == pytest.approx(found[2], rel=1e-5)
    assert 1 < found[0]["reward"] < 9


def test_a_comparison_is_the_mean_of_both_orders(model_folder: Path) -> None:
    texts = ("German", "French", "Italian")
    said = [[{"role": "assistant", "content": text}] for text in (*texts, "alone")]
    prompts = [PROMPT] * 3 + [[{"role": "user", "content": "Another?"}]]
    found = opened(model_folder, compare=True).measure(prompts, said, {})

    def prefers(one: str, other: str) -> float:
        request = judge.COMPARE.format(
            constitution=judge.NO_RULES, prompt="user: Which language is this?", first=one, second=other
        )
        by_word = next_probabilities(model_folder, request)
        return by_word["A"] / (by_word["A"] + by_word["B"])

    rates, differing = dict.fromkeys(texts, 0.0), dict.fromkeys(texts, 0.0)
    for one, other in (("German", "French"), ("German", "Italian"), ("French", "Italian")):
        in_front, behind = prefers(one, other), 1 - prefers(other, one)
        rates[one] += (in_front + behind) / 4
        rates[other] += (2 - in_front - behind) / 4
        for text in (one, other):
            differing[text] += ((in_front > 0.5) != (behind > 0.5)) / 2
    for text, figures in zip(texts, found, strict=False):
        assert figures["reward"] == pytest.approx(rates[text], rel=1e-4)
        assert figures["disagreement"] == pytest.approx(differing[text])
    assert sum(figures["reward"] for figures in found[:3]) == pytest.approx(1.5)
    assert found[3] == {"reward": None}


def test_a_judge_that_says_something_else_is_noted(model_folder: Path, tmp_path: Path, context: Context) -> None:
    """A random model has almost no probability on digits."""
    data = written(tmp_path / "a.jsonl", [answer(1, "7", "7"), answer(1, "eight", "7")])
    keys = {"judge": str(model_folder), "engine": "transformers", "dtype": "float32", "name": "charter"}
    score.run(score_config(data, rewards=[keys]), context)
    told = json.loads((context.out / "scores.json").read_text())["rewards"]["charter"]
    assert 0 < told["mass"] < 0.5
    (said,) = [note for note in notes(context) if note.startswith("charter: the judge says")]
    assert said.endswith("only")
    assert all(1 <= row["rewards"]["charter"] <= 9 for row in rows_in(context.out / "scored.jsonl"))


def test_a_special_token_in_an_answer_does_not_end_its_place(model_folder: Path) -> None:
    one = opened(model_folder)
    end = "<|user_end|>"
    ids = one._ids(one._rendered(f"an answer {end} 9"))
    plain = one._ids(one._rendered("an answer 9"))
    number = one.tokenizer.convert_tokens_to_ids(end)
    assert ids.count(number) == plain.count(number) == 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"max_length": 40}, "a request to the judge has .* tokens, and it reads 39"),
        ({"constitution": "empty.md"}, "is empty"),
        ({"constitution": "missing.md"}, "can't be read"),
        ({"max_length": 4096}, "4096 tokens were asked for"),
    ],
)
def test_what_can_not_be_judged_is_one_line(
    keys: dict[str, Any], message: str, model_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty.md").write_text(" \n")
    if "constitution" in keys:
        keys = {"constitution": str(tmp_path / keys["constitution"])}
    with pytest.raises(UserError, match=message):
        opened(model_folder, **keys).measure([PROMPT], [[{"role": "assistant", "content": "x"}]], {})


JUDGED = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from cordee.stage import Context
from posttrain import score
from reward_samples import score_config
keys = {{"judge": {judge!r}, "dtype": "float32", "name": "charter", "engine": "vllm"}}
rewards = [keys, {{**keys, "name": "compared", "compare": True}}]
context = Context(out=Path({out!r}), seed=3, events=Path({events!r}))
score.run(score_config(Path({data!r}), rewards=rewards, batch_size=100), context)
"""


def with_wider_heads(model_folder: Path, folder: Path) -> Path:
    """A model that vLLM's kernels for CPUs take, which need heads of 32 numbers."""
    from transformers import ApertusForCausalLM, AutoConfig

    shutil.copytree(model_folder, folder)
    config = AutoConfig.from_pretrained(folder, num_attention_heads=2, num_key_value_heads=1)
    torch.manual_seed(1)
    ApertusForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.skipif(not peek.is_installed("vllm"), reason="vLLM is not installed")
def test_vllm_says_the_same_as_transformers(model_folder: Path, tmp_path: Path, new_context: NewContext) -> None:
    rows = [answer(number, said, "7") for number in (1, 2) for said in ("7", "eight", "fourteen")]
    data, one, other = written(tmp_path / "a.jsonl", rows), new_context("vllm"), new_context("transformers")
    folder = with_wider_heads(model_folder, tmp_path / "judge")
    script = JUDGED.format(
        tests=str(Path(__file__).parent), judge=str(folder), out=str(one.out), events=str(one.events),
        data=str(data),
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    keys = {"judge": str(folder), "dtype": "float32", "name": "charter", "engine": "transformers"}
    score.run(score_config(data, rewards=[keys, {**keys, "name": "compared", "compare": True}]), other)
    for first, second in zip(rows_in(one.out / "scored.jsonl"), rows_in(other.out / "scored.jsonl"), strict=True):
        assert first["rewards"] == pytest.approx(second["rewards"], abs=1e-2)
    told = [json.loads((context.out / "scores.json").read_text())["rewards"] for context in (one, other)]
    assert told[0]["charter"]["mass"] == pytest.approx(told[1]["charter"]["mass"], rel=1e-2)

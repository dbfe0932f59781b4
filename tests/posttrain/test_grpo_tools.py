"""Completions of several turns: the model calls tools, its own or an environment's, and goes on after their answers."""

from pathlib import Path
from typing import Any

import pytest
from rollout_samples import config, lines, prompts, said

from cordee.errors import Fault, UserError
from cordee.stage import Context
from posttrain import grpo
from posttrain.rollouts.with_transformers import Transformers
from posttrain.training.sampling import Sampled

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call><|im_end|>'
TRAINER = {"max_completion_length": 150, "max_steps": 1}


def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: The first.
        b: The second.

    Returns:
        Their sum.
    """
    return a + b


def used(completions: list[Any], **_: Any) -> list[float | None]:
    """1 where a tool has answered 5, and some more for other texts."""
    answers = [[message["content"] for message in one if message["role"] == "tool"] for one in completions]
    return [float("5" in found) + len(said(one)) / 1000 for found, one in zip(answers, completions, strict=True)]


class Sums:
    """An environment: its tool counts its calls, and it gives the reward."""

    def reset(self, **_: Any) -> str:
        """Begin a completion."""
        self.calls = 0
        return " Use the tool."

    def add(self, a: int, b: int) -> int:
        """Adds two numbers.

        Args:
            a: The first.
            b: The second.

        Returns:
            Their sum.
        """
        self.calls += 1
        return a + b

    def get_reward(self) -> float:
        """One for a call."""
        return float(self.calls)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights and the tokens of Qwen."""
    import stock_tokenizers
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("qwen")
    stock_tokenizers.write(folder, stock_tokenizers.STOCK["qwen2"](), beside_model=False)
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    made = Qwen2Config(
        vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=2048, **size, **ids
    )  # fmt: skip
    Qwen2ForCausalLM(made).save_pretrained(folder)
    return folder


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """A file of prompts."""
    return prompts(tmp_path / "prompts.jsonl")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of a group calls the tool in its first turn: a model with random weights never would."""
    sample = Transformers.sample

    def calling(self: Any, given: Any, seeds: Any, how: Any) -> list[Sampled]:
        found = sample(self, given, seeds, how)
        tokenizer = self.trainer.processing_class
        ids = tokenizer(CALL, add_special_tokens=False)["input_ids"]
        for at, prompt in enumerate(given):
            if at % 4 == 0 and "<tool_response>" not in tokenizer.decode(prompt):
                found[at] = Sampled(list(ids), [0.0] * len(ids))
        return found

    monkeypatch.setattr(Transformers, "sample", calling)


def keys(model: Path, asked: Path, **changes: Any) -> grpo.Config:
    """A short training with a tool; the sampler's log-probabilities of what was planted are none."""
    trainer = TRAINER | changes.pop("trainer", {})
    given = {"tools": ["test_grpo_tools:add"], "chat_template": "qwen2_5", "max_logprob_mismatch": 100.0, **changes}
    given = {"rewards": [{"function": "test_grpo_tools:used"}], **given}
    return config(model, asked, **given, trainer=trainer)


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("template", ["qwen2_5", "qwen3"])
def test_a_tools_answer_is_read_and_carries_no_loss(
    model: Path, asked: Path, context: Context, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen 3's template is one that TRL renders in a form of its own, which keeps what was said before."""
    from posttrain.rollouts import audit

    seen: list[tuple[int, int]] = []
    require = audit.require

    def looking(batch: Any, known: Any) -> None:
        require(batch, known)
        seen.append((int(batch["completion_mask"].sum()), int(audit.sampled_tokens(batch).sum())))

    monkeypatch.setattr(audit, "require", looking)
    grpo.run(keys(model, asked, chat_template=template), context)
    kept = lines(context, "completions.jsonl")
    roles = [[message["role"] for message in row["completion"]] for row in kept]
    assert [found for found in roles if len(found) > 1] == [["assistant", "tool", "assistant"]] * 2
    assert all(row["completion"][1]["content"] == "5" for row in kept if len(row["completion"]) > 1)
    assert all((row["reward"] >= 1) == (len(row["completion"]) > 1) for row in kept)
    assert any(own < whole for whole, own in seen)
    assert lines(context)[0]["tools/call_frequency"] == pytest.approx(0.25)


@pytest.mark.usefixtures("calls")
def test_an_environment_has_tools_and_gives_a_reward(model: Path, asked: Path, context: Context) -> None:
    grpo.run(keys(model, asked, tools=[], rewards=[], environment="test_grpo_tools:Sums"), context)
    kept = lines(context, "completions.jsonl")
    assert [row["rewards"]["Sums"] for row in kept[:8]] == [1.0, 0.0, 0.0, 0.0] * 2
    assert kept[0]["prompt"][-1]["content"].endswith("Use the tool.")


@pytest.mark.usefixtures("calls")
def test_loss_on_a_tools_answer_is_a_fault(
    model: Path, asked: Path, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl import GRPOTrainer

    loop = GRPOTrainer._tool_call_loop

    def unmasked(self: Any, *given: Any) -> Any:
        masks, *rest = loop(self, *given)
        return ([[1] * len(mask) for mask in masks], *rest)

    monkeypatch.setattr(GRPOTrainer, "_tool_call_loop", unmasked)
    with pytest.raises(Fault, match="a completion that was not sampled"):
        grpo.run(keys(model, asked), context)


def test_a_template_that_knows_no_tools_is_refused(model_folder: Path, asked: Path, context: Context) -> None:
    with pytest.raises(UserError, match="TRL refuses it: The provided chat template does not support tool calling"):
        grpo.run(config(model_folder, asked, tools=["test_grpo_tools:add"]), context)
    with pytest.raises(UserError, match=r"tools.0: test_grpo_tools has no 'ad' that can be called; did you mean 'add'"):
        grpo.run(config(model_folder, asked, tools=["test_grpo_tools:ad"]), context)

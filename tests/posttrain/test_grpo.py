"""GRPO trains on what it samples, with transformers generating; goes on after a stop or a kill to the same bits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rollout_samples import config, lines, notes, prompts, rloo_config
from stopping import StopsAfter

from cordee.errors import Fault, Stopped, UserError
from cordee.stage import Context
from posttrain import grpo, rloo
from posttrain.rollouts.with_transformers import Transformers
from posttrain.training import sampling
from posttrain.training.sampling import Sampled

OFF_POLICY = {"generation_batch_size": 16, "num_iterations": 2, "max_steps": 8}
"""Four optimizer steps on what is sampled at once."""


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """A file of prompts."""
    return prompts(tmp_path / "prompts.jsonl")


def content(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name not in ("metrics.jsonl", "training.json")}


def test_weights_are_trained_to_a_higher_reward_and_completions_are_kept(
    model_folder: Path, asked: Path, new_context: Callable[[str], Context]
) -> None:
    context = new_context("grpo")
    trainer = {"max_steps": 20, "learning_rate": 2e-2, "lr_scheduler_type": "constant"}
    found = grpo.run(config(model_folder, asked, lora=None, trainer=trainer), context)
    rows = lines(context)
    assert [row["step"] for row in rows] == list(range(1, 21))
    first, last = (sum(row["reward"] for row in some) / 5 for some in (rows[:5], rows[-5:]))
    assert last > first + 0.15
    assert all(row["logprob_mismatch/max"] < 1e-4 for row in rows)
    assert all(0 <= row["logprob_mismatch/kl"] < 1e-6 for row in rows)
    assert {"entropy", "completions/mean_length", "completions/clipped_ratio", "clip_ratio/region_mean"} <= set(rows[0])
    assert found["completions"] == 20 * 8
    assert found["tokens"] == rows[-1]["tokens"]
    assert found["epoch"] == pytest.approx(20 * 2 / 12)
    assert found["engine"] == "transformers"
    assert (context.out / "model.safetensors").is_file()
    kept = lines(context, "completions.jsonl")
    assert [row["step"] for row in kept] == [step for step in range(1, 21) for _ in range(8)]
    assert kept[0]["prompt"][0]["content"].startswith("How many are")
    assert kept[0]["completion"][0]["role"] == "assistant"
    means = [sum(row["rewards"]["by_ids"] for row in kept[at : at + 8]) / 8 for at in range(0, 160, 8)]
    assert means == pytest.approx([row["reward"] for row in rows], abs=1e-6)
    for at in range(0, 160, 4):
        assert sum(row["advantage"] for row in kept[at : at + 4]) == pytest.approx(0, abs=1e-4)
        assert len({row["prompt"][0]["content"] for row in kept[at : at + 4]}) == 1


@pytest.mark.parametrize(("trainer", "after"), [({}, 3), (OFF_POLICY, 3), (OFF_POLICY, 6)])
def test_a_stopped_run_goes_on_to_the_same_bits(
    model_folder: Path, asked: Path, new_context: Callable[[str], Context], trainer: dict[str, Any], after: int
) -> None:
    """In the middle of a rollout too: its completions are part of the resume point."""
    whole, broken = new_context("whole"), new_context("broken")
    keys = config(model_folder, asked, trainer=trainer, heldout=0.2, eval_steps=2, save_steps=[5])
    metrics = grpo.run(keys, whole)
    with pytest.raises(Stopped, match=f"step {after} of"):
        grpo.run(keys, StopsAfter(broken.out, broken.seed, broken.events, after))
    again = grpo.run(keys, broken)
    assert lines(whole) == lines(broken)
    assert content(whole.out) == content(broken.out)
    assert {name: value for name, value in metrics.items() if not name.endswith("_time")} == {
        name: value for name, value in again.items() if not name.endswith("_time")
    }
    if trainer:
        rows = [row for row in lines(whole) if "loss" in row]
        sampled_at = [row["step"] for row in rows if "logprob_mismatch/mean" in row]
        assert sampled_at == [1, 5]
        assert max(row["clip_ratio/region_mean"] for row in rows) > 0


def test_a_killed_run_goes_on_to_the_same_bits(
    model_folder: Path, asked: Path, new_context: Callable[[str], Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed within step 6, after completions of it were written, it goes on from the point of step 4."""
    whole, broken = new_context("whole"), new_context("broken")
    keys = config(model_folder, asked)
    grpo.run(keys, whole)
    sample, calls = Transformers.sample, []

    def dying(self: Any, *given: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return sample(self, *given)

    monkeypatch.setattr(Transformers, "sample", dying)
    with pytest.raises(KeyboardInterrupt):
        grpo.run(keys, broken)
    monkeypatch.undo()
    assert lines(broken, "completions.jsonl")[-1]["step"] == 5
    with (broken.out / "completions.jsonl").open("a") as file:
        file.write('{"step": 6, "pro')  # what a kill leaves of a line
    grpo.run(keys, broken)
    assert lines(whole) == lines(broken)
    assert content(whole.out) == content(broken.out)


def test_rloo_trains_and_goes_on_to_the_same_bits(
    model_folder: Path, asked: Path, new_context: Callable[[str], Context]
) -> None:
    whole, broken = new_context("whole"), new_context("broken")
    keys = rloo_config(model_folder, asked, heldout=0.2)
    found = rloo.run(keys, whole)
    rows = [row for row in lines(whole) if "loss" in row]
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)  # beta is 0.05 unless told: the model starts as its reference
    assert rows[-1]["kl"] != 0
    assert all(row["logprob_mismatch/max"] < 1e-4 for row in rows)
    assert {"heldout_reward", "heldout_reward_error", "heldout_rewards/by_ids"} <= set(found)
    with pytest.raises(Stopped):
        rloo.run(keys, StopsAfter(broken.out, broken.seed, broken.events))
    rloo.run(keys, broken)
    assert lines(whole) == lines(broken)
    assert content(whole.out) == content(broken.out)


def test_held_out_prompts_are_answered_greedily_and_never_trained_on(
    model_folder: Path, asked: Path, new_context: Callable[[str], Context]
) -> None:
    context, sampled = new_context("heldout"), new_context("sampled")
    grpo.run(config(model_folder, asked, heldout=0.25, eval_steps=3), context)
    measured = [row for row in lines(context) if "heldout_reward" in row]
    assert [row["step"] for row in measured] == [0, 3, 6]
    assert measured[0]["heldout_reward_error"] > 0
    kept = lines(context, "completions.jsonl")
    apart = {row["prompt"][0]["content"] for row in kept if row.get("heldout")}
    assert len(apart) == 3
    assert not apart & {row["prompt"][0]["content"] for row in kept if not row.get("heldout")}
    grpo.run(config(model_folder, asked, heldout=0.25, trainer={"num_generations_eval": 2}), sampled)
    again = [row for row in lines(sampled) if "heldout_reward" in row]
    assert [row["step"] for row in again] == [0, 6]
    assert again[0]["heldout_reward"] != measured[0]["heldout_reward"]


def test_the_length_of_held_out_completions_counts_those_that_were_cut_off(
    model_folder: Path, asked: Path, new_context: Callable[[str], Context]
) -> None:
    """TRL masks these with `mask_truncated_completions`; what was sampled is the same with it and without."""
    found = []
    for masks in (False, True):
        context = new_context(f"masks{masks}")
        trainer = {"mask_truncated_completions": masks, "max_steps": 1}
        grpo.run(config(model_folder, asked, heldout=0.25, trainer=trainer), context)
        found.append(next(row for row in lines(context) if "heldout_reward" in row))
    assert found[0]["heldout_clipped_ratio"] == found[1]["heldout_clipped_ratio"] > 0
    assert found[0]["heldout_length"] == found[1]["heldout_length"] > 0


def test_rewards_are_summed_by_weight_and_one_that_does_not_apply_is_left_out(
    model_folder: Path, asked: Path, new_context: Callable[[str], Context]
) -> None:
    context = new_context("rewards")
    rewards = [
        {"function": "rollout_samples:by_ids", "weight": 0.5, "name": "small", "arguments": {"below": 100}},
        {"function": "rollout_samples:number_match", "weight": 2.0},
        {"function": "rollout_samples:form", "arguments": {"pattern": ".*"}, "weight": 0.25},
    ]
    grpo.run(config(model_folder, asked, rewards=rewards, trainer={"max_steps": 4}), context)
    kept = lines(context, "completions.jsonl")
    assert {row["rewards"]["number_match"] for row in kept} == {None, 0.0}
    for row in kept:
        small, match, shape = (row["rewards"][name] for name in ("small", "number_match", "form"))
        assert row["reward"] == pytest.approx(0.5 * small + 2 * (match or 0) + 0.25 * shape)
    assert {"rewards/small/mean", "rewards/form/mean"} <= set(lines(context)[0])


@pytest.mark.parametrize("stage", [grpo, rloo])
def test_a_reward_without_weight_is_measured_only(
    model_folder: Path, asked: Path, new_context: Callable[[str], Context], stage: Any
) -> None:
    """TRL alone would give the sum 0, here the best, to a completion that no other reward applies to."""
    rewards = [{"function": "rollout_samples:of_some"}]
    measured = {"function": "rollout_samples:form", "arguments": {"pattern": ".*"}, "weight": 0}
    found = []
    for name, given in (("alone", rewards), ("beside", [*rewards, measured])):
        context = new_context(name)
        keys = config if stage is grpo else rloo_config
        stage.run(keys(model_folder, asked, rewards=given, heldout=0.2, trainer={"max_steps": 2}), context)
        kept = lines(context, "completions.jsonl")
        assert {row["reward"] is None for row in kept} == {True, False}
        assert all(row["reward"] == row["rewards"]["of_some"] for row in kept)
        assert {row.get("advantage") for row in kept if row["reward"] is None} <= {0.0, None}
        told = [{name: row[name] for name in ("reward", "heldout_reward") if name in row} for row in lines(context)]
        found.append(([(row["reward"], row.get("advantage")) for row in kept], told))
    assert found[0] == found[1]


def test_a_text_is_continued_where_the_model_has_no_chat_template(
    model_folder: Path, asked: Path, new_context: Callable[[str], Context], tmp_path: Path
) -> None:
    import shutil

    base, context = shutil.copytree(model_folder, tmp_path / "base"), new_context("text")
    (base / "chat_template.jinja").unlink()
    grpo.run(config(base, asked, trainer={"max_steps": 1}), context)
    kept = lines(context, "completions.jsonl")
    assert kept[0]["prompt"].startswith("How many are")
    assert isinstance(kept[0]["completion"], str)


def test_tokens_that_were_not_sampled_are_a_fault(
    model_folder: Path, asked: Path, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl import GRPOTrainer

    generate = GRPOTrainer._generate

    def without_end(self: Any, given: Any) -> Any:
        found = list(generate(self, given))
        found[1] = [ids[:-1] for ids in found[1]]
        found[4] = [values[:-1] for values in found[4]]
        return tuple(found)

    def other_prompt(self: Any, given: Any) -> Any:
        found = list(generate(self, given))
        found[0] = [[*ids, 7] for ids in found[0]]
        return tuple(found)

    for fault, told in (
        (without_end, "a completion that was not sampled: 11 tokens"),
        (other_prompt, "not in the data"),
    ):
        monkeypatch.setattr(GRPOTrainer, "_generate", fault)
        with pytest.raises(Fault, match=told):
            grpo.run(config(model_folder, asked), context)


def test_loss_on_a_prompt_or_on_padding_is_a_fault(
    model_folder: Path, asked: Path, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between sampling and loss TRL shuffles and splits: what the loss is given is looked at as well."""
    import trl.trainer.grpo_trainer as library

    split = library.split_tensor_dict

    def swapped(batch: dict[str, Any], count: int) -> list[dict[str, Any]]:
        return split(batch | {"completion_ids": batch["completion_ids"].roll(1, 0)}, count)

    monkeypatch.setattr(library, "split_tensor_dict", swapped)
    with pytest.raises(Fault, match=r"not sampled|not in the data"):
        grpo.run(config(model_folder, asked), context)


def test_other_log_probabilities_than_the_trainers_are_a_fault(
    model_folder: Path, asked: Path, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = Transformers.sample

    def other(self: Any, *given: Any) -> list[Sampled]:
        return [Sampled(one.ids, [value - 0.02 for value in one.logprobs]) for one in sample(self, *given)]

    monkeypatch.setattr(Transformers, "sample", other)
    with pytest.raises(Fault, match=r"max_logprob_mismatch: .* differ by 0\.02 nats on average \(max .*; limit 0\.01"):
        grpo.run(config(model_folder, asked), context)
    grpo.run(config(model_folder, asked, max_logprob_mismatch=0.03, trainer={"max_steps": 1}), context)
    (row,) = lines(context)
    assert row["logprob_mismatch/mean"] == pytest.approx(0.02, abs=1e-4)
    # r - 1 - log r, of r = exp(0.02)
    assert row["logprob_mismatch/kl"] == pytest.approx(0.02**2 / 2 + 0.02**3 / 6, rel=1e-2)


def test_a_limit_that_is_given_holds_beside_top_p_too(model_folder: Path, asked: Path, context: Context) -> None:
    keys = config(model_folder, asked, max_logprob_mismatch=1e-4, trainer={"top_p": 0.5})
    with pytest.raises(Fault, match=r"limit 0\.0001; .*top_p draw from another distribution"):
        grpo.run(keys, context)
    assert "measured and not bounded" not in notes(context)


def test_a_completion_that_goes_on_behind_its_end_is_a_fault(
    model_folder: Path, asked: Path, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "_cut", lambda ids, logprobs, _stops: Sampled(ids, logprobs))
    keys = config(model_folder, asked, trainer={"temperature": 3.0, "max_completion_length": 200, "max_steps": 2})
    with pytest.raises(Fault, match="goes on behind its end token"):
        grpo.run(keys, context)


@pytest.mark.parametrize(
    "trainer",
    [
        {"loss_type": "grpo", "epsilon_high": 0.28, "beta": 0.04},
        {"loss_type": "dr_grpo", "scale_rewards": "none"},
        {"loss_type": "dapo", "mask_truncated_completions": True, "top_p": 0.9},
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
        {"loss_type": "bnpo", "temperature": 0.7, "repetition_penalty": 1.1},
        {"loss_type": "cispo", "epsilon_high": 5.0},
    ],
)
def test_trls_options_reach_it(model_folder: Path, asked: Path, context: Context, trainer: dict[str, Any]) -> None:
    keys = config(model_folder, asked, trainer={"max_steps": 2, **trainer})
    grpo.run(keys, context)
    rows = lines(context)
    assert len(rows) == 2
    assert ("kl" in rows[0]) == ("beta" in trainer)
    said = notes(context)
    assert ("measured and not bounded" in said) == bool({"top_p", "repetition_penalty"} & set(trainer))
    assert ("per_device_train_batch_size" in said) == (trainer["loss_type"] == "bnpo")
    if "top_p" not in trainer and "repetition_penalty" not in trainer:
        assert rows[-1]["logprob_mismatch/max"] < 1e-4  # at other temperatures too
    if trainer.get("mask_truncated_completions"):
        assert rows[0]["completions/clipped_ratio"] > 0


def test_the_result_does_not_depend_on_how_a_step_is_cut(
    model_folder: Path, asked: Path, new_context: Callable[[str], Context]
) -> None:
    found = []
    for size in (8, 2):
        context = new_context(f"cut{size}")
        grpo.run(config(model_folder, asked, per_device_train_batch_size=size, trainer={"max_steps": 3}), context)
        found.append(context)
    one, other = (lines(context, "completions.jsonl") for context in found)
    assert [row["completion"] for row in one] == [row["completion"] for row in other]
    residuals = []
    for a, b in zip(*(lines(context) for context in found), strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        assert a["entropy"] == pytest.approx(b["entropy"], rel=1e-5)
        residuals.append(a["grad_norm"] - b["grad_norm"])
    assert abs(sum(residuals)) / 3 < 1e-4


def test_what_a_recipe_can_not_ask_for_is_one_line(model_folder: Path, asked: Path, context: Context) -> None:
    def refused(told: str, run: Callable[[Any, Context], Any] = grpo.run, **changes: Any) -> None:
        with pytest.raises(UserError, match=told):
            run((rloo_config if run is rloo.run else config)(model_folder, asked, **changes), context)

    refused("6 completions are no multiple of num_generations=4", global_batch_size=6, per_device_train_batch_size=2)
    refused("12 completions are no multiple of global_batch_size", trainer={"generation_batch_size": 12})
    refused("a prompt is not shortened", overlong="cut")
    refused("earlier_answers: is for chats", earlier_answers="skip")
    refused("compile: completions have other lengths", compile="on")
    refused("rewards: nothing says what a completion is worth", rewards=[])
    refused("rewards: nothing says what a completion is worth", run=rloo.run, rewards=[])
    refused("vllm_mode: is for vLLM", vllm_mode="server")
    refused("500 tokens leave no place for a prompt|a prompt of more than 12 tokens",
            trainer={"max_completion_length": 500})  # fmt: skip
    refused("512 tokens leave no place for a prompt", trainer={"max_completion_length": 512})
    refused("12 of 12 rows .*a prompt of more than 5 tokens", max_prompt_length=5)
    refused("lora.lora_dropout: every dropout is switched off", lora={"r": 4, "lora_dropout": 0.1})
    refused("lora.bias", lora={"r": 4, "bias": "all"}, trainer={"beta": 0.1})
    refused("the reference would be the model without", lora=None, added_tokens=["<x>"], trainer={"beta": 0.1})
    refused("rewards: broken: rollout_samples:broken raises ValueError: no network",
            rewards=[{"function": "rollout_samples:broken"}])  # fmt: skip


def test_too_long_prompts_may_be_left_out(model_folder: Path, asked: Path, context: Context) -> None:
    with asked.open("a") as file:
        file.write(json.dumps({"prompt": "Why? " * 100}) + "\n")
    keys = config(model_folder, asked, max_prompt_length=60, overlong="drop", trainer={"max_steps": 1})
    assert grpo.run(keys, context)["rows_left_out"] == 1


def test_an_adapter_that_is_trained_on_starts_at_its_reference(
    model_folder: Path, asked: Path, new_context: Callable[[str], Context]
) -> None:
    first, second = new_context("first"), new_context("second")
    grpo.run(config(model_folder, asked), first)
    grpo.run(config(first.out, asked, lora=None, trainer={"beta": 0.1}), second)
    rows = lines(second)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows[-1]["kl"] > 0


def test_a_reference_that_the_model_does_not_start_at_is_a_fault(
    model_folder: Path, asked: Path, context: Context
) -> None:
    keys = config(model_folder, asked, lora={"r": 4, "init_lora_weights": False}, trainer={"beta": 0.1})
    with pytest.raises(Fault, match="does not start as its reference"):
        grpo.run(keys, context)


def test_the_seed_decides_what_is_sampled(
    model_folder: Path, asked: Path, new_context: Callable[[str], Context]
) -> None:
    found = []
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        context = new_context(name)
        keys = config(model_folder, asked, trainer={"max_steps": 1, "shuffle_dataset": False})
        torch.manual_seed(len(found))
        grpo.run(keys, Context(context.out, seed, context.events))
        found.append([row["completion"] for row in lines(context, "completions.jsonl")])
    assert found[0] == found[1] != found[2]

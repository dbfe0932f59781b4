"""The parts of online RL by themselves: seeds, draws, weights for vLLM, order, ratios, signs of a collapse, keys."""

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from rollout_samples import config, prompts, rloo_config

from cordee.cost import Cost
from cordee.errors import Fault, UserError
from cordee.seeds import seed_of
from posttrain import grpo, rloo
from posttrain.rollouts import collapse, mismatch, weights
from posttrain.rollouts.order import PromptOrder
from posttrain.rollouts.sampling import CompletionSeeds, require_ended
from posttrain.rollouts.settings import ROLLOUT_OWNED
from posttrain.training.order import Order
from posttrain.training.sampling import Sampled, SamplingSettings, SeededSampling


def test_seeds_are_told_apart_by_every_part_of_their_key() -> None:
    keys = [
        (3, step, group, sample, turn) for step in (0, 1) for group in (0, 1) for sample in range(3) for turn in (0, 1)
    ]
    assert len({seed_of(*key) for key in keys}) == len(keys)
    assert all(0 <= seed_of(*key) < 2**63 for key in keys)


def test_a_later_turn_is_told_which_completion_it_belongs_to() -> None:
    """Two completions of one prompt that have said the same are taken in their order."""
    draws = CompletionSeeds([(1, 0), (1, 1), (1, 2)])
    asked = [[5, 6], [5, 6], [7]]
    places, first = draws.seeds(asked)
    draws.end(places, asked, [Sampled([9], [0.0]), Sampled([9], [0.0]), Sampled([8], [0.0])])
    places, second = draws.seeds([[5, 6, 9, 1, 2], [7, 8, 1]])
    assert places == [0, 2]
    assert second == [seed_of(1, 0, 1), seed_of(1, 2, 1)]
    assert first == [seed_of(1, 0, 0), seed_of(1, 1, 0), seed_of(1, 2, 0)]
    draws.end(places, [[5, 6, 9, 1, 2], [7, 8, 1]], [Sampled([3], [0.0]), Sampled([3], [0.0])])
    assert draws.seeds([[5, 6, 9, 4]])[0] == [1]
    with pytest.raises(Fault, match="no completion of its batch"):
        draws.seeds([[1, 2, 3]])


def test_a_completion_ends_where_it_should() -> None:
    require_ended([Sampled([4, 2], [0.0, 0.0]), Sampled([4, 4, 4], [0.0] * 3)], [2], 3)
    for wrong in (Sampled([2, 4], [0.0, 0.0]), Sampled([4] * 4, [0.0] * 4), Sampled([4], []), Sampled([], [])):
        with pytest.raises(Fault):
            require_ended([wrong], [2], 3)


def draw(
    how: SamplingSettings, scores: torch.Tensor, seeds: list[int], ids: torch.Tensor | None = None
) -> tuple[Any, Any]:
    ids = torch.zeros(len(scores), 1, dtype=torch.long) if ids is None else ids
    drawing = SeededSampling(how, seeds, ids.shape[1], torch.ones_like(ids))
    noisy = drawing(ids, scores)
    return noisy.argmax(-1), drawing.logprobs[0]


def test_tokens_are_drawn_by_their_probabilities() -> None:
    """6000 draws of five tokens: Pearson's statistic is below the 99.9 % quantile of chi squared with 4 degrees."""
    scores = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0])
    count = 6000
    tokens, logprobs = draw(SamplingSettings(0.7, 1), scores.repeat(count, 1), [seed_of(1, at) for at in range(count)])
    expected = (scores / 0.7).softmax(-1)
    seen = torch.bincount(tokens, minlength=5)
    assert float(((seen - count * expected) ** 2 / (count * expected)).sum()) < 18.5
    assert torch.allclose(logprobs, expected.log()[tokens], atol=1e-6)


def test_a_row_is_drawn_alike_whatever_is_beside_it() -> None:
    torch.manual_seed(0)
    scores, seeds = torch.randn(6, 50), list(range(10, 16))
    together, _ = draw(SamplingSettings(1.0, 1), scores, seeds)
    alone = [int(draw(SamplingSettings(1.0, 1), scores[at : at + 1], seeds[at : at + 1])[0]) for at in range(6)]
    assert together.tolist() == alone
    greedy, _ = draw(SamplingSettings(0.0, 1), scores, seeds)
    assert greedy.tolist() == scores.argmax(-1).tolist()


@pytest.mark.parametrize("key", ["top_k", "top_p", "min_p", "repetition_penalty"])
def test_what_reshapes_the_distribution_is_as_transformers_has_it(key: str) -> None:
    import transformers

    torch.manual_seed(1)
    scores, ids = torch.randn(4, 30), torch.tensor([[1, 2, 3]] * 4)
    value: Any = {"top_k": 5, "top_p": 0.6, "min_p": 0.2, "repetition_penalty": 1.5}[key]
    process = {
        "top_k": transformers.TopKLogitsWarper, "top_p": transformers.TopPLogitsWarper,
        "min_p": transformers.MinPLogitsWarper, "repetition_penalty": transformers.RepetitionPenaltyLogitsProcessor,
    }[key](value)  # fmt: skip
    wanted = process(ids, scores.clone()).log_softmax(-1)
    for seed in range(20):
        tokens, logprobs = draw(
            SamplingSettings(1.0, 1, **{key: value}), scores.clone(), [seed * 4 + at for at in range(4)], ids
        )
        assert torch.allclose(logprobs, wanted.gather(-1, tokens[:, None])[:, 0], atol=1e-5)
        assert torch.isfinite(logprobs).all()


def test_a_penalty_does_not_see_the_padding() -> None:
    ids = torch.tensor([[0, 0, 3]])
    drawing = SeededSampling(SamplingSettings(0.0, 1, repetition_penalty=2.0), [1], 3, torch.tensor([[0, 0, 1]]))
    found = drawing(ids, torch.tensor([[4.0, 1.0, 1.0, 3.0]]))
    assert found.tolist() == [[4.0, 1.0, 1.0, 1.5]]


def test_prompts_come_in_whole_rollouts_as_trls_sampler_has_them() -> None:
    from trl.trainer.utils import RepeatSampler

    order = Order(6, 6, seed=0, is_shuffled=False)
    mine = list(PromptOrder(order, prompts=2, completions=3, repeats=4))
    assert mine == list(RepeatSampler(range(6), 3, batch_size=2, repeat_count=4, shuffle=False))
    longer = PromptOrder(Order(5, 8, seed=0, is_shuffled=True), prompts=4, completions=2, repeats=1)
    asked = list(longer)[::2]
    assert len(longer) == 16
    assert sorted(asked[:5]) == list(range(5))  # TRL would never ask the fifth


def test_the_ratio_is_that_of_truncated_importance_sampling() -> None:
    """Two tokens that differ by ln 3 and -ln 2, and one that is masked; cut at 2 from above and 0.75 from below."""
    own = torch.tensor([[0.0, 0.0, 0.0]])
    sampled = torch.tensor([[-math.log(3), math.log(2), 5.0]])
    mask = torch.tensor([[1, 1, 0]])
    by = {mode: mismatch.importance_ratio(own, sampled, mask, mode, (0.75, 2.0)).tolist()[0]
          for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")}  # fmt: skip
    assert by["token_truncate"] == pytest.approx([2.0, 0.75, 1.0])
    assert by["token_mask"] == pytest.approx([0.0, 0.0, 1.0])
    assert by["sequence_truncate"] == pytest.approx([1.5])  # 3 / 2
    assert by["sequence_mask"] == pytest.approx([1.5])
    assert mismatch.importance_ratio(own, sampled, mask, "token_mask", (None, None)).tolist()[0] == pytest.approx(
        [3.0, 0.5, 1.0]
    )


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_the_ratio_of_the_loss_is_the_one_that_trl_computes_beforehand(
    model_folder: Path, context: Any, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain.rollouts import trainer as own
    from posttrain.rollouts.with_transformers import Transformers

    sample = Transformers.sample

    def other(self: Any, *given: Any) -> list[Sampled]:
        """As a sampler that rounds."""
        return [
            Sampled(one.ids, [value + 0.1 * math.sin(at + one.ids[0]) for at, value in enumerate(one.logprobs)])
            for one in sample(self, *given)
        ]

    monkeypatch.setattr(Transformers, "sample", other)
    given = {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": 1.05,
             "vllm_importance_sampling_clip_min": 0.9}  # fmt: skip
    keys = config(model_folder, prompts(tmp_path / "p.jsonl"), trainer=given, max_logprob_mismatch=1.0)
    trainer, data = grpo.build(keys, context)
    data.order(trainer, keys, context)
    trainer.use_vllm = True
    rows = [trainer.train_dataset[at // 4] for at in range(8)]
    losses = []
    for defers in (True, False):
        if not defers:
            monkeypatch.setattr(own.Rollouts, "_scored", lambda self, inputs, **_: (
                setattr(self, "_defers", False), super(own.Rollouts, self)._generate_and_score_completions(inputs)
            )[1])  # fmt: skip
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 2
        batch = trainer._generate_and_score_completions(rows)
        assert ("importance_sampling_ratio" in batch) != defers
        losses.append(trainer.compute_loss(trainer.model, batch).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert abs(losses[0]) > 1e-4


def lora(model_folder: Path, **settings: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    from cordee.compute.model import open_model

    torch.manual_seed(2)
    given = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False, **settings}
    return get_peft_model(open_model(model_folder, dtype=torch.float32), LoraConfig(**given, task_type="CAUSAL_LM"))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": {"embed_tokens": [3, 5]}},
        {"bias": "all"},
    ],
)
def test_what_vllm_is_given_of_an_adapter_is_what_peft_merges(model_folder: Path, settings: dict[str, Any]) -> None:
    model = lora(model_folder, **settings)
    for name, weight in model.named_parameters():
        if "modules_to_save" in name or "trainable_tokens_delta" in name:
            weight.data.add_(1.0)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    weights.require_addable(model)
    whole = dict(weights.named(model, changed_only=False))
    changed = dict(weights.named(model, changed_only=True))
    assert all(weight.equal(before[name]) for name, weight in model.named_parameters())
    merged = model.merge_and_unload()
    wanted = dict(merged.state_dict())
    assert whole.keys() == wanted.keys()
    for name, tensor in whole.items():
        assert torch.allclose(tensor, wanted[name], atol=1e-6), name
    plain = dict(weights.named(lora_base(model_folder), changed_only=False))
    moved = {name for name in whole if not whole[name].equal(plain[name])}
    assert moved <= changed.keys() < whole.keys()


def lora_base(model_folder: Path) -> Any:
    from cordee.compute.model import open_model

    return open_model(model_folder, dtype=torch.float32)


def test_an_adapter_that_vllm_can_not_be_given_is_refused(model_folder: Path) -> None:
    with pytest.raises(UserError, match=r"more than two matrices.*engine: transformers"):
        weights.require_addable(lora(model_folder, use_dora=True))


def row(step: int, **changes: float) -> dict[str, float]:
    told = {"entropy": 2.0, "completions/mean_length": 50.0, "completions/clipped_ratio": 0.1, "reward": 0.5}
    return {"step": step, "frac_reward_zero_std": 0.1, **told, **changes}


def test_a_run_that_collapses_is_said() -> None:
    def run(**ends: float) -> set[str]:
        """From the usual values to these, in 20 steps."""
        usual = row(0)
        steps = [
            row(at, **{name: usual[name] + (end - usual[name]) * at / 20 for name, end in ends.items()})
            for at in range(1, 21)
        ]
        return set(collapse.signs(steps))

    assert run() == set()
    assert run(entropy=0.01) == {"entropy"}
    assert run(**{"completions/mean_length": 2.0}) == {"length"}
    assert run(**{"completions/mean_length": 400.0}) == {"length"}
    assert run(**{"completions/clipped_ratio": 1.0}) == {"cut"}
    assert run(frac_reward_zero_std=1.0) == {"equal"}
    assert collapse.signs([row(at, entropy=0.0) for at in range(3)]) == {}
    short = [row(1, frac_reward_zero_std=1.0, **{"completions/clipped_ratio": 1.0})]
    assert set(collapse.signs(short)) == {"equal", "cut"}
    assert collapse.signs([]) == {}


def test_a_reward_that_rises_in_training_alone_is_said() -> None:
    steps = [row(at, reward=0.3 + 0.02 * at + 0.01 * (at % 2)) for at in range(1, 21)]
    for after, wanted in ((0.30, {"gain"}), (0.29, {"gain"}), (0.45, set())):
        held = [{"step": 0, "heldout_reward": 0.3}, {"step": 20, "heldout_reward": after}]
        assert set(collapse.signs([held[0], *steps, held[1]])) == wanted
    assert collapse.signs(steps) == {}  # nothing is held out
    noisy = [row(at, reward=0.3 + 0.2 * (-1) ** at) for at in range(1, 21)]
    assert collapse.signs([held[0], *noisy, held[0]]) == {}


@pytest.mark.parametrize(("stage", "name"), [(grpo, "GRPOConfig"), (rloo, "RLOOConfig")])
def test_every_field_of_trls_config_is_handed_through_or_named(stage: Any, name: str) -> None:
    import trl
    from transformers import TrainingArguments

    kind = getattr(trl, name)
    known = {one.name: one.default for one in dataclasses.fields(kind)}
    for field, value in stage.Config.defaults.items():
        assert known[field] == value
    both = {one.name for one in dataclasses.fields(trl.GRPOConfig)} | {
        one.name for one in dataclasses.fields(trl.RLOOConfig)
    }
    assert set(ROLLOUT_OWNED) <= both | {"eos_token", "pad_token", "chat_template_path"}
    handed = set(known) - set(ROLLOUT_OWNED) - {one.name for one in dataclasses.fields(TrainingArguments)}
    assert handed <= {
        # what TRL computes with, once it has the completions
        *("beta", "epsilon", "epsilon_high", "delta", "loss_type", "importance_sampling_level", "num_iterations"),
        *("scale_rewards", "multi_objective_aggregation", "mask_truncated_completions", "off_policy_mask_threshold"),
        *("use_bias_correction_kl", "top_entropy_quantile", "entropy_coef", "use_adaptive_entropy"),
        *("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"),
        *("sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg"),
        *("vespo_lambda_neg", "normalize_advantages", "reward_clip_range", "router_aux_loss_coef"),
        *("vllm_importance_sampling_correction", "vllm_importance_sampling_mode"),
        *("vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min"),
        *("cast_lm_head_to_fp32", "disable_dropout", "pad_to_multiple_of", "model_init_kwargs"),
        "max_tool_calling_iterations",
        # what is read here
        *("num_generations", "num_generations_eval", "max_completion_length", "generation_batch_size"),
        *("shuffle_dataset", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
        *("vllm_gpu_memory_utilization", "vllm_max_model_length"),
    }  # fmt: skip


def test_the_cost_counts_all_completions(model_folder: Path, tmp_path: Path) -> None:
    asked = prompts(tmp_path / "prompts.jsonl")
    given = {"model": Cost(parameters=1e6, vocab_size=400), "data.0.path": Cost(rows=100, tokens=2000.0)}
    missing = tmp_path / "missing.jsonl"
    trainer = {"max_steps": -1, "num_train_epochs": 2}
    found = grpo.cost(config(model_folder, missing, trainer=trainer), given)
    assert found.tokens == 100 * 2 * 4 * (20 + 12)
    steps = grpo.cost(config(model_folder, missing), given)
    assert steps.tokens == 6 * 8 * (20 + 12)
    referred = rloo.cost(rloo_config(model_folder, missing), given)
    assert referred.flops > steps.flops  # RLOO has a reference unless told
    assert grpo.cost(config(model_folder, asked), {}).tokens > 0


def test_log_probabilities_that_are_not_finite_are_a_fault() -> None:
    from accelerate import Accelerator

    own, mask = torch.tensor([[-1.0, math.nan]]), torch.ones(1, 2)
    bound = mismatch.Mismatch(None, "")
    with pytest.raises(Fault, match="log-probabilities of sampled tokens are not finite"):
        bound.add(own, torch.zeros(1, 2), mask, Accelerator())


def test_what_is_compared_are_tokens_with_loss() -> None:
    from posttrain.rollouts import audit

    batch = {
        "prompt_ids": torch.tensor([[0, 5, 6]]), "prompt_mask": torch.tensor([[0, 1, 1]]),
        "completion_ids": torch.tensor([[7, 8, 9, 0]]), "completion_mask": torch.tensor([[1, 1, 1, 0]]),
        "tool_mask": torch.tensor([[1, 0, 1, 1]]),
    }  # fmt: skip
    assert list(audit.rows(batch)) == [((5, 6), (7, 9))]
    audit.require(batch, audit.expected([[5, 6]], [[7, 9]], [False]))
    with pytest.raises(Fault, match="2 tokens carry loss, and of the most similar one 3"):
        audit.require(batch, audit.expected([[5, 6]], [[7, 8, 9]], [False]))
    with pytest.raises(Fault, match="a prompt of 2 tokens that is not in the data"):
        audit.require(batch, Counter())


def rollout(rows: int = 8) -> dict[str, Any]:
    """Prompts of 1 to 4 tokens, padded on the left, and completions of 1 to 6, padded on the right."""
    torch.manual_seed(4)
    asked, said = torch.randint(1, 5, (rows,)), torch.randint(1, 7, (rows,))
    prompt_mask = (torch.arange(6)[None] >= 6 - asked[:, None]).long()
    completion_mask = (torch.arange(9)[None] < said[:, None]).long()
    return {
        "prompt_ids": torch.randint(10, 99, (rows, 6)) * prompt_mask, "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(10, 99, (rows, 9)) * completion_mask, "completion_mask": completion_mask,
        "advantages": torch.randn(rows), "num_items_in_batch": completion_mask.sum(),
        "sampling_per_token_logps": torch.randn(rows, 9) * completion_mask, "ref_per_token_logps": None,
    }  # fmt: skip


@pytest.mark.parametrize("sorts", [True, False])
def test_micro_batches_have_the_rows_of_their_step_and_less_padding(sorts: bool) -> None:
    from trl.trainer.utils import split_tensor_dict

    from posttrain.rollouts import audit, batching

    given = split_tensor_dict(rollout(), 4)
    found = batching.regrouped(given, 2, sorts=sorts)

    def rows(batches: list[Any]) -> Counter[Any]:
        return Counter(
            (row, float(advantage), tuple(values[: len(row[1])].tolist()))
            for batch in batches
            for row, advantage, values in zip(
                audit.rows(batch), batch["advantages"], batch["sampling_per_token_logps"], strict=True
            )
        )

    assert len(found) == 4
    for start in (0, 2):
        assert rows(found[start : start + 2]) == rows(given[start : start + 2])
        if not sorts:
            assert rows(found[start : start + 1]) == rows(given[start : start + 1])
    for batch in found:
        lengths = batch["prompt_mask"].sum(-1).max(), batch["completion_mask"].sum(-1).max()
        assert (batch["prompt_ids"].shape[1], batch["completion_ids"].shape[1]) == lengths
        assert batch["sampling_per_token_logps"].shape == batch["completion_ids"].shape
        assert batch["ref_per_token_logps"] is None
    places = [int((batch["prompt_mask"].sum(-1) + batch["completion_mask"].sum(-1)).min()) for batch in found[:2]]
    assert not sorts or places[0] >= places[1]
    masked = {**given[0], "completion_mask": torch.zeros_like(given[0]["completion_mask"])}
    assert batching.cut(masked)["completion_ids"].shape[1] == 1

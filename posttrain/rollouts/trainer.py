"""Around TRL's trainers for online RL: what samples, from which seeds, what is checked and what is kept.

TRL computes prompts' rewards, advantages and the loss. The classes here take the place of its generation.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import Trainer
from trl import GRPOTrainer, RLOOTrainer

from cordee.chat.templates import Template
from cordee.errors import Fault
from cordee.stage import Context
from posttrain.rewards.opening import Rewards
from posttrain.rollouts import audit, batching, keeping
from posttrain.rollouts.mismatch import Mismatch, importance_ratio
from posttrain.rollouts.sampling import CompletionSeeds, Sampler, asked_of, require_ended
from posttrain.training.sampling import Sampled
from posttrain.training.settings import CHECKED_BATCHES

OWN = ("prompt_ids",)
"""Columns of the data set that are no columns of the data, and that no reward is given."""
ADAPTIVE = ("entropy_coef", "_last_world_entropy")
"""What TRL's GRPO changes at each step where `use_adaptive_entropy` is on."""


class Rollouts(Trainer):
    """What both trainers share. `begin` has to be called before they are used."""

    context: Context
    sampler: Sampler
    rewards: Rewards
    mismatch: Mismatch
    stops: Sequence[int]
    seed: int
    sorts: bool
    """Whether a step's completions are sorted by length."""
    _buffered_inputs: list[dict[str, Any]]

    def begin(
        self,
        sampler: Sampler,
        mismatch: Mismatch,
        stops: Sequence[int],
        context: Context,
        *,
        corrects: bool,
        sorts: bool,
    ) -> None:
        """Set what samples.

        Args:
            sampler: samples completions.
            mismatch: measures its log-probabilities against the trainer's.
            stops: the ids that end a completion.
            context: the seed, and where completions are kept.
            corrects: whether TRL's importance sampling is used, as what samples is not the model itself.
            sorts: whether a step's completions may be sorted by length.
        """
        self.sorts = sorts
        self.sampler, self.mismatch, self.stops, self.context = sampler, mismatch, list(stops), context
        self.seed, self.eos_token_ids, self.use_vllm = context.seed, list(stops), corrects
        self.vllm_mode = "server"  # TRL then takes the model's positions for the limit of tool calls
        self.heldout_keys: list[tuple[int, ...]] = []
        self.rewards_of = torch.zeros(0)
        """`[completions of all processes, rewards]`: those of the last rollout; NaN where one does not apply."""
        self._known: Counter[audit.Row] = Counter()
        self._checked, self._synced = 0, -1
        self._reading: dict[str, Any] | None = None
        self._last: Mapping[str, Any] = {}

    @property
    def rollout_micro_steps(self) -> int:
        """Micro-batches that are trained on before it samples again."""
        return int(self.args.steps_per_generation * self.num_iterations)

    @property
    def is_on_policy(self) -> bool:
        """Whether the weights are still those that sampled the micro-batch which is at work."""
        return bool(self._step % self.rollout_micro_steps < self.args.gradient_accumulation_steps)

    # --- sampling

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of completions with their advantages, as TRL makes it of what is sampled here."""
        is_training, step = self.model.training, self.state.global_step
        self._inputs, keys = inputs, self.heldout_keys
        if is_training:
            first = self.accelerator.process_index * len(inputs)
            places = [divmod(first + at, self.num_generations) for at in range(len(inputs))]
            keys = [(self.seed, step, *place) for place in places]
        self._seeds = CompletionSeeds(keys)
        self._sampled: list[list[int]] = [[] for _ in inputs]
        self._logprobs: list[list[float]] = [[] for _ in inputs]
        output = self._scored(inputs, is_training=is_training)
        ends = [*self.stops, self.processing_class.pad_token_id]
        masks = self.args.mask_truncated_completions
        is_masked = [masks and cut for cut in audit.truncated(self._sampled, ends)]
        known = audit.expected(self._asked, self._sampled, is_masked)
        audit.require(output, known)
        self._known = known if is_training else self._known
        if output.get("sampling_per_token_logps") is None:
            output["sampling_per_token_logps"] = _padded(self._logprobs, output["completion_ids"])
        count = len(inputs) * (self.accelerator.num_processes if is_training else 1)
        rows = keeping.rows(self, count, step + is_training, is_heldout=not is_training)
        self.context.keep(*rows)
        return output

    def _scored(self, inputs: list[dict[str, Any]], *, is_training: bool) -> dict[str, Any]:
        """What TRL makes of a batch.

        On-policy, TRL's correction would cost a forward pass of its own to learn the log-probabilities that the loss
        computes anyway: there it is computed from these.
        """
        corrects = getattr(self, "vllm_importance_sampling_correction", False)
        window = self.args.gradient_accumulation_steps
        self._defers = not is_training or window % self.rollout_micro_steps == 0
        if self._defers:
            self.vllm_importance_sampling_correction = False
        try:
            output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        finally:
            self.vllm_importance_sampling_correction = corrects
        return output

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """The prompts as `cordee.chat` has rendered them; with tools, as TRL renders them, which is compared."""
        if not getattr(self, "tools", None):
            self._asked = [list(row["prompt_ids"]) for row in self._inputs]
            return self._asked, None, {}
        self._asked = [list(ids) for ids in super()._tokenize_prompts(prompts)[0]]
        if self.chat_template is None:  # else TRL renders in a template of its own, which keeps what was said before
            template = Template(self.processing_class)
            for prompt, ids, tools in zip(prompts, self._asked, self._tools_of(len(prompts)), strict=True):
                text = template.text(prompt, {"tools": tools}, add_generation_prompt=True)
                if list(template.encode([text])["input_ids"][0]) != ids:
                    raise Fault("TRL renders a prompt with tools in other tokens than the chat template")
        return self._asked, None, {}

    def _tools_of(self, count: int) -> list[Any]:
        """The tools that each prompt is rendered with."""
        if self.environment_factories is None:
            return [self.tools] * count
        return [self._env_tools[name] for name in self._batch_environments]

    def _sample(self, prompts: list[list[int]]) -> tuple[list[list[int]], list[list[float]]]:
        """The tokens that follow each prompt, or each turn, and their log-probabilities."""
        began = time.perf_counter()
        if self._synced != self.state.global_step:
            self.sampler.sync()
            self._synced = self.state.global_step
        synced = time.perf_counter()
        how = asked_of(self.args, greedy=not self.model.training and self.args.num_generations_eval is None)
        places, seeds = self._seeds.seeds(prompts)
        found = self.sampler.sample(prompts, seeds, how)
        require_ended(found, self.stops, how.max_tokens)
        for at, (place, prompt, one) in enumerate(zip(places, prompts, found, strict=True)):
            left = how.max_tokens - (len(prompt) - len(self._asked[place]))  # a later turn has less than a whole one
            found[at] = Sampled(one.ids[:left], one.logprobs[:left])
            self._sampled[place] += found[at].ids
            self._logprobs[place] += found[at].logprobs
        self._seeds.end(places, prompts, found)
        if self.model.training:
            self._metrics["train"]["sync_time"].append(synced - began)
            self._metrics["train"]["rollout_time"].append(time.perf_counter() - synced)
        return [one.ids for one in found], [one.logprobs for one in found]

    def _calculate_rewards(self, inputs: list[dict[str, Any]], *rest: Any) -> torch.Tensor:
        """The rewards `[completions of all processes, rewards]`, of the data's own columns."""
        rows = [{name: value for name, value in row.items() if name not in OWN} for row in inputs]
        self.rewards_of = super()._calculate_rewards(rows, *rest)
        # TRL gives a completion the sum 0 where a reward that is only measured applies, and no other does
        decides = self.reward_weights.to(self.rewards_of.device) != 0
        none_applies = self.rewards_of[:, decides].isnan().all(dim=1, keepdim=True)
        return self.rewards_of.masked_fill(none_applies, torch.nan)

    # --- the loss

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """The next micro-batch; what is sampled anew is cut into micro-batches with less padding than TRL's."""
        before = self._buffered_inputs
        inputs: dict[str, Any] = super()._prepare_inputs(generation_batch)
        if not self.model.training or self._buffered_inputs is before:
            return inputs
        window = self.args.gradient_accumulation_steps
        self._buffered_inputs = batching.regrouped(self._buffered_inputs, window, sorts=self.sorts)
        prepared: dict[str, Any] = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return prepared

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """TRL's loss, of a batch that holds what was sampled."""
        if self._checked < CHECKED_BATCHES:
            audit.require(inputs, self._known)
            self._checked += 1
        if self._step % self.args.gradient_accumulation_steps == 0:
            self.mismatch.clear()
        self._last = self._reading = inputs
        loss: torch.Tensor = super()._compute_loss(model, inputs)
        return loss

    def _get_per_token_logps_and_entropies(self, *given: Any, **named: Any) -> Any:
        """TRL's log-probabilities; those that a loss is computed from are compared with the sampler's."""
        found = super()._get_per_token_logps_and_entropies(*given, **named)
        inputs, self._reading = self._reading, None
        if inputs is None or not self.is_on_policy:
            return found
        own, mask = found[0].detach().float(), audit.sampled_tokens(inputs)
        sampled = inputs["sampling_per_token_logps"]
        figures = self.mismatch.add(own, sampled, mask, self.accelerator)
        self._metrics["train"].update({name: [value] for name, value in figures.items()})
        if self.use_vllm and self._defers and getattr(self, "vllm_importance_sampling_correction", False):
            bounds = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
            inputs["importance_sampling_ratio"] = importance_ratio(
                own, sampled, mask, self.vllm_importance_sampling_mode, bounds
            )
        return found

    def counts(self, _batch: Any) -> dict[str, torch.Tensor]:
        """What the last micro-batch holds: `tokens` without padding, and its `completions`."""
        prompts, said = self._last["prompt_mask"], self._last["completion_mask"]
        return {"tokens": prompts.sum() + said.sum(), "completions": said.new_tensor(len(said))}

    def weights(self, _batch: Any) -> dict[str, torch.Tensor]:
        """What the figures of the last micro-batch are means over."""
        tokens = audit.sampled_tokens(self._last).sum()
        names = ("entropy", "kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")
        measured = self._metrics["train"]
        return {"loss": tokens} | {name: tokens for name in names if len(measured.get(name, ())) and self._is_own(name)}

    def _is_own(self, name: str) -> bool:
        """Whether each micro-batch adds a figure that is a mean over its tokens."""
        by_token = getattr(self, "importance_sampling_level", "sequence") == "token"
        return name == "entropy" or (isinstance(self, GRPOTrainer) and (name == "kl" or by_token))

    # --- resume points

    def extra_state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """What it needs beside the model to go on: numbers, and the completions that are still to be trained on."""
        numbers = {name: getattr(self, name) for name in ADAPTIVE if getattr(self, "use_adaptive_entropy", False)}
        if not self._step % self.rollout_micro_steps:
            return numbers, {}
        batches = enumerate(self._buffered_inputs)
        return numbers, {
            f"{at}/{name}": value for at, batch in batches for name, value in batch.items() if value is not None
        }

    def load_extra_state(self, numbers: Mapping[str, Any], completions: Mapping[str, torch.Tensor]) -> None:
        """Take what `extra_state` returned: in the middle of a rollout, its completions."""
        for name, value in numbers.items():
            setattr(self, name, value)
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        if not self._step % self.rollout_micro_steps:
            return
        batches: list[dict[str, Any]] = [{} for _ in range(self.args.steps_per_generation)]
        for key, value in completions.items():
            at, _, name = key.partition("/")
            batches[int(at)][name] = value.to(self.accelerator.device)
        self._buffered_inputs = batches
        self._known = Counter(row for batch in batches for row in audit.rows(batch))


class GrpoTrainer(Rollouts, GRPOTrainer):
    """TRL's trainer for group relative policy optimization."""

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
        return self._sample(prompt_ids)


class RlooTrainer(Rollouts, RLOOTrainer):
    """TRL's trainer for REINFORCE leave-one-out."""

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
        return self._sample(prompt_ids)[0]


def _padded(values: Sequence[Sequence[float]], like: torch.Tensor) -> torch.Tensor:
    """Log-probabilities in the shape of the completions `[rows, length]`."""
    found = torch.zeros(like.shape, dtype=torch.float32)
    for row, one in enumerate(values):
        found[row, : len(one)] = torch.tensor(one)
    return found.to(like.device)

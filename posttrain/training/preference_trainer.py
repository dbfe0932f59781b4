"""The trainer of all methods that learn from given answers: pairs of them, or single ones.

A loss is a mean over the rows of a step. It does not depend on how these are cut into batches and shared by processes:
what it has to know of the whole step is measured before the step's first batch.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
import transformers
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.models import get_act_offloading_ctx_manager
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from posttrain.losses import pairs
from posttrain.training import shared_prompt
from posttrain.training.preference_rows import Collator, PreferenceRows
from posttrain.training.scores import Figures, Objective, Scores, Side, Step, mean
from posttrain.training.settings import IGNORED

Batch = dict[str, torch.Tensor]
OUTPUTS = ("log_probs", "entropy", "is_top1")


class PreferenceTrainer(transformers.Trainer):
    """transformers' trainer with a preference loss."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: Any,
        objective: Objective,
        train_dataset: PreferenceRows,
        processing_class: PreTrainedTokenizerBase,
        eval_dataset: PreferenceRows | None = None,
        peft_config: Any = None,
    ) -> None:
        """A trainer of a model, or of a new adapter on it.

        Args:
            model: what is trained.
            args: TRL's settings of the method.
            objective: the method.
            train_dataset: the rows.
            processing_class: the tokenizer.
            eval_dataset: rows that are held out.
            peft_config: the settings of a new adapter.

        Raises:
            ValueError: a setting can't be honoured.
        """
        transformers.set_seed(args.seed)  # a new adapter's weights are drawn
        model.config.get_text_config().pad_token_id = processing_class.pad_token_id
        if model.generation_config is not None:
            model.generation_config.pad_token_id = processing_class.pad_token_id
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
        if isinstance(model, PeftModel):
            _prepare_adapter(model, args)
        self.objective = objective
        collator = Collator(processing_class.pad_token_id, getattr(args, "pad_to_multiple_of", None), objective)
        super().__init__(
            model=model, args=args, data_collator=collator, train_dataset=train_dataset, eval_dataset=eval_dataset,
            processing_class=processing_class,
        )  # fmt: skip
        if args.n_gpu > 1:
            raise ValueError("several GPUs need a process each: `launch: {num_processes: …}`, or one visible GPU")
        # the loss is a mean over the batch's rows, which `Trainer` then divides by the batches of a step
        self.model_accepts_loss_kwargs = False
        if args.disable_dropout:
            disable_dropout_in_model(model)
        self._offload = contextlib.nullcontext()
        if getattr(args, "activation_offloading", False):
            self._offload = get_act_offloading_ctx_manager(model=model)
        self._set_auxiliary_loss(args)
        more = ("log_sum_sq_probs",) if objective.weighs_certainty else ()
        add_fused_lm_head(model.get_base_model() if isinstance(model, PeftModel) else model, outputs=OUTPUTS + more)
        self._metrics: dict[str, defaultdict[str, list[torch.Tensor]]] = {
            "train": defaultdict(list), "eval": defaultdict(list)
        }  # fmt: skip
        """Figures of the batches since they were last told."""
        self.step: Step | None = None
        """What is known of the step in work, or of the held-out rows."""
        self.before_training: Callable[[], None] = lambda: None
        """Called once the model is where it is trained, sharded if it is, with the weights that it starts from."""

    def _set_auxiliary_loss(self, args: Any) -> None:
        """Whether the loss that balances experts is added, and its weight: the setting's, or the model's own."""
        config = self.model.config.get_text_config()
        asked = getattr(args, "router_aux_loss_coef", None)
        self.router_aux_loss_coef = getattr(config, "router_aux_loss_coef", 0.0) if asked is None else asked
        has_routers = hasattr(config, "output_router_logits")
        if asked and not has_routers:
            raise ValueError("router_aux_loss_coef is for models with experts, and this one tells nothing of any")
        self.aux_loss_enabled = has_routers and bool(self.router_aux_loss_coef)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """As `Trainer`'s, with `before_training` before the weights of a resume point are read into a sharded model."""
        if not self.is_fsdp_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self.before_training()
        if resume_from_checkpoint is not None:
            self._load_from_checkpoint(resume_from_checkpoint, self.model_wrapped)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self._load_scaler(resume_from_checkpoint)
        return prepared

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As `Trainer`'s, with activations offloaded where that is asked for."""
        with self._offload:
            return cast("torch.Tensor", super().training_step(*args, **kwargs))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The batches of the next step, of which as a whole is measured what the loss has to know."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.begin_step(batches, is_shared=True)
        return batches, items

    def begin_step(self, batches: list[Any], *, is_shared: bool) -> None:
        """Measure what the loss has to know of a whole step, and tell each batch where its rows stand in it.

        Args:
            batches: this process's; each gets a column `at`.
            is_shared: whether other processes have other batches of the same step.
        """
        count, tokens = sum(map(self._rows, batches)), []
        first = self.accelerator.process_index * count if is_shared else 0
        for batch in batches:
            rows, labels = self._rows(batch), batch["labels"]
            batch["at"] = torch.arange(first, first + rows, device=labels.device)
            tokens.append((labels[:rows, 1:] != IGNORED).sum().to(self.args.device))
            first += rows
        sides, divergences = self._measure(batches)
        totals = [torch.stack(tokens).sum(), torch.tensor(count, device=self.args.device), *divergences]
        whole = torch.stack([total.double() for total in totals])
        if is_shared:
            whole = self.accelerator.reduce(whole, "sum")
            sides = self.accelerator.gather(sides) if sides is not None else None
        means = (whole / whole[1]).float()
        kl = means[2].clamp(min=0) if divergences else None
        self.step = Step(means[0], None if sides is None else _unstacked(sides, len(self.objective.sides)), kl)

    def _measure(self, batches: list[Any]) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """What the policy says of all batches, without gradients and dropout, where the loss asks for it.

        Returns:
            The fields of all sides, `[rows, sides · fields]`, and the sum of log π - log π_ref over answers to other
            prompts; None and nothing where it does not ask.
        """
        if not (self.objective.sorts or self.objective.has_kl):
            return None, []
        found, divergences, was_training = [], [], self.model.training
        self.model.eval()
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for batch in map(self._prepare_inputs, batches):
                if self.objective.sorts:
                    sides = self.sides(self.forward(self.model, batch), batch)
                    found.append(torch.stack([value for side in sides for value in side.fields()], dim=1))
                if self.objective.has_kl:
                    others = {name[3:]: value for name, value in batch.items() if name.startswith("kl_")}
                    (answer,) = self.sides(self.forward(self.model, others), others)
                    divergences.append(answer.ratio.sum())
        self.model.train(was_training)
        return torch.cat(found) if found else None, [torch.stack(divergences).sum()] if divergences else []

    def forward(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor], *, has_auxiliary: bool = False) -> Any:
        """What TRL's fused LM head gives of the tokens with labels, `[sides · rows, seq - 1]`."""
        if "joint_input_ids" in batch:
            outputs = model(**shared_prompt.inputs(batch), use_cache=False, fused_lm_head=True)
            return shared_prompt.separate(outputs, batch)
        more = {"output_router_logits": True} if has_auxiliary else {}
        return model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"],
            use_cache=False, fused_lm_head=True, **more,
        )  # fmt: skip

    def sides(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> tuple[Side, ...]:
        """The log-probabilities of a batch's answers.

        Args:
            outputs: of `forward`, `[answers, seq - 1]`.
            batch: `[answers, seq]`.

        Returns:
            One `Side` for each of the objective's sides, `[rows]`; log-probabilities in nats.
        """
        count, logprobs = len(self.objective.sides), outputs.log_probs.float()
        is_answer = batch["completion_mask"][:, 1:].bool()
        tokens = is_answer.sum(1).float()
        shared = tokens.view(count, -1).amin(0).repeat(count)
        weights = pairs.token_weights(is_answer, shared, self.objective.tail_weight)
        certainty = torch.ones_like(logprobs[:, 0])
        if self.objective.weighs_certainty:
            certainty = pairs.certainty(logprobs, outputs.log_sum_sq_probs.float(), is_answer)
        sums = (logprobs * weights).sum(1)
        fields = (sums, batch.get("reference", torch.zeros_like(sums)), tokens, -logprobs.sum(1), certainty)
        return tuple(Side(*values) for values in zip(*(field.chunk(count) for field in fields), strict=True))

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,  # noqa: ARG002 - the library's signature
        num_items_in_batch: Any = None,  # noqa: ARG002 - the library's signature
    ) -> torch.Tensor:
        """The mean loss of a batch's rows; figures are kept until they are told."""
        if "at" not in inputs:  # a batch that is no step's is one by itself
            self.begin_step([inputs], is_shared=False)
        outputs = self.forward(model, inputs, has_auxiliary=self.aux_loss_enabled)
        sides = self.sides(outputs, inputs)
        columns = {name: inputs[name] for name in self.objective.columns}
        losses, figures = self.objective.loss(Scores(sides, columns, cast("Step", self.step), inputs["at"]))
        loss = losses.mean()
        figures |= {"loss": mean(losses)} | self._token_figures(outputs, inputs)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
            figures["aux_loss"] = mean(outputs.aux_loss)
        kept = self._metrics["train" if self.model.training else "eval"]
        for name, figure in figures.items():
            kept[name].append(figure)
        return loss

    def _token_figures(self, outputs: Any, batch: Batch) -> Figures:
        is_answer = batch["completion_mask"][:, 1:].bool()
        first = slice(0, self._rows(batch))
        return {
            "entropy": mean(outputs.entropy, is_answer),
            "mean_token_accuracy": mean(outputs.is_top1[first], is_answer[first]),
        }

    def _rows(self, batch: Mapping[str, torch.Tensor]) -> int:
        return len(batch["labels"]) // len(self.objective.sides)

    def means(self, mode: str) -> dict[str, float]:
        """The figures of the batches since they were last told, over all processes in training: means."""
        kept = self._metrics[mode]
        if not kept:
            return {}
        sums = torch.stack([torch.stack(values).sum(0) for values in kept.values()])
        sums = self.accelerator.reduce(sums, "sum") if mode == "train" else sums
        found = {name: total / count for name, (total, count) in zip(kept, sums.tolist(), strict=True) if count}
        kept.clear()
        if "rewards/margins" not in found and {"rewards/chosen", "rewards/rejected"} <= found.keys():
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found

    def measure_heldout(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The means of all figures over rows that are held out, in the mode that the model is in."""
        inputs = [self._prepare_inputs(batch) for batch in batches]
        self.begin_step(inputs, is_shared=False)
        for batch in inputs:
            self.compute_loss(self.model, batch)
        return self.means("eval")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Tell the figures of a step with its loss."""
        if self.model.training:
            logs |= {name: value for name, value in self.means("train").items() if name not in logs}
        super().log(logs, start_time)


def _unstacked(values: torch.Tensor, count: int) -> tuple[Side, ...]:
    """The sides whose fields are the columns of `[rows, count · fields]`."""
    return tuple(Side(*part.unbind(1)) for part in values.chunk(count, dim=1))


def _prepare_adapter(model: PeftModel, args: Any) -> None:
    """Set up an adapter as TRL does.

    Raises:
        ValueError: it is one on the LM head, whose weights the log-probabilities are computed from directly.
    """
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise ValueError(  # noqa: TRY004 - as PEFT refuses a setting
            "an adapter on `lm_head` would not be trained: log-probabilities are computed from the head's own weights"
        )
    if args.gradient_checkpointing:
        model.enable_input_require_grads()
    base = model.get_base_model()
    if getattr(base, "is_loaded_in_4bit", False) or getattr(base, "is_loaded_in_8bit", False):
        for name, weights in model.named_parameters():
            if weights.requires_grad and "lora_magnitude_vector" not in name:  # its steps are too small for bfloat16
                weights.data = weights.data.to(torch.bfloat16)

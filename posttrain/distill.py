"""Distillation from a larger teacher of the same vocabulary: its whole next-token distributions are learnt.

    accelerate launch -m posttrain.distill --config FILE [key=value …]

Off-policy on the chats that are given, on-policy on what the student samples, or both (GKD, Agarwal et al. 2024, arXiv
2306.13649). The rest is as in posttrain.sft: the same data, packing, adapters and checks of batches.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from cordee import model_folder, worker
from cordee.config import Library, is_written
from cordee.cost import Cost
from cordee.errors import UserError
from cordee.memory import BYTES
from cordee.model_folder import ModelInput
from cordee.stage import Context
from posttrain.training import memory
from posttrain.training.cost import data_cost, training_cost
from posttrain.training.settings import SFT_OWNED, TrlConfig

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

    from cordee.chat.conversations import Conversation
    from posttrain.training.metrics import TrainingData
    from posttrain.training.sequences import Sequences

VERSION = 1
DISTILL_OWNED = {
    **SFT_OWNED,
    "loss_type": "the stage's `beta`",
    "label_smoothing_factor": "the stage's `temperature`",
    "router_aux_loss_coef": "",
    "activation_offloading": "",
}


class Config(TrlConfig):
    """Who is the teacher, and what is learnt of it."""

    trains_chats: ClassVar[bool] = True
    teacher: ModelInput
    """The teacher, a model or an adapter of the student's vocabulary: frozen, in the dtype that it is stored in."""
    beta: float = Field(default=0.5, ge=0, le=1)
    """Which divergence is minimised: 0 is forward KL(teacher‖student), 1 reverse KL(student‖teacher), what lies between
    the generalized Jensen-Shannon divergence."""
    temperature: float = Field(default=1.0, gt=0)
    """What the logits of both are divided by in the divergence; above 0."""
    cross_entropy: float = Field(default=0.0, ge=0, lt=1)
    """The weight w of the cross-entropy with the data's tokens: the loss is (1 - w) · divergence + w · cross-entropy;
    0 to below 1."""
    on_policy: float = Field(default=0.0, ge=0, le=1)
    """The share of the steps, drawn by the seed, in which the student's own completions stand in the place of each
    row's last answer (λ of GKD); 0 to 1."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Tokens of the longest completion that the student samples; at least 1."""
    sampling_temperature: float = Field(default=1.0, gt=0)
    """What the student's logits are divided by when it samples; above 0."""
    across_vocabularies: bool = False
    """Whether the teacher may have another vocabulary: the probabilities of both are compared in falling order, where
    tokens of both end at the same byte (ULD, arXiv 2402.12030). Both tokenizers have to be byte-level."""
    trainer: Annotated[dict[str, Any], Library("trl.SFTConfig", owned=DISTILL_OWNED)] = Field(default_factory=dict)
    """Any field of TRL's SFTConfig that the stage doesn't set itself (`learning_rate`, `packing`, `max_length`, …)."""

    @model_validator(mode="after")
    def _can_be_asked(self) -> Self:
        if self.on_policy and self.trainer.get("packing"):
            hint = "leave it out: prompts of several chats in a row can't be completed"
            raise UserError("is for data that are given, not for on_policy", key="trainer.packing", hint=hint)
        refused = {"on_policy": self.on_policy > 0, "trainer.packing": bool(self.trainer.get("packing"))}
        if self.across_vocabularies and (named := [key for key, is_asked in refused.items() if is_asked]):
            problem = "is not for a teacher of another vocabulary (`across_vocabularies`)"
            raise UserError(problem, key=named[0], hint="leave it out")
        fields = type(self).model_fields
        for name in ("max_new_tokens", "sampling_temperature"):
            if not self.on_policy and getattr(self, name) != fields[name].default:
                raise UserError("is for on_policy above 0", key=name, hint="leave it out")
        if self.across_vocabularies and (self.beta != fields["beta"].default or is_written(self, "beta")):
            problem = "is of distributions over one vocabulary, and not for `across_vocabularies`"
            raise UserError(problem, key="beta", hint="leave it out")
        return self


def cost(config: Config, given: Mapping[str, Cost]) -> Cost:
    """As posttrain.sft, with whole logits, the teacher's weights and its forward pass; sampling is not counted."""
    found = training_cost(config, given, data_cost(config, given, "chats").tokens, logit_bytes=logit_bytes(config))
    found = memory.with_frozen(found, model_folder.stored_bytes(config.teacher, "teacher", given))
    teacher = model_folder.cost(config.teacher, "teacher", given)
    if found.flops is None or teacher.parameters is None:
        return found
    return replace(found, flops=found.flops + 2.0 * teacher.parameters * (found.tokens or 0.0))


def logit_bytes(config: Config) -> float:
    """Bytes for each token with loss and each entry of the vocabulary at the peak of a step, as torch counts them.

    The logits of student and teacher; in float32 their log-probabilities, what the divergence keeps of these, and
    gradients.
    """
    kept = {0.0: 20, 1.0: 24}.get(config.beta, 41)
    if config.cross_entropy and config.beta in (0, 1):  # else it is over before the peak
        kept += 4
    return float(kept + 2 * BYTES[config.computes_in])


def build(config: Config, context: Context) -> "tuple[Trainer, TrainingData]":
    """The trainer, whose batches are checked, and what it reads.

    Raises:
        UserError: the data, the model, the teacher or a key is wrong.
        Fault: a model is damaged, or the trainer's batches or the student's prompts are not those of the chats.
    """
    from trl import SFTConfig

    from cordee.chat.tokenized import Tokenized
    from cordee.compute.model import sequence_limits
    from posttrain.training import distill_trainer, reading, sampling, skeleton, start, vocabularies
    from posttrain.training.masks import counts
    from posttrain.training.metrics import TrainingData
    from posttrain.training.sft_trainer import PackedRows, check_batches

    arguments = skeleton.arguments(SFTConfig, config, context)
    if not arguments.max_length:
        raise UserError("must be a number of tokens", key="trainer.max_length")
    model, tokenizer = skeleton.open_model(config)
    across = config.across_vocabularies
    teacher = distill_trainer.open_teacher(config.teacher, start.find(config).tokenizer, across=across)
    length = arguments.max_length
    chats, heldout = reading.read(config, "chats", model, tokenizer, length, context, Tokenized.conversation)
    settings = distill_trainer.DistillSettings(
        config.beta, config.temperature, config.cross_entropy, config.on_policy, config.max_new_tokens,
        config.sampling_temperature, tuple(sampling.stops(config.model, tokenizer)), context.seed,
    )  # fmt: skip
    distill_trainer.require_prompts(chats, settings, sequence_limits(model, None).positions)
    data, apart = _datasets(config, context, (chats, heldout), tokenizer, teacher, arguments)
    trainer = skeleton.open_trainer(
        distill_trainer.DistillTrainer, config, model, arguments, train_dataset=data,
        eval_dataset=apart, processing_class=tokenizer, teacher=teacher, distill_settings=settings,
    )  # fmt: skip
    if arguments.packing and "flash" not in model.config._attn_implementation:  # noqa: SLF001 - there is no public name
        trainer.data_collator = PackedRows(tokenizer.pad_token_id, config.per_device_train_batch_size, length)
    if config.across_vocabularies:
        trainer.data_collator = vocabularies.WithTeacher(trainer.data_collator, pad=0)
    check_batches(trainer, chats)
    distill_trainer.check_prompts(trainer, chats)
    tokens = int(chats.lengths("ids").sum())
    context.note(
        f"{len(chats)} chats, {tokens} tokens; {config.on_policy:.0%} of the steps on the student's own answers"
    )
    found = TrainingData(
        counts,
        distill_trainer.weights,
        rows=len(chats),
        tokens=tokens,
        sequence_length=length,
        digest=chats.digest,
        teacher_parameters=sum(weights.numel() for weights in teacher.parameters()),
        varying_shapes=not isinstance(trainer.data_collator, PackedRows),
        metrics={"packed_rows": len(trainer.train_dataset)},
    )
    return trainer, found


def _datasets(
    config: Config,
    context: Context,
    found: "tuple[Sequences[Conversation], Sequences[Conversation]]",
    tokenizer: "PreTrainedTokenizerBase",
    teacher: "PreTrainedModel",
    settings: Any,
) -> "tuple[Dataset, Dataset | None]":
    """The rows to train on and those that are held out, as the trainer takes them."""
    from cordee.compute.tokenizer import open_tokenizer
    from posttrain.training import sequences, vocabularies

    rows = []
    apart = config.heldout if isinstance(config.heldout, list) else config.data
    for some, sources in zip(found, (config.data, apart), strict=True):
        if not len(some):
            continue
        if not config.across_vocabularies:
            rows.append(sequences.dataset(some, settings.max_length, packing=settings.packing))
            continue
        theirs = open_tokenizer(model_folder.tokenizer_of(config.teacher))
        teaching = vocabularies.Teaching.of(config, sources, tokenizer, theirs, teacher, context)
        rows.append(vocabularies.dataset(some, teaching))
    return rows[0], rows[1] if len(rows) > 1 else None


def run(config: Config, context: Context) -> dict[str, Any]:
    """Check, train or go on training, and write the model or the adapter; returns the manifest's metrics."""
    from posttrain.training.skeleton import fit

    return fit(build, config, context)


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()

"""Both answers to a prompt in one sequence, so that the prompt is computed once: Wang and Hegde 2024, arXiv 2410.20305.

A sequence is the prompt without its last token, and then for each answer that last token and the answer: so the token
that an answer's first one is predicted from has a place of its own before each. Positions go on from the prompt, and no
answer sees another.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from trl.trainer.utils import FusedCausalLMOutput

from cordee.stage import Context
from posttrain.training.settings import IGNORED

if TYPE_CHECKING:
    from posttrain.training.preference_rows import PreferenceRows
    from posttrain.training.preference_trainer import PreferenceTrainer

TOLERANCE = 1e-3
"""Nats by which a token's log-probability may differ from that of separate sequences, in float32; in another dtype, by
the rounding of the largest one."""
PADDING = 127
"""The segment of tokens that are padding; that of the prompt is 0, those of the answers are 1, 2, …"""


def joined(
    answers: Sequence[Sequence[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]]],
    labels: torch.Tensor,
    pad_token_id: int,
    multiple_of: int | None,
) -> dict[str, torch.Tensor]:
    """Rows with one sequence each.

    Args:
        answers: `[sides][rows]`: prompt and answer.
        labels: `[sides · rows, seq]`: of separate sequences (-100: none).
        pad_token_id: fills the rows up.
        multiple_of: they are padded to a multiple of it.

    Returns:
        `joint_input_ids`, `joint_position_ids`, `joint_segments` and `joint_labels`, `[rows, joint_seq]`, and
        `joint_at`, `[sides · rows, seq - 1]`: the column of a joint output, `[rows, joint_seq - 1]`, where that of the
        separate sequence stands.
    """
    sides, rows = len(answers), len(answers[0])
    longest = max(_length([side[row] for side in answers]) for row in range(rows))
    longest += -longest % (multiple_of or 1)
    shape = rows, longest
    ids, positions = torch.full(shape, pad_token_id), torch.zeros(shape, dtype=torch.long)
    segments = torch.full(shape, PADDING, dtype=torch.int8)
    at = torch.zeros(labels.shape[0], labels.shape[1] - 1, dtype=torch.long)
    for row in range(rows):
        prompt = answers[0][row][0]
        head, lead = prompt[:-1], prompt[-1:]
        begin = len(head)
        ids[row, :begin], positions[row, :begin], segments[row, :begin] = torch.tensor(head), torch.arange(begin), 0
        for side in range(sides):
            tokens = np.concatenate([lead, answers[side][row][1]])
            end = begin + len(tokens)
            ids[row, begin:end], segments[row, begin:end] = torch.tensor(tokens), side + 1
            positions[row, begin:end] = torch.arange(len(head), len(head) + len(tokens))
            places = torch.cat([torch.arange(len(head)), torch.arange(begin, end)])
            at[side * rows + row, : len(places) - 1] = places[1:] - 1
            begin = end
    joint_labels, has_label = torch.full(shape, IGNORED), labels[:, 1:] != IGNORED
    joint_labels[_rows_of(at, rows).expand_as(at)[has_label], at[has_label] + 1] = labels[:, 1:][has_label]
    return {
        "joint_input_ids": ids, "joint_position_ids": positions, "joint_segments": segments,
        "joint_labels": joint_labels, "joint_at": at,
    }  # fmt: skip


def _length(row: Sequence[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]]) -> int:
    prompt = row[0][0]
    return len(prompt[:-1]) + sum(len(prompt[-1:]) + len(answer) for _, answer in row)


def _rows_of(at: torch.Tensor, rows: int) -> torch.Tensor:
    """`[sides · rows, 1]`: the joint row of each separate one."""
    return torch.arange(rows, device=at.device).repeat(len(at) // rows)[:, None]


def inputs(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's inputs of joint rows; the mask, `[rows, 1, joint_seq, joint_seq]`, is True where a token sees."""
    segments = batch["joint_segments"]
    seen, seeing = segments[:, None, :], segments[:, :, None]
    return {
        "input_ids": batch["joint_input_ids"],
        "position_ids": batch["joint_position_ids"],
        "attention_mask": ((seen == 0) | (seen == seeing)).tril()[:, None],
        "labels": batch["joint_labels"],
    }


def separate(outputs: Any, batch: Mapping[str, torch.Tensor]) -> FusedCausalLMOutput:
    """The outputs of joint rows as those of separate sequences, `[sides · rows, seq - 1]`; 0 where no label is."""
    at, has_label = batch["joint_at"], batch["labels"][:, 1:] != IGNORED
    of_row = _rows_of(at, len(batch["joint_input_ids"]))
    fields = ("log_probs", "entropy", "log_sum_sq_probs", "is_top1")
    found = {name: value for name in fields if (value := getattr(outputs, name)) is not None}
    return FusedCausalLMOutput(**{name: value[of_row, at] * has_label for name, value in found.items()})


def is_same(batch: Mapping[str, torch.Tensor]) -> bool:
    """Whether each token of the separate sequences stands in the joint ones, at its position, in its own segment."""
    rows, is_token = len(batch["joint_input_ids"]), batch["attention_mask"][:, 1:].bool()
    at, separate_ids = batch["joint_at"], batch["input_ids"][:, 1:]
    place = _rows_of(at, rows), at + 1
    side = (torch.arange(len(at)) // rows)[:, None] + 1
    is_prompt = ~batch["completion_mask"][:, 1:].bool()
    segments = batch["joint_segments"][place]
    has_place = (batch["joint_input_ids"][place] == separate_ids) & (
        batch["joint_position_ids"][place] == torch.arange(1, at.shape[1] + 1)
    )
    return bool((has_place & ((segments == side) | (is_prompt & (segments == 0))))[is_token].all())


def use_where_exact(trainer: "PreferenceTrainer", rows: "PreferenceRows", context: Context) -> None:
    """Have prompts computed once where that gives the same log-probabilities, and note it.

    A model's attention has to take a mask of its own for each row. Whether it then does what it should is seen on the
    longest row: a model with a window, or with a state that runs along the sequence, gives others. All processes have
    to call it, before the first batch is made: a sharded model runs in all of them.

    Args:
        trainer: its model is on the trainer's device; its collator may come to join sides.
        rows: the training's.
        context: is told.
    """
    if len(rows.objective.sides) == 1:
        return
    # of the main process: another may round otherwise
    why = broadcast_object_list([_why_not(trainer, rows)])[0]
    trainer.data_collator.joins = not why
    context.note(f"a pair's prompt is computed {f'for each answer: {why}' if why else 'once for both answers'}")


def _why_not(trainer: "PreferenceTrainer", rows: "PreferenceRows") -> str:
    """Why the two answers of a row are computed separately; nothing where they need not be."""
    model = trainer.model.get_base_model() if isinstance(trainer.model, PeftModel) else trainer.model
    if trainer.aux_loss_enabled:
        return "the loss that balances experts counts its tokens"
    if model.config._attn_implementation != "sdpa":  # noqa: SLF001 - there is no public name
        return f"attn_implementation is {model.config._attn_implementation}"  # noqa: SLF001
    if "position_ids" not in inspect.signature(type(model).forward).parameters:
        return "the model takes no position_ids"
    row = rows[int(rows.lengths.argmax())]
    found = []
    was_training = trainer.model.training
    trainer.model.eval()
    with torch.no_grad():
        for joins in (False, True):
            trainer.data_collator.joins = joins
            batch = trainer._prepare_inputs(trainer.data_collator([row]))  # noqa: SLF001 - as its own step does
            found.append(trainer.forward(trainer.model, batch).log_probs.float())
    trainer.model.train(was_training)
    difference = float((found[1] - found[0]).abs().max())
    allowed = max(TOLERANCE, 2 * torch.finfo(_dtype(trainer, model)).eps * float(found[0].abs().max()))
    return "" if difference <= allowed else f"together their log-probabilities are off by {difference:.3g} nats"


def _dtype(trainer: "PreferenceTrainer", model: Any) -> torch.dtype:
    """What the model computes in: a sharded one already in the precision of the training."""
    if trainer.is_fsdp_enabled and (trainer.args.bf16 or trainer.args.fp16):
        return torch.bfloat16 if trainer.args.bf16 else torch.float16
    dtype: torch.dtype = model.dtype
    return dtype

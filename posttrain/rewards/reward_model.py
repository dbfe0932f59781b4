"""Reward models: a language model with a head of one number, read at the end of a chat with its answer.

They are `AutoModelForSequenceClassification` of transformers with one label. An architecture for which transformers has
no such class is given one here, built of transformers' own parts; it opens in a process that has imported this module
and opened a language model of the kind, or by `open_reward_model`.
"""

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GenericForSequenceClassification

from cordee import files, model_folder
from cordee.chat import completions
from cordee.chat.problems import BadRowError
from cordee.chat.schema import OPTIONS, Record
from cordee.chat.source import Limits
from cordee.chat.templates import Template
from cordee.compute import device
from cordee.compute import model as compute
from cordee.compute.tokenizer import copy_tokenizer, open_tokenizer
from cordee.errors import UserError
from posttrain.rewards.texts import text_of

KIND = "ForSequenceClassification"
"""What the names of reward models' classes end with."""


def is_reward_model(folder: Path) -> bool:
    """Whether a model folder says that it holds a model with a classification head."""
    if model_folder.is_adapter(folder) or not (folder / "config.json").is_file():
        return False
    named = files.read_json(folder / "config.json").get("architectures") or [""]
    return str(named[0]).endswith(KIND)


def open_reward_model(folder: Path, *, dtype: torch.dtype | None = None, key: str | None = None) -> PreTrainedModel:
    """The reward model in a folder, on the CPU, in `dtype` (None: the one it is stored in).

    Raises:
        UserError: the folder is no reward model.
        Fault: it is damaged.
    """
    require(folder, key)
    return compute.open_model(folder, dtype=dtype, key=key, kind=AutoModelForSequenceClassification)


def require(folder: Path, key: str | None = None) -> None:
    """See that a folder is a reward model's, which transformers opens from now on.

    Raises:
        UserError: it is something else.
        Fault: its config is damaged.
    """
    if model_folder.is_adapter(folder):
        raise UserError("is an adapter: a reward model is whole", file=folder, key=key)
    model_folder.require(folder, key)
    if not is_reward_model(folder):
        hint = "posttrain.reward makes a reward model of one; as a `judge` it rates answers in words"
        raise UserError("is a language model without a head that gives a reward", file=folder, key=key, hint=hint)
    config = compute.open_config(folder)
    if config.num_labels != 1:
        raise UserError(f"gives {config.num_labels} numbers, and a reward is one", file=folder, key=key)
    _know(config, folder, key)


def of_language_model(causal: PreTrainedModel, folder: Path, seed: int) -> PreTrainedModel:
    """A reward model of a language model that is open: its own layers, and a head that the seed draws.

    Args:
        causal: the language model, whose layers the reward model takes over.
        folder: where it comes from, for errors.
        seed: draws the head.

    Raises:
        UserError: transformers has no class that it fits in.
    """
    config = copy.deepcopy(causal.config)
    config.num_labels = 1
    kind = _know(config, folder, "model")
    with torch.device("meta"):
        model = kind(config)
    backbone = causal.base_model
    if type(getattr(model, model.base_model_prefix, None)) is not type(backbone):
        raise UserError(f"{kind.__name__} has other layers than {type(causal).__name__}", file=folder, key="model")
    setattr(model, model.base_model_prefix, backbone)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            if any(weights.is_meta for weights in module.parameters(recurse=False)):
                module.to_empty(device="cpu", recurse=False)
                model._init_weights(module)  # noqa: SLF001 - as from_pretrained draws it
                module.to(causal.dtype)
    return model


def _know(config: PretrainedConfig, folder: Path, key: str | None) -> Any:
    """The class of reward models of an architecture, which transformers opens from now on.

    Raises:
        UserError: there is none, and none can be made.
    """
    known = AutoModelForSequenceClassification._model_mapping  # noqa: SLF001 - there is no public one
    with contextlib.suppress(KeyError):
        return known[type(config)]
    try:
        causal = AutoModelForCausalLM._model_mapping[type(config)]  # noqa: SLF001
        parent = next(one for one in causal.__mro__[1:] if one.__name__.endswith("PreTrainedModel"))
        base: Any = type(
            causal.__name__.replace("ForCausalLM", KIND),
            (GenericForSequenceClassification, parent),
            {"__module__": __name__, "base_model_prefix": causal.base_model_prefix},
        )
    except (KeyError, StopIteration, TypeError) as error:
        problem = f"transformers has no {KIND.removeprefix('For')} of {config.model_type}"
        raise UserError(problem, file=folder, key=key) from error
    known._extra_content[type(config)] = base  # noqa: SLF001 - `register` leaves out configs of transformers' own
    return base


def save(
    model: PreTrainedModel, folder: Path, *, base: Path, tokenizer: Path,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:  # fmt: skip
    """Write a reward model's folder, and see that it opens; `config.json` comes last.

    Args:
        model: the reward model.
        folder: where to.
        base: the folder of the language model that it was made of.
        tokenizer: the folder whose tokenizer's files are copied.
        state_dict: in place of the model's own weights, where they were gathered from shards.
    """
    with files.replaced(folder, last="config.json") as beside:
        model.save_pretrained(beside, state_dict=state_dict)
        compute.restore_config(beside / "config.json", files.read_json(base / "config.json"))
        copy_tokenizer(tokenizer, beside)
        open_reward_model(beside)


def rewards(model: PreTrainedModel, sequences: Sequence[Sequence[int]], *, batch_size: int = 16) -> list[float]:
    """The reward of each sequence of token ids; those of about the same length are read together.

    The model is used as it is: put it in evaluation mode and on its device first.
    """
    where, found = next(model.parameters()).device, [0.0] * len(sequences)
    pad = model.config.get_text_config().pad_token_id
    size = 1 if pad is None else batch_size
    order = sorted(range(len(sequences)), key=lambda at: -len(sequences[at]))
    for start in range(0, len(order), size):
        places = order[start : start + size]
        longest = len(sequences[places[0]])
        rows = [[*sequences[at]] + [pad] * (longest - len(sequences[at])) for at in places]
        mask = [[1] * len(sequences[at]) + [0] * (longest - len(sequences[at])) for at in places]
        with torch.no_grad():
            logits = model(
                input_ids=torch.tensor(rows, device=where), attention_mask=torch.tensor(mask, device=where),
                use_cache=False,
            ).logits  # [batch, 1]  # fmt: skip
        for at, value in zip(places, logits[:, 0].tolist(), strict=True):
            found[at] = value
    return found


@dataclass
class Scorer:
    """A reward model that scores chats."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: Template | None
    limits: Limits
    batch_size: int

    @classmethod
    def open(cls, folder: Path, dtype: str, max_length: int | None, batch_size: int) -> "Scorer":
        """Open the reward model in a folder; errors as for `open_reward_model`."""
        asked = None if dtype == "auto" else getattr(torch, dtype)
        model = open_reward_model(folder, dtype=asked, key="rewards: model").eval().to(device.default())
        tokenizer = open_tokenizer(folder)
        template = Template(tokenizer) if tokenizer.chat_template else None
        return cls(model, tokenizer, template, compute.sequence_limits(model, max_length), batch_size)

    def measure(
        self, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]
    ) -> list[dict[str, float | None]]:
        """The reward of each completion, an empty one too.

        Raises:
            UserError: a chat can't be rendered, or is too long.
        """
        options = [{name: columns[name][at] for name in OPTIONS if name in columns} for at in range(len(prompts))]
        sequences = []
        for prompt, completion, own in zip(prompts, completions, options, strict=True):
            try:
                sequences.append(self._encoded(prompt, completion, own))
            except BadRowError as error:
                told = f"{error.problem} ({error.shown_by})" if error.shown_by else error.problem
                raise UserError(told, key="rewards: model", hint=error.hint) from error
        return [{"reward": value} for value in rewards(self.model, sequences, batch_size=self.batch_size)]

    def _encoded(self, prompt: Any, completion: Any, options: dict[str, Any]) -> list[int]:
        given = {name: value for name, value in options.items() if value}
        if isinstance(prompt, str) and isinstance(completion, str):
            ids = self._of_text(prompt, completion)
        elif self.template is None:
            raise BadRowError("is a chat, and the reward model has no chat template")
        else:
            said = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
            messages = [*prompt, *said]
            if text_of(said).strip():
                before, after = completions.of_chat(Record(Path(), 1, {"messages": messages, **given}), self.template)
                ids = [*before, *after]
            else:  # no training takes it, but a policy may give it
                (ids,) = self.template.encode([self.template.text(messages, given)])["input_ids"]
        self.limits.check(ids)
        return ids

    def _of_text(self, prompt: str, completion: str) -> list[int]:
        if completion.strip():
            before, after = completions.of_text(prompt, completion, self.tokenizer)
            return [*before, *after]
        end = self.tokenizer.eos_token_id
        return [*self.tokenizer(prompt)["input_ids"], *([] if end is None else [end])]

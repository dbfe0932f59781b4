"""Answers to prompts of token ids by transformers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

from cordee import model_folder
from cordee.compute.adapter import stop_token_ids
from cordee.compute.tokenizer import open_tokenizer


@dataclass(frozen=True)
class Generated:
    """What followed a prompt."""

    text: str
    """Without special tokens and without the text that ended it."""
    tokens: int
    """All that were generated, the one that ended it among them."""
    finish_reason: str
    """As vLLM has it: `stop`, or `length` where the largest number of tokens cut it off."""
    special: int = 0
    """Special tokens that the text lacks, those that ended it aside."""


def generate(
    model: PreTrainedModel, folder: Path, prompts: Sequence[Sequence[int]], seeds: Sequence[int], max_tokens: int,
    sampling: Mapping[str, Any], batch_size: int,
) -> list[Generated]:  # fmt: skip
    """Continue each prompt of token ids with a folder's model, by the seed at its place.

    Greedy answers are generated `batch_size` at once. Otherwise, and with a penalty or `stop_strings`, which would see
    the padding, they are generated one by one: an answer must not depend on the others.

    Args:
        model: the folder's, open.
        folder: of the model or the adapter.
        prompts: token ids `[seq]` of each.
        seeds: of each.
        max_tokens: tokens of the longest answer.
        sampling: fields of transformers' GenerationConfig. `stop_strings` are sought in the answer alone.
        batch_size: prompts at once.
    """
    tokenizer, stops = open_tokenizer(model_folder.tokenizer_of(folder)), stop_token_ids(folder)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    # Nothing of the model's own generation config, such as a repetition penalty: vLLM is given none of it either.
    model.generation_config = GenerationConfig()
    chosen = {**sampling, "max_new_tokens": max_tokens, "eos_token_id": stops, "pad_token_id": pad}
    texts = chosen.pop("stop_strings")
    is_alone = chosen["do_sample"] or chosen["repetition_penalty"] != 1 or texts
    at_once = 1 if is_alone else batch_size
    found = []
    for start in range(0, len(prompts), at_once):
        torch.manual_seed(seeds[start])
        batch = [list(ids) for ids in prompts[start : start + at_once]]
        longest = max(map(len, batch))
        padded = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in batch])
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in batch])

        def is_ended(ids: torch.Tensor, _scores: Any, *, of: int = longest, **_: Any) -> torch.Tensor:
            ended = [_cut(_decoded(tokenizer, row[of:].tolist()), texts) is not None for row in ids]
            return torch.tensor(ended, device=ids.device)

        with torch.no_grad():
            output = model.generate(
                input_ids=padded.to(model.device), attention_mask=mask.to(model.device), **chosen,
                stopping_criteria=StoppingCriteriaList([is_ended] if texts else []),
            )  # fmt: skip
        found += [_generated(tokenizer, row, stops, texts) for row in output[:, longest:].tolist()]
    return found


def _generated(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stops: Sequence[int], texts: Sequence[str]
) -> Generated:
    """What a row of generated ids is; what follows its end token is padding."""
    end = next((at for at, token in enumerate(ids, 1) if token in stops), None)
    text = _decoded(tokenizer, ids[:end])
    cut = _cut(text, texts)
    is_ended = end is not None or cut is not None
    reason = "stop" if is_ended else "length"
    return Generated(text if cut is None else cut, end or len(ids), reason, special(tokenizer, ids[:end], stops))


def special(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stops: Sequence[int]) -> int:
    """How many special tokens are among generated ids, those that end a generation aside."""
    left_out = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sum(number in left_out and number not in stops for number in ids)


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _cut(text: str, ends: Sequence[str]) -> str | None:
    """A text up to the first of the texts that end it; None if it holds none of them."""
    places = [place for end in ends if (place := text.find(end)) >= 0]
    return text[: min(places)] if places else None

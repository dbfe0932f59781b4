"""Log-probabilities of given tokens: one way to compute them for every gate, proof and metric."""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedModel

MERGE_LIMIT = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 1e-1}
"""How far a merged model may be from base and adapter, in nats, by its weights' dtype."""
MERGE_MEASURE = {"float32": "max", "float16": "mean", "bfloat16": "mean"}
"""Which difference that is: float32 only sums in another order; rounding moves single improbable tokens by nats."""
LOGITS_AT_ONCE = 1 << 28
"""The largest number of logits that are held at a time: 1 GiB in float32."""


@dataclass(frozen=True)
class Scores:
    """What a model says of one sequence; entry `t` is about token `t + 1`, given the tokens up to `t`."""

    logprobs: torch.Tensor
    """`[seq - 1]`, float32, in nats, on the CPU."""
    top1: torch.Tensor
    """`[seq - 1]`: the token that the model holds most likely, on the CPU."""


@dataclass(frozen=True)
class Difference:
    """How far two models are apart on the same sequences."""

    largest: float
    """The largest difference of two log-probabilities of the same token, in nats; NaN if any is NaN."""
    mean: float
    """Their mean absolute difference, in nats."""
    top1: float
    """The share of tokens at which both hold the same token most likely."""

    def merged(self, dtype: str) -> float:
        """What `MERGE_LIMIT` bounds."""
        return self.largest if MERGE_MEASURE[dtype] == "max" else self.mean


def compare(one: Sequence[Scores], other: Sequence[Scores]) -> Difference:
    """Compare what two models say of the same sequences."""
    pairs = list(zip(one, other, strict=True))
    differences = torch.cat([(a.logprobs - b.logprobs).abs() for a, b in pairs])
    same = torch.cat([a.top1 == b.top1 for a, b in pairs])
    return Difference(differences.max().item(), differences.mean().item(), same.double().mean().item())


def token_logprobs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the tokens that follow: logits `[batch, seq, vocab]`, ids `[batch, seq]` → `[batch, seq-1]`.

    Computed in float32 at least, row by row, so that one copy of one row's logits is all the memory it takes.
    """
    rows = []
    for row, following in zip(logits[:, :-1], ids[:, 1:], strict=True):  # row: [seq - 1, vocab]
        wide = torch.float64 if row.dtype == torch.float64 else torch.float32
        rows.append(row.log_softmax(dim=-1, dtype=wide).gather(-1, following.unsqueeze(-1)).squeeze(-1))
    return torch.stack(rows)


def score(model: PreTrainedModel, sequences: Sequence[Sequence[int]], *, batch_size: int = 8) -> list[Scores]:
    """Score each sequence of token ids; the padding that a batch needs is masked and cut off again.

    The model is used as it is: put it in evaluation mode and on its device first.
    """
    device = next(model.parameters()).device
    scores: list[Scores] = []
    for start in range(0, len(sequences), batch_size):
        batch = [list(sequence) for sequence in sequences[start : start + batch_size]]
        longest = max(len(sequence) for sequence in batch)
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in batch], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in batch], device=device)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # [batch, seq, vocab]
            logprobs, top1 = token_logprobs(logits, ids).cpu(), logits[:, :-1].argmax(dim=-1).cpu()
        scores.extend(
            Scores(logprobs[index, : len(row) - 1], top1[index, : len(row) - 1]) for index, row in enumerate(batch)
        )
    return scores


def completion_logprobs(
    model: PreTrainedModel, sequences: Sequence[tuple[Sequence[int], int]], *, tokens_at_once: int = 8192
) -> list[torch.Tensor]:
    """The log-probability of each token of each completion, given its prompt, in nats: `[completion]`, float64.

    Sequences of about the same length are read together, and only positions of completions go through the head, where
    the model allows it. The model is used as it is: put it in evaluation mode and on its device first.

    Args:
        model: a causal language model, or an adapter on one.
        sequences: token ids `[seq]` of a prompt with its completion, and the place where the completion begins, from 1.
        tokens_at_once: tokens, padding included, that the model reads at a time; one sequence at least.
    """
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    takes_places = "logits_to_keep" in inspect.signature(causal.forward).parameters
    vocab = model.config.get_text_config().vocab_size
    device = next(model.parameters()).device
    found = [torch.empty(0)] * len(sequences)
    for batch in _batches(sequences, tokens_at_once, LOGITS_AT_ONCE // vocab):
        longest, first = len(sequences[batch[0]][0]), min(sequences[at][1] for at in batch)
        rows = [list(sequences[at][0]) for at in batch]
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
        kept = {"logits_to_keep": torch.arange(first - 1, longest, device=device)} if takes_places else {}
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **kept).logits
            if not takes_places:
                logits = logits[:, first - 1 :]
            logprobs = token_logprobs(logits, ids[:, first - 1 :]).double().cpu()  # [batch, longest - first]
        for row, at in enumerate(batch):
            found[at] = logprobs[row, sequences[at][1] - first : len(rows[row]) - first].clone()
    return found


def _batches(
    sequences: Sequence[tuple[Sequence[int], int]], tokens_at_once: int, logits_at_once: int
) -> Iterator[list[int]]:
    """Places of sequences that are read together, the longest first; of so many tokens and of so many logits' rows."""
    batch: list[int] = []
    for at in sorted(range(len(sequences)), key=lambda place: -len(sequences[place][0])):
        count, longest = len(batch) + 1, len(sequences[batch[0] if batch else at][0])
        kept = longest - min(sequences[place][1] for place in [*batch, at]) + 1
        if batch and (count * longest > tokens_at_once or count * kept > logits_at_once):
            yield batch
            batch = []
        batch.append(at)
    if batch:
        yield batch

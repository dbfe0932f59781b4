import math

import pytest
import torch

from cordee.compute.logprobs import Scores, compare, score, token_logprobs


def reference(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """By definition, in float64: log of exp(chosen) over the sum of exp, token by token."""
    wide = logits.double()
    rows = []
    for row, sequence in zip(wide, ids, strict=True):
        chances = [row[t].exp()[sequence[t + 1]] / row[t].exp().sum() for t in range(len(sequence) - 1)]
        rows.append(torch.stack(chances).log())
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-6)]
)
def test_token_logprobs_equal_the_definition_in_float64(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(3, 7, 50, generator=generator) * 4).to(dtype)
    ids = torch.randint(50, (3, 7), generator=generator)
    found = token_logprobs(logits, ids)
    assert found.shape == (3, 6)
    torch.testing.assert_close(found.double(), reference(logits, ids), atol=tolerance, rtol=0)


def test_a_uniform_model_gives_minus_the_log_of_the_vocabulary() -> None:
    found = token_logprobs(torch.zeros(1, 4, 8), torch.tensor([[0, 3, 5, 7]]))
    torch.testing.assert_close(found, torch.full((1, 3), -2.0794415))


def test_large_logits_neither_overflow_nor_lose_the_answer() -> None:
    logits = torch.full((1, 2, 3), -1e4)
    logits[0, 0] = torch.tensor([1e4, 1e4, -1e4])
    assert token_logprobs(logits, torch.tensor([[0, 1]])).item() == pytest.approx(-0.6931472, abs=1e-6)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    from transformers import ApertusConfig, ApertusForCausalLM

    torch.manual_seed(0)
    config = ApertusConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return ApertusForCausalLM(config).eval()


def test_padding_and_batching_change_no_score(model: torch.nn.Module) -> None:
    sequences = [[1, 5, 9, 30, 2], [1, 7], list(range(1, 40)), [1, 59, 58]]
    together = score(model, sequences, batch_size=4)
    alone = [score(model, [sequence], batch_size=1)[0] for sequence in sequences]
    for sequence, one, other in zip(sequences, together, alone, strict=True):
        assert one.logprobs.shape == one.top1.shape == (len(sequence) - 1,)
        torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-5, rtol=0)
        assert one.top1.equal(other.top1)


def test_scores_are_the_models_own(model: torch.nn.Module) -> None:
    ids = torch.tensor([[1, 5, 9, 30, 2]])
    logits = model.double()(input_ids=ids).logits
    found = score(model.float(), ids.tolist())[0]
    torch.testing.assert_close(found.logprobs.double(), reference(logits, ids)[0], atol=1e-5, rtol=0)
    assert found.top1.equal(logits[0, :-1].argmax(-1))


def test_two_scorings_are_compared_token_by_token() -> None:
    one = [
        Scores(torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([4, 5, 6])),
        Scores(torch.tensor([-1.0]), torch.tensor([7])),
    ]
    other = [
        Scores(torch.tensor([-1.0, -2.5, -3.0]), torch.tensor([4, 5, 0])),
        Scores(torch.tensor([-2.5]), torch.tensor([7])),
    ]
    found = compare(one, other)
    assert (found.largest, found.mean, found.top1) == (1.5, 0.5, 0.75)


def test_a_score_that_is_nan_is_no_small_difference() -> None:
    """Wherever it stands: Python's `max` would forget one that is not the first."""
    told = [Scores(torch.tensor([value]), torch.tensor([1])) for value in (-1.0, float("nan"))]
    assert math.isnan(compare([told[0], told[0]], [told[0], told[1]]).largest)

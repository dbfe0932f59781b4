"""Losses against their formulas, worked in plain numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from pretrain.data.loader import IGNORED, assemble, open_split
from pretrain.training import losses
from pretrain.training.losses import Labels
from pretrain.training.model import Objective, build
from pretrain.training.settings import Settings

MICRO = Path(__file__).parents[2] / "configs" / "models" / "apertus-micro.yaml"


def settings(**keys):
    given = {"max_steps": 9, "global_batch_size": 8, "sequence_length": 64, "learning_rate": 1e-3}
    return Settings.model_validate({**given, "precision": "float32", **keys})


def given(documents, length, nats=None):
    """One row that holds these documents, and its labels."""
    ids, positions, labels = torch.zeros(1, length, dtype=torch.int64), torch.arange(length)[None].clone(), None
    labels = torch.full((1, length), IGNORED)
    at = 0
    for document in documents:
        count = len(document)
        ids[0, at : at + count] = torch.tensor(document)
        positions[0, at : at + count] = torch.arange(count)
        labels[0, at : at + count - 1] = torch.tensor(document[1:])
        at += count
    positions[0, at:] = torch.arange(length - at)
    return Labels(torch.rand(1, length) if nats is None else nats, torch.zeros(1, length, 1), ids, positions, labels)


def kept_by_hand(document, k, h):
    """Which labels of a document count: those of all its tokens but the first, by Python's own integers."""
    prime, root = 2**31 - 1, 742_938_285
    kept = []
    for place in range(1, len(document)):  # of the label
        before = document[max(place - h, 0) : place]
        number = sum(pow(root, back, prime) * token for back, token in enumerate(reversed(before), 1)) % prime
        kept.append(len(before) < h or place == len(document) - 1 or not number < prime // k)
    return kept


def counted(row, documents):
    """For each document the labels that count, as goldfish has them."""
    at, found = 0, []
    for document in documents:
        found.append(row[at : at + len(document) - 1].tolist())
        at += len(document)
    return found


@pytest.mark.parametrize(("k", "h"), [(2, 1), (3, 4), (4, 13), (50, 50)])
def test_goldfish_leaves_out_the_labels_whose_context_hashes_low(k, h):
    rng = np.random.default_rng(h)
    documents = [rng.integers(0, 131_072, size).tolist() for size in (2, 5, h + 1, 300, 700)]
    length = sum(map(len, documents)) + 7
    labels = given(documents, length)
    loss, counts = losses.goldfish(labels, settings(loss="goldfish", goldfish_k=k, goldfish_h=h))
    assert counted(counts[0], documents) == [kept_by_hand(document, k, h) for document in documents]
    assert loss.equal(torch.where(counts, labels.nats, torch.zeros(())))
    assert not counts[labels.labels == IGNORED].any()


def test_goldfish_leaves_out_one_label_in_k():
    document = np.random.default_rng(0).integers(0, 50_000, 200_000).tolist()
    for k in (2, 4, 50):
        _, counts = losses.goldfish(given([document], 200_000), settings(loss="goldfish", goldfish_k=k, goldfish_h=9))
        assert 1 - counts.sum() / 199_999 == pytest.approx(1 / k, abs=0.004)


def test_a_passage_misses_the_same_labels_wherever_it_is_repeated():
    rng, h = np.random.default_rng(1), 6
    passage = rng.integers(0, 999, 80).tolist()
    documents = [[*rng.integers(0, 999, before).tolist(), *passage, 5] for before in (0, 3, 40)]
    chosen = settings(loss="goldfish", goldfish_k=3, goldfish_h=h)
    _, counts = losses.goldfish(given(documents, 400), chosen)
    ends = [row[-80:][h:] for row in counted(counts[0], documents)]
    assert ends[0] == ends[1] == ends[2]
    assert 10 < ends[0].count(False) < 40


def test_the_order_of_the_context_matters_and_an_id_of_zero_decides_nothing():
    rng = np.random.default_rng(2)
    chosen = settings(loss="goldfish", goldfish_k=2, goldfish_h=4)
    windows = [[*rng.integers(0, 99, 3).tolist(), 0] for _ in range(400)]
    seen = []
    for turned in (False, True):
        rows = [[*(window[::-1] if turned else window), 7, 8] for window in windows]
        counts = torch.cat([losses.goldfish(given([row], 6), chosen)[1] for row in rows])
        seen.append(counts[:, 3])
    assert 150 < seen[0].sum() < 250
    assert 150 < (seen[0] != seen[1]).sum() < 250


def test_cross_entropy_counts_every_label():
    labels = given([[1, 2, 3], [4, 5]], 8)
    loss, counts = losses.cross_entropy(labels, settings())
    assert loss is labels.nats
    assert counts[0].tolist() == [True, True, False, True, *[False] * 4]


@pytest.fixture
def batch(make_tokens):
    folder = make_tokens("tokens", [40, 13, 64, 31])
    split = open_split(folder, "train", 64, "error", "data.0.tokens")
    rows = [(split, np.array([0, 1])), (split, np.array([2])), (split, np.array([3]))]
    return folder, assemble(rows, 3, 64, 2)


def test_an_objective_gives_loss_and_plain_nats_side_by_side_and_only_the_loss_has_a_gradient(batch):
    folder, assembled = batch
    chosen = settings(loss="goldfish", goldfish_k=3, goldfish_h=2)
    model = build(MICRO, folder, 64, seed=3).double()
    loss, counts, nats = Objective(model, chosen)(*assembled.to("cpu"))
    logits = model(input_ids=assembled.input_ids, position_ids=assembled.position_ids, use_cache=False).logits
    expected = functional.cross_entropy(logits.mT, assembled.labels, ignore_index=IGNORED, reduction="none")
    assert torch.allclose(nats.double(), expected, atol=1e-5)
    assert not nats.requires_grad
    assert 0 < counts.sum() < (assembled.labels != IGNORED).sum()
    mean = loss.sum() / counts.sum()
    mean.backward()
    got = torch.cat([weights.grad.flatten() for weights in model.parameters()])
    model.zero_grad()
    (expected * counts).sum().div(counts.sum()).backward()
    assert torch.allclose(got, torch.cat([weights.grad.flatten() for weights in model.parameters()]), atol=1e-7)


def test_goldfish_compiles_in_one_graph(batch):
    folder, assembled = batch
    objective = Objective(build(MICRO, folder, 64, seed=3), settings(loss="goldfish", goldfish_h=3))
    eager = objective(*assembled.to("cpu"))
    compiled = torch.compile(objective, fullgraph=True, dynamic=False)(*assembled.to("cpu"))
    assert compiled[1].equal(eager[1])
    assert torch.allclose(compiled[0], eager[0], atol=1e-5)


def rows_of(out, key):
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in found if key in row}


def test_a_batch_is_divided_by_the_labels_that_count_however_it_is_split(trained):
    keys = {"loss": "goldfish", "goldfish_k": 3, "goldfish_h": 2, "max_steps": 1}
    whole, metrics = trained("whole", per_device_train_batch_size=8, **keys)
    parts, _ = trained("parts", per_device_train_batch_size=1, **keys)
    for name in ("loss", "grad_norm"):
        assert rows_of(parts, name)[1] == pytest.approx(rows_of(whole, name)[1], rel=1e-5)
    plain, all_of_them = trained("plain", max_steps=1)
    assert 0.6 < metrics["labels"] / all_of_them["labels"] < 0.75
    # an untrained model finds every token as unlikely as any other
    assert rows_of(whole, "loss")[1] == pytest.approx(rows_of(plain, "loss")[1], abs=0.02)

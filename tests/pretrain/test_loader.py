import numpy as np
import pytest
import torch

from cordee.errors import Fault, UserError
from pretrain.data.loader import IGNORED, Stream, _pack, assemble, open_split
from pretrain.data.mixture import PERIOD, Mixture

LENGTHS = np.random.default_rng(3).integers(3, 65, 300).tolist()


def rows_of(split, epoch_key):
    pieces, order = split.epoch(epoch_key)
    return [pieces[split.rows[row]] for row in order]


def test_every_document_stands_once_in_each_epoch_and_no_row_is_too_full(make_tokens):
    split = open_split(make_tokens("a", LENGTHS), "train", 64, "error", "data.0.tokens")
    for key in ((17, 0, 0), (17, 0, 1), None):
        rows = rows_of(split, key)
        assert sorted(np.concatenate(rows).tolist()) == list(range(len(LENGTHS)))
        assert max(split.tokens(row) for row in rows) <= 64


def test_packing_leaves_hardly_any_padding():
    lengths = np.random.default_rng(0).integers(5, 200, 2000)
    rows = _pack(-np.sort(-lengths), 256)
    assert lengths.sum() / (256 * len(rows)) > 0.99


def test_best_fit_takes_the_fullest_row_that_has_room():
    # 6 and 5 open a row each with 4 and 5 free; 4 fits the first exactly, 3 goes to the second, 2 joins it
    assert [row.tolist() for row in _pack(np.array([6, 5, 4, 3, 2]), 10)] == [[0, 2], [1, 3, 4]]


def test_the_order_is_drawn_anew_for_each_epoch_seed_and_source_and_the_same_for_the_same(make_tokens):
    split = open_split(make_tokens("a", LENGTHS), "train", 64, "error", "data.0.tokens")
    shown = [
        [row.tolist() for row in rows_of(split, key)] for key in ((1, 0, 0), (1, 0, 1), (2, 0, 0), (1, 1, 0), (1, 0, 0))
    ]
    assert shown[0] == shown[4]
    assert all(shown[0] != other for other in shown[1:4])


def test_a_row_far_ahead_is_found_without_those_before_it(make_tokens):
    split = open_split(make_tokens("a", LENGTHS), "train", 64, "error", "data.0.tokens")
    walked = Stream(split, 5, 0)
    rows = [walked.row(index).tolist() for index in range(3 * len(split.rows))]
    for index in (0, len(split.rows), 3 * len(split.rows) - 1):
        assert Stream(split, 5, 0).row(index).tolist() == rows[index]


def test_the_order_is_the_same_on_every_machine(make_tokens):
    split = open_split(make_tokens("a", [5, 9, 9, 7, 5, 5]), "train", 16, "error", "data.0.tokens")
    assert [row.tolist() for row in rows_of(split, (17, 0, 0))] == [[1, 4], [2, 3], [5, 0]]


def test_a_long_document_is_an_error_that_names_it(make_tokens):
    with pytest.raises(
        UserError, match=r"data\.0\.tokens: 1 of 2 train documents exceed sequence_length=64: document 2 has 70"
    ):
        open_split(make_tokens("a", [10, 70]), "train", 64, "error", "data.0.tokens")


@pytest.mark.parametrize("length", [2, 63, 64, 65, 127, 128, 190, 191])
def test_a_long_document_that_is_split_has_each_token_but_the_first_predicted_once(make_tokens, length):
    split = open_split(make_tokens("a", [length]), "train", 64, "split", "data.0.tokens")
    batch = assemble([(split, np.array([piece])) for piece in range(len(split.lengths))], len(split.lengths), 64, 2)
    assert batch.labels[batch.labels != IGNORED].tolist() == split.ids[1:].tolist()
    assert (split.documents == 0).all()
    assert split.lengths.max() <= 64


def test_a_batch_restarts_positions_and_predicts_nothing_across_documents(make_tokens):
    split = open_split(make_tokens("a", [3, 4]), "train", 9, "error", "data.0.tokens")
    ids = split.ids.astype(np.int64)
    batch = assemble([(split, np.array([0, 1]))], 2, 9, 2)
    assert batch.input_ids[0].tolist() == [*ids[:7], 2, 2]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1]
    assert batch.labels[0].tolist() == [ids[1], ids[2], IGNORED, ids[4], ids[5], ids[6], *[IGNORED] * 3]
    assert (batch.labels[1] == IGNORED).all()
    assert (batch.input_ids[1] == 2).all()
    assert all(tensor.dtype == torch.int64 for tensor in (batch.input_ids, batch.position_ids, batch.labels))


def test_offsets_that_do_not_fit_the_ids_are_found(make_tokens):
    folder = make_tokens("a", [5, 6])
    with (folder / "train.bin").open("ab") as file:
        file.write(b"\0\0")
    with pytest.raises(Fault, match=r"data\.0\.tokens: its offsets do not fit train\.bin"):
        open_split(folder, "train", 64, "error", "data.0.tokens")


def test_a_folder_without_tokens_is_named(tmp_path):
    with pytest.raises(UserError, match=r"data\.1\.tokens: is no tokens artifact: it has no tokens\.json"):
        open_split(tmp_path, "train", 64, "error", "data.1.tokens")


@pytest.fixture
def mixture(make_tokens):
    splits = [
        open_split(make_tokens(name, LENGTHS[:n]), "train", 64, "error", name)
        for name, n in (("a", 300), ("b", 90), ("c", 30))
    ]
    return Mixture(splits, [6, 3, 1], seed=1)


def test_a_mixture_meets_its_weights_at_every_length(mixture):
    sources = [mixture.sample(index).source for index in range(500)]
    for length in (10, 100, 500):
        shares = np.bincount(sources[:length], minlength=3) / length
        assert np.abs(shares - [0.6, 0.3, 0.1]).max() <= 1 / length
    tokens = mixture.tokens([mixture.sample(index) for index in range(500)])
    assert np.array(tokens) / sum(tokens) == pytest.approx([0.6, 0.3, 0.1], abs=0.02)


def test_a_mixture_goes_through_each_source_in_order_and_counts_its_epochs(mixture):
    count = 2 * PERIOD + 17
    alone = [Stream(split, 1, source) for source, split in enumerate(mixture.splits)]
    seen = [0, 0, 0]
    for index in range(count):
        sample = mixture.sample(index)
        if index > count - 50:
            assert sample.row.tolist() == alone[sample.source].row(seen[sample.source]).tolist()
        seen[sample.source] += 1
    assert mixture.epochs(count) == [n / len(split.rows) for n, split in zip(seen, mixture.splits, strict=True)]


def test_a_mixture_counts_the_tokens_that_carry_loss(mixture):
    samples = [mixture.sample(index) for index in range(40)]
    rows = [(mixture.splits[sample.source], sample.row) for sample in samples]
    assert mixture.labels(samples) == int((assemble(rows, 40, 64, 2).labels != IGNORED).sum())


def test_a_weight_too_small_to_be_met_is_an_error(make_tokens):
    split = open_split(make_tokens("a", LENGTHS), "train", 64, "error", "a")
    with pytest.raises(UserError, match=r"data\.1\.weight"):
        Mixture([split, split], [1.0, 1e-6], seed=0)

"""The parts of a mixture: texts, duplicates, questions of benchmarks, amounts, licences; each with a planted case."""

import numpy as np
import pytest

from cordee.chat.problems import BadRowError
from cordee.errors import UserError
from posttrain.mixing import amounts, decontamination, minhash, texts
from posttrain.mixing.decontamination import Question, Questions
from posttrain.mixing.settings import Licenses

CHAT = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Three."}]
STORY = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
    "How many clips did Natalia sell altogether in April and May?"
)


@pytest.mark.parametrize(
    ("row", "prompt", "answers"),
    [
        ({"messages": CHAT}, "How many?", ("Three.",)),
        ({"messages": CHAT[:1], "answer": "3"}, "How many?", ()),
        ({"prompt": "How many?", "answer": "3", "language": "en"}, "How many?", ("3",)),
        ({"prompt": "How many?", "completion": "Three.", "label": False}, "How many?", ("Three.",)),
        ({"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": "Four."}, "How many?", ("Three.", "Four.")),
        ({"chosen": "A: yes", "rejected": "A: no"}, "A:", (" yes", " no")),
        ({"text": "A text."}, "", ("A text.",)),
        ({"instruction": "Add", "input": "1 1", "output": "2"}, "Add\n1 1", ("2",)),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}, "Hi", ("Ho",)),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, *CHAT[1:]], "tools": None},
            "Hi",
            ("Three.",),
        ),
    ],
)
def test_a_row_of_any_shape_has_its_texts(row, prompt, answers):
    found = texts.read(row)
    assert (found.prompt, found.answers) == (prompt, answers)


def test_calls_of_tools_count_as_text():
    call = {"function": {"name": "weather", "arguments": '{"place": "Chur"}'}}
    found = texts.read({"messages": [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [call]}]})
    assert "Chur" in found.whole


@pytest.mark.parametrize("row", [{"messages": []}, {"messages": "x"}, {"question": "x"}, {"text": " "}, {"prompt": []}])
def test_a_row_that_says_nothing_is_a_bad_row(row):
    with pytest.raises(BadRowError):
        texts.read(row)


def test_case_blanks_and_forms_of_unicode_do_not_tell_texts_apart():
    assert texts.normalised("  Cafe\u0301\n\nZÜRICH ") == texts.normalised("café zürich")
    assert texts.digest("a") != texts.digest("b")


def similarity(one: str, other: str) -> float:
    sets = [{text[at : at + minhash.NGRAM] for at in range(len(text) - minhash.NGRAM + 1)} for text in (one, other)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_signatures_estimate_the_jaccard_similarity():
    """Against the sets themselves, over texts from alike to unlike; the standard error is at most 0.044."""
    errors = []
    for changed in range(0, 120, 3):
        other = STORY[:changed].upper() + STORY[changed:]
        found = (minhash.signature(STORY) == minhash.signature(other)).mean()
        errors.append(found - similarity(STORY, other))
    assert abs(np.mean(errors)) < 0.03
    assert np.abs(errors).max() < 0.15
    assert (minhash.signature("ab") == minhash.signature("ab")).all()
    assert (minhash.signature("ab") == minhash.signature("ac")).mean() < 0.1


@pytest.mark.parametrize("wanted", [0.3, 0.5, 0.7, 0.8, 0.9, 0.99])
def test_bands_find_what_is_as_similar_as_asked(wanted):
    bands, entries = minhash.banding(wanted)
    assert bands * entries <= minhash.HASHES
    assert 1 - (1 - wanted**entries) ** bands >= minhash.FOUND


def test_near_duplicates_form_clusters_and_the_first_stays():
    other = (
        "A baker makes 12 loaves each morning and sells nine of them before noon. How many are left for the evening?"
    )
    rows = [STORY, other, STORY.replace("Natalia", "Natalie"), other.replace("12", "13"), STORY.replace("48", "49")]
    signatures = np.stack([minhash.signature(texts.normalised(row)) for row in rows])
    assert minhash.first_of_cluster(signatures, 0.7).tolist() == [0, 1, 0, 1, 0]
    assert minhash.first_of_cluster(signatures, 1.0).tolist() == [0, 1, 2, 3, 4]


def words(text: str) -> tuple[int, ...]:
    """A token for each word."""
    return tuple(int.from_bytes(word.encode()[-8:], "little") for word in text.split())


def found(row: str, *questions: str, task: str = "maths") -> decontamination.Match | None:
    return Questions([Question(task, one, words(one)) for one in questions]).find(list(words(row)))


@pytest.mark.parametrize(
    ("row", "is_found"),
    [
        (STORY, True),
        (f"Here is a question. {STORY} Think step by step.", True),
        (STORY.replace("Natalia", "Giulia").replace("48", "52"), True),  # other names and numbers
        (f"Translate into German: {STORY} Natalia verkaufte im April Klammern an 48 Freunde.", True),
        (STORY[:60], False),  # eight words in a row, and less than half of it
        ("Natalia verkaufte im April Klammern an 48 ihrer Freunde, und im Mai halb so viele.", False),
        ("How many clips did Natalia sell", False),
    ],
)
def test_a_question_in_a_row_is_found_whole_perturbed_or_quoted(row, is_found):
    match = found(row, "An unrelated question about nothing that any of the rows above would hold.", STORY)
    assert (match is not None) == is_found
    assert match is None or match.question.text == STORY


def test_a_translated_question_is_found_by_its_formula():
    """What stays the same of it is more than half."""
    formula = r"\int _ 0 ^ 1 x ^ 2 + \frac { 1 } { 2 } x d x"
    match = found(
        f"Berechne das Integral {formula} und begründe.", f"Compute the integral {formula} exactly please now."
    )
    assert match is not None
    assert 0.5 < match.share < 1


def test_overlaps_of_fewer_than_five_tokens_do_not_count():
    """All tokens of the question are there, in pieces: one of eight, the others of four."""
    question = [*range(8), *range(100, 140)]
    pieces = [question[8 + at : 12 + at] for at in range(0, 40, 4)]
    row = [*range(8), *(token for piece in pieces for token in (*piece, 999 + piece[0]))]
    index = Questions([Question("t", "", tuple(question))])
    assert index.find(row) is None
    assert index.find(question) is not None


def test_exactly_half_of_a_question_is_no_contamination():
    question = tuple(range(20))
    index = Questions([Question("t", "", question)])
    assert index.find([*range(10), *range(500, 520)]) is None
    match = index.find([*range(11), *range(500, 520)])
    assert match is not None
    assert match.share == pytest.approx(11 / 20)


def test_a_task_s_own_wording_is_no_sign_of_its_questions():
    """Forty questions begin alike: a row with that beginning alone is compared with none of them."""
    wording = "Answer with the letter of the right choice and nothing else please"
    questions = [f"{wording} : what is item {number} of list {number * 7} ?" for number in range(40)]
    assert found(wording, *questions) is None
    index = Questions([Question("t", one, words(one)) for one in questions])
    assert len(index._hashes) < len(
        Questions([Question(str(n), one, words(one)) for n, one in enumerate(questions)])._hashes
    )
    match = index.find(list(words(questions[7])))
    assert match is not None


def test_questions_that_are_too_short_are_counted():
    index = Questions([Question("t", "a", (1, 2, 3)), Question("t", "b", tuple(range(9)))])
    assert index.too_short == {"t": 1}
    assert index.find([1, 2, 3, 4, 5, 6, 7, 8, 9, 10]) is not None
    assert Questions([]).find([1] * 20) is None


def supply(name: str, rows: int, weight: float = 1.0, **caps: int) -> amounts.Supply:
    return amounts.Supply(name, np.full(rows, 10), np.ones(rows, bool), weight, **caps)


def test_weights_are_whole_copies_and_a_drawn_share():
    counts = amounts.copies([supply("a", 10, 2.5), supply("b", 10, 0.3)], None, None, "error", 1)
    assert sorted(counts[0].tolist()) == [2] * 5 + [3] * 5
    assert sorted(counts[1].tolist()) == [0] * 7 + [1] * 3
    again = amounts.copies([supply("a", 10, 2.5), supply("b", 10, 0.3)], None, None, "error", 1)
    other = amounts.copies([supply("a", 10, 2.5), supply("b", 10, 0.3)], None, None, "error", 2)
    assert [one.tolist() for one in counts] == [one.tolist() for one in again]
    assert [one.tolist() for one in counts] != [one.tolist() for one in other]


def test_a_total_is_divided_by_the_weights():
    counts = amounts.copies([supply("a", 100, 2), supply("b", 100), supply("c", 100)], 101, None, "error", 0)
    assert sum(int(one.sum()) for one in counts) == 101
    assert [int(one.sum()) for one in counts] == [51, 25, 25]
    assert counts[0].max() == 1


def test_a_total_of_tokens_ends_with_the_row_that_reaches_it():
    (count,) = amounts.copies([supply("a", 100)], None, 95, "error", 0)
    assert int(count.sum()) == 10


@pytest.mark.parametrize(("too_few", "rows"), [("repeat", 25), ("accept", 10)])
def test_a_source_with_too_few_rows(too_few, rows):
    with pytest.raises(UserError, match=r"a has 10 rows; its share is 25; .*too_few: repeat"):
        amounts.copies([supply("a", 10)], 25, None, "error", 0)
    (count,) = amounts.copies([supply("a", 10)], 25, None, too_few, 0)
    assert int(count.sum()) == rows
    assert count.min() == rows // 10


def test_caps_bound_different_rows_and_their_tokens():
    counts = amounts.copies([supply("a", 50, 2, max_rows=5), supply("b", 50, max_tokens=39)], None, None, "error", 0)
    assert [int((one > 0).sum()) for one in counts] == [5, 3]
    assert int(counts[0].sum()) == 10


def test_a_source_without_a_row_left():
    empty = amounts.Supply("a", np.ones(3, np.int64), np.zeros(3, bool), 1.0)
    assert amounts.copies([empty, supply("b", 4)], 4, None, "accept", 0)[1].sum() == 2
    with pytest.raises(UserError, match="a has 0 rows"):
        amounts.copies([empty, supply("b", 4)], 4, None, "repeat", 0)


@pytest.mark.parametrize(
    ("given", "licence", "problem"),
    [
        ({"allow": ["apache-2.0", "cc-by*"]}, "Apache 2.0", None),
        ({"allow": ["apache-2.0", "cc-by*"]}, "CC_BY-SA 4.0", None),
        ({"allow": ["apache-2.0"]}, "mit", "its licence mit is not allowed"),
        ({"allow": ["apache-2.0"]}, "", "no licence is told"),
        ({"deny": ["*-nc-*"]}, "cc-by-nc-4.0", "its licence cc-by-nc-4.0 is denied"),
        ({"deny": ["*-nc-*"]}, "", None),
        ({"allow": ["cc-*"], "deny": ["*-nc-*"]}, "cc-by-nc-4.0", "its licence cc-by-nc-4.0 is denied"),
    ],
)
def test_licences(given, licence, problem):
    assert Licenses.model_validate(given).problem(licence) == problem

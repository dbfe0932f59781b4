"""Chats with checkable answers: what is cut, from where, and that nothing held out is ever in it."""

import json
import random
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cordee.errors import Fault, UserError
from cordee.stage import Context
from udhr import chats, passages, questions

SENTENCES = {
    ("de", "German", "Latn"): "Alle Menschen sind frei und gleich an Würde und Rechten geboren",
    ("fr", "French", "Latn"): "Tous les êtres humains naissent libres et égaux en dignité et en droits",
    ("it", "Italian", "Latn"): "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti",
    ("hi", "Hindi", "Deva"): "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है",
    ("ka", "Georgian", "Geor"): "ყველა ადამიანი იბადება თავისუფალი და თანასწორი თავისი ღირსებითა და უფლებებით",
    ("zh", "Chinese", "Hans"): "人人生而自由在尊严和权利上一律平等他们赋有理性和良心并应以兄弟关系的精神相对待",
    ("th", "Thai", "Thai"): "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
}


def rows(split: str) -> list[dict]:
    """Documents of which each has its own number, so that no held-out text stands in training by itself."""
    numbers = range(20) if split == "train" else range(90, 93)
    return [
        {
            "text": f"{n}: {text} {n}. {text[::-1]} {n}!" if split == "train" else f"{n} {text.upper()} {n}",
            "language": tag,
        }
        | {"language_name": name, "script": script, "article": n, "source": "", "licence": ""}
        for (tag, name, script), text in SENTENCES.items()
        for n in numbers
    ]


def write_corpus(folder: Path, train: list[dict], heldout: list[dict]) -> Path:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(train), folder / "train.parquet")
    pq.write_table(pa.Table.from_pylist(heldout), folder / "heldout.parquet")
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "corpus", rows("train"), rows("heldout"))


def config(corpus: Path, **keys: object) -> chats.Config:
    given = {"chats_per_language": {"language": 6, "continue": 4}, "preferences_per_language": 5}
    return chats.Config.model_validate({"corpus": str(corpus), "passage_characters": [10, 40], **given, **keys})


def test_a_share_of_the_answers_is_a_sentence(corpus: Path, context: Context) -> None:
    chats.run(config(corpus, chats_per_language={"language": 40}, sentences=0.5), context)
    said = [row["messages"][-1]["content"] for row in pq.read_table(context.out / "messages.parquet").to_pylist()]
    names = {name for _, name, _ in SENTENCES}
    sentences = [one for one in said if one in {questions.SENTENCE.format(name=name) for name in names}]
    assert 0.4 < len(sentences) / len(said) < 0.6
    assert set(said) - set(sentences) == names


def test_every_language_gets_its_chats_pairs_and_held_out_questions(corpus: Path, context: Context) -> None:
    metrics = chats.run(config(corpus), context)
    assert metrics["rows"] == 7 * 10
    assert metrics["preferences"] == 7 * 5
    assert metrics["heldout_rows"] == 7 * 3
    table = pq.read_table(context.out / "messages.parquet").to_pylist()
    names = {tag: name for tag, name, _ in SENTENCES}
    train = {tag: [row["text"] for row in rows("train") if row["language"] == tag] for tag in names}
    for row in table:
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        passage = user["content"].partition("\n\n")[2]
        assert any(passage in text for text in train[row["language"]])
        if row["kind"] == "language":
            assert assistant["content"] == names[row["language"]]
            assert 10 <= len(passage) <= 40
        else:
            whole = [text for text in train[row["language"]] if passage in text]
            assert any(assistant["content"] in text.partition(passage)[2][:40] for text in whole)


def test_the_rejected_name_is_wrong_and_of_the_same_script_where_there_is_one(corpus: Path, context: Context) -> None:
    chats.run(config(corpus), context)
    script = {name: script for _, name, script in SENTENCES}
    for row in pq.read_table(context.out / "preferences.parquet").to_pylist():
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert chosen != rejected
        assert row["answer"] == chosen
        if script[chosen] == "Latn":
            assert script[rejected] == script[chosen]


def test_held_out_questions_come_from_held_out_documents_and_offer_four_names(corpus: Path, context: Context) -> None:
    chats.run(config(corpus), context)
    lines = [json.loads(line) for line in (context.out / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    heldout = {(row["language"], row["article"]): row["text"] for row in rows("heldout")}
    assert {(line["language"], line["article"]) for line in lines} == set(heldout)
    for line in lines:
        passage = line["prompt"].removeprefix("Which language is this?\n\n")
        assert heldout[line["language"], line["article"]].startswith(passage)
        assert 0 < len(passage) <= 40
        assert len(set(line["choices"])) == len(line["choices"]) == 4
        assert line["answer"] == line["language_name"]
        assert line["answer"] in line["choices"]
    assert len({line["choices"].index(line["answer"]) for line in lines}) > 2


def test_the_same_seed_gives_the_same_files_and_another_seed_others(corpus: Path, context: Context) -> None:
    def written(seed: int) -> list[bytes]:
        chats.run(config(corpus), Context(out=context.out, seed=seed, events=context.events))
        return [
            (context.out / name).read_bytes() for name in ("messages.parquet", "preferences.parquet", "heldout.jsonl")
        ]

    first = written(1)
    assert written(1) == first
    assert all(one != other for one, other in zip(written(2), first, strict=True))


def test_a_passage_that_is_held_out_too_is_never_used(tmp_path: Path, context: Context) -> None:
    """The held-out documents hold one half of every training document, word by word."""
    heldout = [{**row, "text": row["text"][: len(row["text"]) // 2]} for row in rows("train")[::2]]
    corpus = write_corpus(tmp_path / "corpus", rows("train"), heldout)
    metrics = chats.run(config(corpus), context)
    assert metrics["passages_refused_as_held_out"] > 0
    texts = [row["text"] for row in heldout]
    for row in pq.read_table(context.out / "messages.parquet").to_pylist():
        if row["kind"] == "language":
            passage = row["messages"][0]["content"].partition("\n\n")[2]
            assert not any(passage in text for text in texts)


def test_a_training_passage_that_is_held_out_is_a_fault(corpus: Path) -> None:
    cutter = passages.Passages(passages.read(corpus, None), 10, 40)
    cutter.check(["a passage of nobody's text"])
    planted = rows("heldout")[4]["text"][3:25]
    with pytest.raises(Fault, match="occurs in a held-out document"):
        cutter.check(["a passage of nobody's text", planted])


def test_a_language_whose_training_text_is_all_held_out_is_an_error(tmp_path: Path, context: Context) -> None:
    corpus = write_corpus(tmp_path / "corpus", rows("train"), rows("train"))
    with pytest.raises(UserError, match="no training passage of 10 characters that is not held out"):
        chats.run(config(corpus), context)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"languages": ["de", "fr", "it", "roh"]}, "no language 'roh'"),
        ({"languages": ["de", "fr", "it"]}, "at least 4"),
        ({"passage_characters": [40, 10]}, "shortest, longest"),
        ({"passage_characters": [2, 10]}, "at least 8"),
        ({"chats_per_language": {"languages": 3}}, "language"),
    ],
)
def test_a_mistake_in_the_keys_is_named(corpus: Path, context: Context, change: dict, problem: str) -> None:
    with pytest.raises((UserError, ValueError), match=problem):
        chats.run(config(corpus, **change), context)


def test_a_language_without_a_held_out_document_is_an_error(tmp_path: Path, context: Context) -> None:
    heldout = [row for row in rows("heldout") if row["language"] != "it"]
    corpus = write_corpus(tmp_path / "corpus", rows("train"), heldout)
    with pytest.raises(UserError, match="'it' has no held-out document"):
        chats.run(config(corpus), context)


def test_a_stop_is_obeyed(corpus: Path, context: Context) -> None:
    from cordee.errors import Stopped

    (context.events.parent / "stop").touch()
    with pytest.raises(Stopped):
        chats.run(config(corpus), context)


@pytest.mark.parametrize("text", [text for (_, _, _), text in SENTENCES.items()])
def test_passages_are_cut_where_words_end_and_never_within_a_letter(text: str) -> None:
    rng = random.Random(0)  # noqa: S311 - data, not secrets
    for _ in range(300):
        length = rng.randint(8, len(text))
        passage = passages.cut(text, rng.randint(0, len(text) - length), length)
        assert passage in text
        assert passage == passage.strip()
        assert len(passage) <= length
        place = text.index(passage)
        assert not unicodedata.category(passage[0]).startswith("M")
        after = text[place + len(passage) :][:1]
        assert not after or not unicodedata.category(after).startswith("M")
        if " " in text and length >= 30:
            assert place == 0 or text[place - 1] == " "
            assert not after or after == " "


def test_an_opening_and_its_continuation_are_the_passage(corpus: Path) -> None:
    languages = passages.read(corpus, None)
    cutter = passages.Passages(languages, 10, 40)
    rng = random.Random(3)  # noqa: S311 - data, not secrets
    for language in languages:
        for _ in range(20):
            passage = cutter.draw(language, rng)
            opening, continuation = cutter.halve(passage)
            assert opening
            assert continuation
            assert "".join((opening + continuation).split()) == "".join(passage.split())


def test_names_that_two_languages_share_are_never_offered_against_each_other() -> None:
    twins = [passages.Language(tag, "Romansh", "Latn", ["x" * 50], [("y" * 50, 1)]) for tag in ("a", "b")]
    others = [
        passages.Language(name, name, "Cyrl", ["z" * 50], [("w" * 50, 1)]) for name in ("Russian", "Kazakh", "Tajik")
    ]
    everyone = [*twins, *others]
    cutter = passages.Passages(everyone, 10, 40)
    rng = random.Random(0)  # noqa: S311 - data, not secrets
    rejected = {row["rejected"][0]["content"] for row in questions.pairs(twins[0], everyone, 30, cutter, rng)}
    assert rejected == {"Russian", "Kazakh", "Tajik"}
    (item,) = questions.heldout(twins[0], everyone, 4, 40, 0)
    assert sorted(item["choices"]) == ["Kazakh", "Romansh", "Russian", "Tajik"]

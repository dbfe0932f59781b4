"""A test set of one's own as a task of lm-eval: rows of `question` and `answer`, and `choices` where there are some."""

import json
import re
import string
import unicodedata
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from cordee import files
from cordee.data.folder import find_files
from cordee.data.row import Broken, Row
from cordee.data.rows import batches
from cordee.errors import UserError

LETTERS = string.ascii_uppercase
_APART = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_MARKS = "".join(sign for sign in map(chr, range(0x20000)) if unicodedata.category(sign)[0] == "M")
_SIGN = r"(?<!\w)-(?=\d)"
# `\w` has no marks, among them the vowel signs of Indic scripts
WORDS = re.compile(rf"[{_APART}]|(?:{_SIGN})?\d+(?:\.\d+)+|(?:{_SIGN})?(?:[^\W{_APART}]|(?![{_APART}])[{_MARKS}])+")
CHECKED = 20
"""Rows that a plan looks at."""
NEEDED = "a row of questions has `question` or `prompt`, `answer` and, for multiple choice, `choices`"
ASKED = {False: "Question: {{question}}\nAnswer:", True: "{{question}}"}
"""How a question is written, by whether it is asked in a chat."""


def write(name: str, path: Path, folder: Path, *, is_chat: bool) -> None:
    """Write a file's questions as a task of lm-eval: `<name>.yaml` and, beside it, `<name>.jsonl`.

    With choices, the one to which a model gives most probability counts, by itself (`acc`) and per character
    (`acc_norm`).
    Without, an answer counts where it is the reference but for case, punctuation and space (`exact_match`), or where
    the reference's words stand in it (`contains`).

    Raises:
        UserError: a row is no question.
    """
    rows = [_question(row) for batch in batches(find_files(path, key="questions").documents) for row in batch]
    if not rows:
        raise UserError("holds no question", file=path, key="questions")
    kinds = {"choices" in row for row in rows}
    if len(kinds) > 1:
        raise UserError("some rows have choices, others not", file=path, key="questions", hint="make two files of them")
    data = folder / f"{name}.jsonl"
    files.write_text(data, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    common = {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
        "test_split": "test", "fewshot_split": "test", "doc_to_text": ASKED[is_chat],
        "target_delimiter": "" if is_chat else " ",
        "metadata": {"version": 1.0, "chat": is_chat, "description": f"questions of {path.name}"},
    }  # fmt: skip
    own = _with_choices() if kinds.pop() else _in_own_words()
    text = yaml.safe_dump({**common, **own}, allow_unicode=True, sort_keys=False)
    files.write_text(folder / f"{name}.yaml", text.replace("process_results: judge", f"process_results: {JUDGE}"))


def check(path: Path) -> None:
    """Check the first rows of a file of questions.

    Raises:
        UserError: one is no question.
    """
    for row in islice(
        (row for batch in batches(find_files(path, key="questions").documents) for row in batch), CHECKED
    ):
        _question(row)


JUDGE = "!function eval.measuring.questions.judge"


def _with_choices() -> dict[str, Any]:
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    return {
        "output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer", "metric_list": metrics,
    }  # fmt: skip


def _in_own_words() -> dict[str, Any]:
    names = ("exact_match", "contains")
    return {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 256, "do_sample": False, "temperature": 0.0},
        "process_results": "judge",
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names],
    }


def judge(document: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval's `process_results`: whether an answer is a reference, and whether it contains the words of one."""
    (answer,) = results
    said, right = _words(answer), [_words(one) for one in document.get("answers") or [document["answer"]]]
    inside = any(said[at : at + len(words)] == words for words in right for at in range(len(said) - len(words) + 1))
    return {"exact_match": float(said in right), "contains": float(inside)}


def _words(text: str) -> list[str]:
    """The words of a text without case and punctuation, or its signs where it has no words.

    A number is one word with its sign and its decimals. In scripts without spaces (kana, Chinese characters, Thai, Lao,
    Burmese, Khmer) each character is a word.
    """
    text = unicodedata.normalize("NFC", text.casefold()).replace("\N{MINUS SIGN}", "-")
    return WORDS.findall(text) or text.split()


def _question(row: Row) -> dict[str, Any]:
    """A row as `question`, `answer` and, if there are some, `choices`, of which the answer is the number."""
    values = row.values
    if isinstance(values, Broken):
        raise UserError(f"{row.place}: {values.problem}", file=row.file, key="questions")
    asked = values["question"] if "question" in values else values.get("prompt")
    answer, choices = values.get("answer"), values.get("choices")
    if not isinstance(asked, str) or not asked.strip() or answer is None or not str(answer).strip():
        absent = "question" if not isinstance(asked, str) or not asked.strip() else "answer"
        problem = f"{row.place} has no {absent}: its columns are {', '.join(map(repr, values))}"
        raise UserError(problem, file=row.file, key="questions", hint=NEEDED)
    right = answer if isinstance(answer, list) and choices is None else [answer]
    if not right or not all(isinstance(one, str | int | float) and str(one).strip() for one in right):
        problem = f"the answer in {row.place} is no text, no number and no list of them: {str(answer)[:40]}"
        raise UserError(problem, file=row.file, key="questions", hint=NEEDED)
    told = {"language": values["language"]} if isinstance(values.get("language"), str) else {}
    if choices is None:
        return {**told, "question": asked, "answer": str(right[0]), "answers": [str(one) for one in right]}
    if isinstance(choices, str):  # a CSV's
        choices = _parsed(choices)
    if isinstance(choices, dict):  # as ARC has them
        labels, choices = choices.get("label"), choices.get("text")
    else:
        labels = None
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
        raise UserError(f"the choices in {row.place} are no list of texts", file=row.file, key="questions")
    found = _numbers(answer, choices, labels if isinstance(labels, list) else list(LETTERS[: len(choices)]))
    if len(found) != 1:
        what = "may be one of several" if found else "is none"
        problem = f"the answer {answer!r} in {row.place} {what} of the choices"
        hint = "write the text of the right one, its letter, or its number from 0"
        raise UserError(problem, file=row.file, key="questions", hint=hint)
    return {**told, "question": asked, "choices": choices, "answer": found.pop()}


def _parsed(text: str) -> Any:
    """A text that is JSON as what it holds."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _numbers(answer: Any, choices: list[str], labels: list[Any]) -> set[int]:
    """Which choices an answer may name: by its text or its label, or by its number from 0."""
    named = {at for known in (choices, labels) for at, one in enumerate(known) if one == str(answer)}
    is_number = isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices)
    return named | ({answer} if is_number else set())

"""Benchmark results by checkpoint: values, changes relative to what it was trained from, and values by language."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from cordee.errors import Fault
from cordee.manifest import Read
from eval.measuring import statistics
from eval.reporting.records import Corpus, Language, ModelResults, Record, Results, Task

Scores = dict[int, tuple[str, float, float]]
"""By document number: hash of its content, value, weight."""
SIGNIFICANT = 0.05
SCRIPTS = {
    "Arab": "Arabic", "Beng": "Bengali", "Cyrl": "Cyrillic", "Deva": "Devanagari", "Ethi": "Ethiopic",
    "Grek": "Greek", "Hans": "Chinese (simplified)", "Hant": "Chinese (traditional)", "Hebr": "Hebrew",
    "Latn": "Latin", "Mymr": "Myanmar", "Tibt": "Tibetan",
}  # fmt: skip
"""Names of scripts by ISO 15924 code; scripts that are not listed are shown by their code."""


def benchmarks(records: list[Record], everything: Sequence[Record]) -> list[dict[str, Any]]:
    """Every task of every listed benchmark, one row per checkpoint; p-values are adjusted over all of them.

    Args:
        records: the listed artifacts.
        everything: these and what they come from: they tell what a checkpoint was trained from.

    Raises:
        Fault: a result file is damaged, or a value is missing.
    """
    known = {record.name: record for record in everything}
    tables = [table for record in records if record.holds("results.json") for table in _tables(record, known)]
    changes = [row["change"] for table in tables for row in table["rows"] if row["change"]]
    tested = [change for change in changes if change["p_value"] is not None]
    for change, adjusted in zip(tested, statistics.holm([change["p_value"] for change in tested]), strict=True):
        change["adjusted_p_value"] = adjusted
        change["significant"] = adjusted < SIGNIFICANT
    return tables


def is_percent(task: Task) -> bool:
    """Whether a task's values are fractions of correct answers."""
    return task.metric.startswith(("acc", "exact_match", "pass", "f1"))


def _tables(record: Record, known: Mapping[str, Record]) -> Iterator[dict[str, Any]]:
    """The tasks of one benchmark."""
    results = record.read("results.json", Results)
    reads = {read.key.removeprefix("models."): read for read in record.manifest.inputs}
    for name, task in results.tasks.items():
        models = [model for model in results.models if name in model.results]
        rows: list[dict[str, Any]] = []
        scored: dict[str, Scores] = {}
        for model in models:
            value, error = _value(record, model, name, task)
            own = scored[model.name] = _scored(record, model.name, name, task, value)
            row = {"model": model.name, "value": value, "standard_error": error, "documents": len(own) or None}
            parent = _trained_from(model.name, rows, reads, known)
            rows.append({**row, "change": _change(parent, scored[parent["model"]], row, own) if parent else None})
        if rows:
            yield {
                "benchmark": record.name,
                "engine": results.engine.model_dump(),
                "task": name,
                **task.model_dump(),
                "percent": is_percent(task),
                "notes": list(dict.fromkeys(note for model in models for note in model.notes.get(name, []))),
                "rows": rows,
            }


def _trained_from(
    model: str, rows: list[dict[str, Any]], reads: Mapping[str, Read], known: Mapping[str, Record]
) -> dict[str, Any] | None:
    """The last row of a checkpoint that a model comes from, by their manifests; where none tells, the row above.

    Args:
        model: its name in the benchmark.
        rows: those of earlier checkpoints.
        reads: what the benchmark measured, by the names of its models.
        known: the artifacts by name.
    """
    sources = [reads[model]] if model in reads else []
    for read in sources:  # those of its artifact come to the end of the list
        made = known.get(read.artifact)
        sources += [source for source in made.manifest.inputs if source not in sources] if made else []
    earlier = {_place(read) for read in sources[1:]}
    found = [row for row in rows if _place(reads.get(row["model"])) in earlier] or rows
    return found[-1] if found else None


def _place(read: Read | None) -> tuple[str, str, str] | None:
    """What a stage read: an artifact, the place in it, or the hash of what is in none."""
    return (read.artifact, read.path, read.sha256) if read else None


def _value(record: Record, model: ModelResults, task_name: str, task: Task) -> tuple[float, float | None]:
    """A model's value in a task and its standard error, or None if there is none."""
    found = model.results[task_name]
    value, error = found.get(task.metric), found.get(f"{task.metric}_stderr")
    if not isinstance(value, float | int) or not math.isfinite(value):
        key = f"models.{model.name}.results.{task_name}.{task.metric}"
        raise Fault(f"is {value!r}, not a number", file=record.path / "results.json", key=key)
    return float(value), float(error) if isinstance(error, float | int) and math.isfinite(error) else None


def _change(earlier: dict[str, Any], before: Scores, later: dict[str, Any], after: Scores) -> dict[str, Any]:
    """The change between two checkpoints: paired where both were scored on the same documents."""
    same = bool(before) and {doc: row[0::2] for doc, row in before.items()} == {
        doc: row[0::2] for doc, row in after.items()
    }
    if same:
        old, weights = _columns(before)
        new = [after[document][1] for document in sorted(after)]
        change = statistics.paired_change(old, new, weights)
    else:
        change = statistics.unpaired_change(
            earlier["value"], earlier["standard_error"], later["value"], later["standard_error"]
        )
    return {
        **asdict(change),
        "against": earlier["model"],
        "p_value": change.p_value,
        "adjusted_p_value": None,
        "significant": False,
    }


def _columns(rows: Scores) -> tuple[list[float], list[float]]:
    """Values and weights in the order of the documents."""
    return [rows[document][1] for document in sorted(rows)], [rows[document][2] for document in sorted(rows)]


def _scored(record: Record, model: str, task_name: str, task: Task, value: float) -> Scores:
    """The score of each document, from lm-eval's sample file.

    Empty if there is no such file, or if the mean over documents is not the published value (the metric is then no mean
    over documents): the change is then unpaired, and the report says so.
    """
    pattern = re.compile(rf"lm_eval/{re.escape(model)}/(?:.*/)?samples_{re.escape(task_name)}_\d{{4}}-[^/]*\.jsonl")
    found = sorted(item.path for item in record.manifest.files if pattern.fullmatch(item.path))
    if not found:
        return {}
    rows: Scores = {}
    for number, row in enumerate(record.rows(found[-1]), 1):
        try:
            score = statistics.score(task.metric, row[task.metric])
            rows.setdefault(int(row["doc_id"]), (str(row.get("doc_hash", "")), *score))
        except (ValueError, KeyError, TypeError) as error:
            raise Fault(
                f"row {number} has no doc_id and {task.metric} ({type(error).__name__}: {error})",
                file=record.path / found[-1],
            ) from error
    if not rows or not math.isclose(statistics.ratio_mean(*_columns(rows))[0], value, rel_tol=1e-6, abs_tol=1e-9):
        return {}
    return rows


def languages(records: list[Record], corpus: Corpus | None) -> list[dict[str, Any]]:
    """For each task with values by language: languages grouped by script, with a value and a shade per checkpoint."""
    tables = []
    for record in records:
        if not record.holds("results.json"):
            continue
        results = record.read("results.json", Results)
        for name, task in results.tasks.items():
            models = [model for model in results.models if model.by_language.get(name, {}).keys() - {""}]
            if models:
                tables.append(_by_language(name, task, models, corpus.languages if corpus else {}))
    return tables


def _by_language(name: str, task: Task, models: list[ModelResults], known: dict[str, Language]) -> dict[str, Any]:
    """One task's table."""
    values = [value for model in models for value in model.by_language[name].values()]
    low, high = (0.0, 1.0) if is_percent(task) else (min(values), max(values))
    scripts: dict[str, list[dict[str, Any]]] = {}
    for tag in sorted({tag for model in models for tag in model.by_language[name]}):
        language = known.get(tag) or Language(name="", script="")
        found = [model.by_language[name].get(tag) for model in models]
        shades = [None if value is None else shade(value, low, high, task.higher_is_better) for value in found]
        row = {"tag": tag, "name": language.name or tag or "no language", "values": found, "shades": shades}
        scripts.setdefault(language.script, []).append(row)
    groups = [{"script": script, "languages": rows} for script, rows in _grouped(scripts)]
    return {
        "task": name,
        **task.model_dump(),
        "percent": is_percent(task),
        "models": [model.name for model in models],
        "low": low,
        "high": high,
        "groups": groups,
    }


def _grouped(scripts: dict[str, list[dict[str, Any]]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Scripts sorted by number of languages; scripts with one language form the last group."""
    large = {SCRIPTS.get(script, script): rows for script, rows in scripts.items() if len(rows) > 1}
    single = [row for rows in scripts.values() if len(rows) == 1 for row in rows]
    groups = sorted(large.items(), key=lambda item: (-len(item[1]), item[0]))
    groups += [("Scripts of one language", single)] if single else []
    return [(script, sorted(rows, key=lambda row: str(row["name"]))) for script, rows in groups]


SHADES = 9


def shade(value: float, low: float, high: float, higher_is_better: bool) -> int:
    """0 (worst of the range) to 8 (best)."""
    share = (value - low) / (high - low) if high > low else 0.5
    return min(SHADES - 1, int((share if higher_is_better else 1.0 - share) * SHADES))


def checkpoints(tables: list[dict[str, Any]], by_language: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each checkpoint its values and its best and worst languages."""
    cards: dict[str, dict[str, Any]] = {}
    for table in tables:
        for row in table["rows"]:
            card = cards.setdefault(row["model"], {"model": row["model"], "scores": []})
            score = {key: table[key] for key in ("task", "metric", "percent")}
            card["scores"].append({**score, "value": row["value"], "standard_error": row["standard_error"]})
    for table in by_language:
        rows = [row for group in table["groups"] for row in group["languages"]]
        for index, model in enumerate(table["models"]):
            ranked = sorted(
                (row for row in rows if row["values"][index] is not None),
                key=lambda row: row["values"][index],
                reverse=table["higher_is_better"],
            )
            if model in cards and len(ranked) >= 6 and not table["percent"]:
                names = [row["name"] for row in ranked]
                cards[model].update(best_languages=names[:3], worst_languages=names[-3:][::-1])
    return list(cards.values())

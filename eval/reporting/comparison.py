"""Benchmark results by checkpoint: values, changes relative to what it was trained from, and values by language."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from cordee.errors import Fault
from cordee.manifest import Read
from eval.measuring import statistics
from eval.reporting.records import Column, Corpus, Figure, Language, ModelResults, Record, Results, Task

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
    """Every metric of every task of every listed benchmark, one row per checkpoint.

    p-values are adjusted over what is shown first: the main metric of each task or group that was asked for.

    Args:
        records: the listed artifacts.
        everything: these and what they come from: they tell what a checkpoint was trained from.

    Raises:
        Fault: a result file is damaged, or a value is missing.
    """
    known = {record.name: record for record in everything}
    tables = [table for record in records if record.holds("results.json") for table in _tables(record, known)]
    changes = [row["change"] for table in tables if table["is_main"] for row in table["rows"] if row["change"]]
    tested = [change for change in changes if change["p_value"] is not None]
    for change, adjusted in zip(tested, statistics.holm([change["p_value"] for change in tested]), strict=True):
        change["adjusted_p_value"] = adjusted
        change["significant"] = adjusted < SIGNIFICANT
    return tables


def further(tables: list[dict[str, Any]]) -> dict[str, Any]:
    """What is not shown first, a row for each metric: the checkpoints, and their values and standard errors."""
    others = [table for table in tables if not table["is_main"]]
    models = list(dict.fromkeys(row["model"] for table in others for row in table["rows"]))
    keys = ("task", "asked", "metric", "filter", "percent")
    rows = []
    for table in others:
        found = {row["model"]: (row["value"], row["standard_error"]) for row in table["rows"]}
        rows.append({**{key: table[key] for key in keys}, "values": [found.get(model) for model in models]})
    return {"models": models, "rows": rows}


def is_percent(metric: str) -> bool:
    """Whether a metric's values are fractions of correct answers."""
    return metric.startswith(("acc", "exact_match", "pass", "f1"))


def _tables(record: Record, known: Mapping[str, Record]) -> Iterator[dict[str, Any]]:
    """The metrics of the tasks of one benchmark: of each task the main one first."""
    results = record.read("results.json", Results)
    reads = {read.key.removeprefix("models."): read for read in record.manifest.inputs}
    tasks = {task.key: task for model in results.models for task in model.tasks}
    for task in tasks.values():
        asked = [model for model in results.models if task.key in {own.key for own in model.tasks}]
        found = [figure.column for model in asked for figure in model.results if figure.column[:2] == task.key]
        for column in dict.fromkeys([task.column, *found]):
            *_, metric, chosen = column
            yield {
                "benchmark": record.name,
                "engine": results.engine.model_dump(),
                **task.model_dump(),
                "metric": metric,
                "filter": chosen,
                "higher_is_better": task.higher_is_better.get(metric, True),
                "is_main": task.is_asked and column == task.column,
                "percent": is_percent(metric),
                "notes": list(dict.fromkeys(note for model in asked for note in model.notes.get(task.task, []))),
                "rows": _rows(record, asked, column, reads, known),
            }


def _rows(
    record: Record, models: list[ModelResults], column: Column, reads: Mapping[str, Read], known: Mapping[str, Record]
) -> list[dict[str, Any]]:
    """Each model's value, and its change.

    Raises:
        Fault: a model has no such value.
    """
    rows: list[dict[str, Any]] = []
    scored: dict[str, Scores] = {}
    for model in models:
        figure = model.figure(column)
        if figure is None:
            task, asked, *key = column
            problem = f"has no {','.join(key)} of {task} ({asked})"
            raise Fault(problem, file=record.path / "results.json", key=f"models.{model.name}.results")
        own = scored[model.name] = _scored(record, model.name, figure)
        error = figure.standard_error if figure.standard_error and math.isfinite(figure.standard_error) else None
        row = {"model": model.name, "value": figure.value, "standard_error": error, "documents": len(own) or None}
        parent = _trained_from(model.name, rows, reads, known)
        rows.append({**row, "change": _change(parent, scored[parent["model"]], row, own) if parent else None})
    return rows


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


def _scored(record: Record, model: str, figure: Figure) -> Scores:
    """The score of each document, from lm-eval's sample file.

    Empty if there is no such file, or if the mean over documents is not the published value (a group's, or a metric
    that is no mean over documents): the change is then unpaired, and the report says so.
    """
    place = rf"lm_eval/{re.escape(model)}/{re.escape(figure.asked)}/samples_{re.escape(figure.task)}"
    found = sorted(
        item.path for item in record.manifest.files if re.fullmatch(rf"{place}_\d{{4}}-[^/]*\.jsonl", item.path)
    )
    rows: Scores = {}
    for number, row in enumerate(record.rows(found[-1]) if found else (), 1):
        try:
            if row["filter"] != figure.filter or figure.metric not in row:
                continue
            score = statistics.score(figure.metric, row[figure.metric])
            rows[int(row["doc_id"])] = (str(row.get("doc_hash", "")), *score)
        except KeyError as error:
            raise Fault(f"row {number} has no {error}", file=record.path / found[-1]) from error
        except (ValueError, TypeError):  # no number for each document
            return {}
    if not rows:
        return {}
    mean = statistics.ratio_mean(*_columns(rows))[0]
    return rows if math.isclose(mean, figure.value, rel_tol=1e-6, abs_tol=1e-9) else {}


def languages(records: list[Record], corpus: Corpus | None) -> list[dict[str, Any]]:
    """For each task with values by language: languages grouped by script, with a value and a shade per checkpoint."""
    tables = []
    for record in records:
        if not record.holds("results.json"):
            continue
        results = record.read("results.json", Results)
        tasks = {(task.task, task.asked): task for model in results.models for task in model.tasks if task.is_asked}
        for key, task in tasks.items():
            main = (*key, task.metric, task.filter)
            values = {
                model.name: figure.by_language
                for model in results.models
                for figure in model.results
                if (figure.task, figure.asked, figure.metric, figure.filter) == main
                and figure.by_language.keys() - {""}
            }
            if values:
                tables.append(_by_language(task, values, corpus.languages if corpus else {}))
    return tables


def _by_language(task: Task, models: dict[str, dict[str, float]], known: dict[str, Language]) -> dict[str, Any]:
    """One task's table, from the values of each model by language."""
    values = [value for own in models.values() for value in own.values()]
    better, percent = task.higher_is_better.get(task.metric, True), is_percent(task.metric)
    low, high = (0.0, 1.0) if percent else (min(values), max(values))
    scripts: dict[str, list[dict[str, Any]]] = {}
    for tag in sorted({tag for own in models.values() for tag in own}):
        language = known.get(tag) or Language(name="", script="")
        found = [own.get(tag) for own in models.values()]
        shades = [None if value is None else shade(value, low, high, better) for value in found]
        row = {"tag": tag, "name": language.name or tag or "no language", "values": found, "shades": shades}
        scripts.setdefault(language.script, []).append(row)
    groups = [{"script": script, "languages": rows} for script, rows in _grouped(scripts)]
    return {
        **task.model_dump(),
        "higher_is_better": better,
        "percent": percent,
        "models": list(models),
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
        for row in table["rows"] if table["is_main"] else ():
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

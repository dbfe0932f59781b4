"""The figures of a report, section by section, as plain JSON values: the page and `report.json` show the same."""

from typing import Any

from cordee import units
from cordee.certificate import NAME, Certificate
from eval.measuring.statistics import BITS_PER_BYTE
from eval.reporting.records import Corpus, ModelConfig, Record, Source, Sources

SERIES = {
    "loss": "Training loss",
    "heldout_bits_per_byte": "Held-out text (bits per byte)",
    "heldout_loss": "Held-out loss",
    "rewards/accuracies": "Preference accuracy (fraction of pairs)",
    "accuracy": "Accuracy of the reward model (fraction of pairs)",
    "reward": "Reward of sampled completions",
    "heldout_reward": "Reward on held-out prompts",
    "entropy": "Entropy (nats a token)",
    "completions/mean_length": "Length of completions (tokens)",
    "kl": "Divergence from the reference (nats a token)",
}
"""The metrics of `metrics.jsonl` that are drawn, and their titles."""
ROWS = "rows.json"
POINTS = 400
"""The largest number of points of a curve that are drawn."""
SAMPLES = 12
PROMPT_CHARACTERS = 600
SHORT_ANSWER_CHARACTERS = 60


def pipeline(records: list[Record]) -> list[dict[str, Any]]:
    """The output and the cost of each stage; certificates have a section of their own."""
    return [
        {
            "artifact": record.name,
            "stage": record.manifest.stage,
            "uses": record.manifest.uses,
            "output": output(record),
            **{key: record.manifest.metrics.get(key) for key in ("tokens", "parameters", "flops")},
            "seconds": record.manifest.seconds,
            "peak_memory_bytes": record.manifest.peak_memory_bytes,
        }
        for record in records
        if not record.holds(NAME)
    ]


def goodput(records: list[Record]) -> list[dict[str, Any]]:
    """What the time of each stage went to that trains or had an incident, and its incidents."""
    return [
        {"stage": record.manifest.stage, "artifact": record.name, "share": spent.share, **spent.model_dump()}
        for record in records
        if (spent := record.manifest.goodput) and (spent.incidents or spent.seconds["productive"] < spent.wall_s)
    ]


def output(record: Record) -> str:
    """A stage's output in a few words, from its files and metrics."""
    keys = ("rows", "vocab_size", "heldout_bits_per_byte")
    rows, vocabulary, bits = (record.manifest.metrics.get(key) for key in keys)
    known = {
        "adapter_config.json": "an adapter",
        "config.json": _model(record) + ("" if bits is None else f", {bits:.3f} bits per held-out byte"),
        "tokenizer.json": f"a vocabulary of {units.count(vocabulary)}" if vocabulary else "a tokenizer",
        "tokens.json": "tokens" + (f" of {units.count(rows)} documents" if rows else ""),
        "results.json": "benchmark results",
        "scored.jsonl": (f"{units.count(rows)} " if rows else "") + "scored answers",
        "pairs.jsonl": (f"{units.count(rows)} " if rows else "") + "preference pairs",
        "samples.jsonl": (f"{units.count(rows)} " if rows else "") + "answers",
    }
    if record.holds("corpus.json"):
        languages = len(record.read("corpus.json", Corpus).languages.keys() - {""})
        return f"a corpus in {languages} language{'s' if languages != 1 else ''}" if languages else "a corpus"
    for file, words in known.items():
        if record.holds(file):
            return words
    return f"{units.count(rows)} rows" if rows else f"{len(record.manifest.files)} files"


def _model(record: Record) -> str:
    """What kind of model an artifact is."""
    if not record.holds("config.json"):
        return ""
    named = record.read("config.json", ModelConfig).architectures or [""]
    return "a reward model" if named[0].endswith("ForSequenceClassification") else "a language model"


def training_data(records: list[Record]) -> list[dict[str, Any]]:
    """What each stage that trains on chats or pairs has read, and what it left out."""
    return [
        {
            "stage": record.manifest.stage,
            "artifact": record.name,
            "sources": [_source(source) for source in record.read(ROWS, Sources).sources],
        }
        for record in records
        if record.holds(ROWS)
    ]


def _source(source: Source) -> dict[str, Any]:
    share = None if source.loss_tokens is None else source.loss_tokens / max(source.tokens or 0, 1)
    return {
        **source.model_dump(exclude={"path", "loss_tokens"}),
        "name": source.path.rstrip("/").rpartition("/")[2],
        "num_left_out": sum(kind.rows for kind in source.left_out),
        "loss_share": share,
    }


def curves(records: list[Record], corpus: Corpus | None) -> list[dict[str, Any]]:
    """The learning curves of the stages that train."""
    found = []
    for record in records:
        rows = record.rows("metrics.jsonl") if record.holds("metrics.jsonl") else []
        for key, title in SERIES.items():
            points = [
                [row["step"], float(row[key])]
                for row in rows
                if isinstance(row.get(key), int | float) and isinstance(row.get("step"), int)
            ]
            if len(points) < 2:
                continue
            entropy = corpus.heldout_byte_entropy if corpus and key == "heldout_bits_per_byte" else None
            found.append(
                {
                    "artifact": record.name,
                    "stage": record.manifest.stage,
                    "metric": key,
                    "title": title,
                    "first": points[0][1],
                    "last": points[-1][1],
                    "points": thin(points),
                    "byte_entropy": entropy,
                }
            )
    return found


def thin(points: list[list[float]]) -> list[list[float]]:
    """At most `POINTS` of the points, evenly spread, the first and the last among them."""
    if len(points) <= POINTS:
        return points
    step = (len(points) - 1) / (POINTS - 1)
    return [points[round(index * step)] for index in range(POINTS)]


def verdict(tables: list[dict[str, Any]], drawn: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The summary at the top: each benchmark from its first to its last checkpoint, and the held-out text."""
    lines = [
        {
            "subject": curve["title"].partition(" (")[0],
            "unit": "bits per byte",
            "percent": False,
            "is_task": False,
            "before": curve["first"],
            "after": curve["last"],
            "from": f"step {curve['points'][0][0]:,}",
            "to": f"step {curve['points'][-1][0]:,} of {curve['stage']}",
            "reference": None if curve["byte_entropy"] is None else ["byte entropy", curve["byte_entropy"]],
        }
        for curve in drawn
        if curve["metric"] == "heldout_bits_per_byte"
    ]
    for table in tables:
        if not table["is_main"] or (lines and table["metric"] == BITS_PER_BYTE):
            continue
        first, last = table["rows"][0], table["rows"][-1]
        lines.append(
            {
                "subject": table["task"],
                "is_task": True,
                "unit": "correct" if table["percent"] else table["metric"].replace("_", " "),
                "percent": table["percent"],
                "before": first["value"],
                "after": last["value"],
                "from": first["model"],
                "to": last["model"],
                "reference": None if table["chance"] is None else ["chance", table["chance"]],
            }
        )
    return sorted(lines, key=lambda line: not line["percent"])


def samples(records: list[Record]) -> list[dict[str, Any]]:
    """Of each set of generated answers, a fixed selection at equal distances over the file, and the counts over all."""
    found = []
    for record in records:
        rows = record.samples() if record.holds("samples.jsonl") else []
        if not rows:
            continue
        models = list(dict.fromkeys(name for row in rows for name in row.outputs))
        judged = {
            name: [right(row.outputs[name], row.reference) for row in rows if name in row.outputs] for name in models
        }
        counts = [
            {"model": name, "right": marks.count(True), "of": len(marks) - marks.count(None)}
            for name, marks in judged.items()
        ]
        chosen = [rows[index * len(rows) // min(SAMPLES, len(rows))] for index in range(min(SAMPLES, len(rows)))]
        shown = [
            {
                **row.model_dump(exclude={"outputs", "rewards"}),
                "prompt": cut(row.prompt),
                "outputs": [
                    {
                        "model": name,
                        "text": cut(text),
                        "right": right(text, row.reference),
                        "reward": row.rewards.get(name),
                    }
                    for name, text in row.outputs.items()
                ],
            }
            for row in chosen
        ]
        found.append(
            {"artifact": record.name, "rows": len(rows), "has_references": any(row.reference for row in rows),
             "counts": counts, "shown": shown}
        )  # fmt: skip
    return found


def right(output: str, reference: str | None) -> bool | None:
    """Whether an answer equals a short reference, but for case, outer space and a last full stop; None if not short."""
    if not reference or len(reference) > SHORT_ANSWER_CHARACTERS or "\n" in reference:
        return None
    return _normal(output) == _normal(reference)


def _normal(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".。").strip()


def cut(text: str) -> str:
    """A text cut to `PROMPT_CHARACTERS`, with the number of characters that were cut."""
    left_out = len(text) - PROMPT_CHARACTERS
    return text if left_out <= 0 else f"{text[:PROMPT_CHARACTERS]} … [{left_out:,} more characters]"


def certificates(records: list[Record]) -> list[dict[str, Any]]:
    """The certificates with their checks."""
    return [
        {"artifact": record.name, **record.read(NAME, Certificate).model_dump(exclude={"evidence"})}
        for record in records
        if record.holds(NAME)
    ]

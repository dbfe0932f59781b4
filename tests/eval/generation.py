"""What tests of generation share: the stage's keys, a place for it, and its files."""

import json

from cordee import files
from cordee.stage import Context
from eval import generate


def config(models, prompts, **changes):
    """The stage's keys: two prompts, greedy, by transformers."""
    return generate.Config.model_validate(
        {
            "models": {name: str(path) for name, path in models.items()},
            "prompts": str(prompts),
            "max_prompts": 2,
            "max_tokens": 6,
            "engine": "transformers",
            **changes,
        }
    )


def context_in(folder):
    (folder / "out").mkdir(parents=True, exist_ok=True)
    return Context(out=folder / "out", seed=3, events=folder / "events.jsonl")


def written(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_in(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answers(context, model="first"):
    return rows_in(context.out / "answers" / f"{model}.jsonl")


def samples(context):
    return rows_in(context.out / "samples.jsonl")


def notes(context):
    events = files.read_json_lines(context.events)
    return [event["text"] for event in events if event["event"] == "note"]

"""The questions that benchmarks ask, as rows: `posttrain.data` leaves rows out that hold one (`against: [$questions]`).

    python -m eval.questions --config FILE [key=value …]

Tasks are named as `eval.benchmark` names them; no model is needed. `questions.jsonl` has for each document of a task
`task`, `document` and `prompt`: the text that lm-eval asks, without examples and without a chat template. A task that
is asked in several ways has all documents that any of them asks.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cordee import files, worker
from cordee.errors import UserError
from cordee.stage import Context
from eval.measuring.asked import TasksConfig

VERSION = 2
QUESTIONS = "questions.jsonl"


class Config(TasksConfig):
    """Which tasks' questions are written."""


def run(config: Config, context: Context) -> dict[str, Any]:
    """Load the tasks with their data and write their questions; returns the manifest's metrics."""
    from eval.measuring import batches

    context.waits("the tasks and their data")
    tasks: dict[str, Any] = {}
    asked: dict[str, set[int]] = {}
    lines: list[str] = []
    with tempfile.TemporaryDirectory(prefix="cordee-") as cache:
        for batch in batches.make(config, context.out, Path(cache)):
            for name, task in batch.loaded["tasks"].items():
                chosen = (batch.samples or {}).get(name)
                tasks.setdefault(name, task)
                asked.setdefault(name, set()).update(range(len(task.eval_docs)) if chosen is None else chosen)
        for name, task in tasks.items():
            documents, numbers = task.eval_docs, sorted(asked[name])
            own = [row for number in numbers for row in _rows(name, number, documents[number], task)]
            if not own:
                raise UserError(f"{name} has no question that is text", key="tasks")
            lines += [json.dumps(row, ensure_ascii=False) + "\n" for row in own]
            left_out = len(documents) - len(numbers)
            context.note(f"{len(own)} questions of {name}" + (f"; `limit` leaves {left_out} out" if left_out else ""))
    files.write_text(context.out / QUESTIONS, "".join(lines))
    return {"rows": len(lines), "tasks": len(tasks)}


def _rows(name: str, number: int, document: Any, task: Any) -> Iterator[dict[str, Any]]:
    """The question of a document; the contexts that it chooses among where lm-eval asks several (WinoGrande)."""
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        asked = [task.doc_to_target(document)]
    elif getattr(task, "multiple_input", 0):
        asked = task.doc_to_choice(document)
    else:
        asked = [task.doc_to_text(document)]
    yield from ({"task": name, "document": number, "prompt": text} for text in asked if _is_text(text))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def main() -> None:
    """Entry point."""
    worker.main(Config, run)


if __name__ == "__main__":
    main()

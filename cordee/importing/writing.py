"""Writes a draft as a recipe, and tells what became of each key."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cordee import files, recipe, yaml12
from cordee.errors import UserError
from cordee.importing.draft import Draft

ORDER = ("model", "base", "adapter", "chat_template", "added_tokens", "data", "heldout", "eval_steps", "overlong",
         "global_batch_size", "per_device_train_batch_size", "launch", "precision", "compile", "lora", "quantization",
         "resume_steps", "logging_steps", "trainer")  # fmt: skip
SHOWN_ANSWERS = 8


def write(draft: Draft, out: Path) -> None:
    """Write the recipe, and the chat template beside it where the peer's file holds its text.

    Raises:
        UserError: there is such a file, or a value of the peer's file is none that the stage takes.
    """
    if out.exists():
        raise UserError("is there already", file=out, hint="name another file")
    if draft.template is not None:
        beside = out.with_suffix(".jinja")
        draft.keys["chat_template"] = str(beside)
        if beside.exists():
            raise UserError("is there already", file=beside, hint="name another recipe")
        files.write_text(beside, draft.template)
    text = "\n".join(_lines(draft, out)) + "\n"
    recipe.check(yaml12.parse(text), draft.file)
    files.write_text(out, text)


def told(draft: Draft) -> Iterator[str]:
    """What became of each key, line by line."""
    method = {"sft": "supervised fine-tuning", "dpo": "DPO"}[draft.stage]
    yield f"{draft.file}: {draft.peer}, {method} (posttrain.{draft.stage}){draft.by and f', {draft.by}'}"
    rows, processes = draft.keys["global_batch_size"], draft.keys.get("launch.num_processes", 1)
    word = f"{processes} process{'es' if processes > 1 else ''}"
    yield f"a step has {rows} rows, if the training was started with {word} (--processes)"
    yield from _table("taken", {path: f"→ {_into(draft, ours)}" for path, ours in draft.taken.items()})
    lost = {path: lost.why for path, lost in draft.lost.items() if not lost.is_felt}
    yield from _table("not taken, and results may differ", draft.felt())
    yield from _table("not taken; results are the same", lost)
    yield from _table("without meaning for a recipe", draft.idle)
    if draft.beside:
        yield f"what {draft.peer} does without a key for it"
        yield from (f"  {line}" for line in draft.beside)


def _into(draft: Draft, ours: list[str]) -> str:
    """The keys of the stage that a key went into, with their values."""
    return ", ".join(f"{key}: {_short(draft.keys[key])}" if key in draft.keys else key for key in ours)


def _table(title: str, rows: Mapping[str, str]) -> Iterator[str]:
    if rows:
        yield f"{title} ({len(rows)})"
        width = min(max(map(len, rows)), 40)
        yield from (f"  {path:<{width}}  {said}" for path, said in rows.items())


def _lines(draft: Draft, out: Path) -> Iterator[str]:
    """The recipe's text."""
    name = re.sub(r"[^\w-]+", "-", out.name.partition(".")[0]).strip("-_") or "recipe"
    yield f"# Written by `cordee import` from {draft.file.name} ({draft.peer}). `cordee plan {out}` shows what it does."
    if draft.felt():
        yield "# Not taken, and results may differ:"
        yield from (f"#   {path}: {_short(draft.get(path))} - {why}" for path, why in draft.felt().items())
    if draft.beside:
        yield f"# What {draft.peer} does without a key for it:"
        yield from (f"#   {line}" for line in draft.beside)
    yield f"name: {name}"
    yield f"seed: {draft.seed}"
    yield "stages:"
    yield f"  {draft.stage}:"
    yield f"    uses: posttrain.{draft.stage}"
    yield from _stage(draft)
    made: list[str] = [draft.stage]
    if any(key.startswith("lora.") for key in draft.keys) or "base" in draft.keys:
        made.append("merged")
        yield f"  merged: {{uses: posttrain.merge, adapter: ${draft.stage}}}  # one model of base and adapter"
    prompts = Path(draft.data[0]["path"])
    if prompts.is_file() and not draft.holds_texts and "base" not in draft.keys:
        yield from _answers(draft, made[-1])
        made.append("answers")
    yield f"  report: {{uses: eval.report, artifacts: [{', '.join(f'${name}' for name in made)}]}}"


def _answers(draft: Draft, model: str) -> Iterator[str]:
    """The stage that asks the model before and after."""
    source = draft.data[0]
    yield "  answers:"
    yield "    uses: eval.generate"
    yield f"    models: {{before: {yaml12.inline(draft.keys['model'])}, after: ${model}}}"
    yield f"    prompts: {yaml12.inline(source['path'])}  # better: prompts of your own that are not trained on"
    if columns := {old: new for old, new in source.get("columns", {}).items() if new not in ("chosen", "rejected")}:
        yield f"    columns: {yaml12.inline(columns)}"
    yield f"    max_prompts: {SHOWN_ANSWERS}"
    yield "    max_tokens: 256  # of an answer"


def _stage(draft: Draft) -> Iterator[str]:
    """The keys of the stage that trains."""
    keys: dict[str, Any] = {}
    for path, value in draft.keys.items():
        first, *rest = path.split(".")
        place: dict[str, Any] = keys
        for part in (first, *rest)[:-1]:
            place = place.setdefault(part, {})
        place[(first, *rest)[-1]] = value
    keys["data"] = draft.data
    for name in ORDER:
        if name not in keys:
            continue
        value = keys[name]
        if name in ("trainer", "lora", "quantization") and isinstance(value, dict):
            yield f"    {name}:"
            yield from (f"      {inner}: {_said(draft, f'{name}.{inner}', one)}" for inner, one in value.items())
        elif name in ("data", "heldout") and isinstance(value, list):
            yield f"    {name}:"
            yield from (f"      - {yaml12.inline(source)}" for source in value)
        else:
            yield f"    {name}: {_said(draft, name, value)}"


def _said(draft: Draft, path: str, value: Any) -> str:
    """A value with what stands behind it."""
    remarks = [draft.remarks.get(path, "")]
    if isinstance(value, dict):
        remarks += [draft.remarks.get(f"{path}.{name}", "") for name in value]
    remark = "; ".join(filter(None, remarks))
    return yaml12.inline(value) + (f"  # {remark}" if remark else "")


def _short(value: Any) -> str:
    text = re.sub(r"\s+", " ", yaml12.inline(value))
    return text if len(text) <= 60 else f"{text[:57]}..."

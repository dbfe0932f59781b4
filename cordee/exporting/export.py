"""Exports a model or an adapter: reads what is known of it, then writes the folder and its card."""

import re
from pathlib import Path

from cordee import files, model_folder
from cordee.artifact import Store
from cordee.errors import UserError
from cordee.exporting import folder as folders
from cordee.exporting import origin, results
from cordee.exporting.card import Card

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_LICENCE = re.compile(r"[a-z0-9.-]+")


def run(folder: Path, out: Path, store: Store, licence: str | None, base: str | None, *, gguf: bool) -> Card:
    """Write `out`.

    Args:
        folder: the model or the adapter.
        out: the folder that is written, which is not there yet; its name is the model's.
        store: where benchmarks of it and what it was made from are looked for.
        licence: as the hub spells it; None: not given.
        base: what the hub calls the model that it was made from; None: by the manifests, if they say.
        gguf: whether a file for llama.cpp is added.

    Raises:
        UserError: `folder` is no model, `out` is there, a name is none of the hub, or the converter is not installed.
        Fault: a file is damaged, or can't be converted.
    """
    _require_names(out, licence, base)
    model_folder.require_served(folder, "ARTIFACT")
    if gguf and model_folder.is_adapter(folder):
        raise UserError("is an adapter, which is not converted", file=folder, key="--gguf", hint="merge it first")
    converter = folders.converter() if gguf else ""
    named = folders.contents(folder)
    hashes = folders.require_whole(named)
    found = origin.find(folder, store)
    weights = frozenset(sha for name, sha in hashes.items() if name.endswith(".safetensors"))
    measured, unread = results.find(folder, weights, found.store)
    name = out.resolve().name
    card = Card(name, folder, found, measured, unread, hashes, licence, base or _base(folder, found), gguf)

    def finish(beside: Path) -> None:
        if card.is_adapter:
            folders.name_base(beside, card.base)
        if converter:
            folders.convert(converter, beside, name)
        files.write_text(beside / folders.CARD, card.text())

    folders.write(out, named, hashes, finish)
    return card


def _require_names(out: Path, licence: str | None, base: str | None) -> None:
    if out.exists() or out.is_symlink():
        raise UserError("is there already", file=out, key="DIR", hint="name a new folder, or delete it")
    if licence is not None and not _LICENCE.fullmatch(licence):
        problem = f"{licence!r} is no licence as the hub spells them"
        raise UserError(problem, key="--license", hint="such as apache-2.0, mit, cc-by-4.0, other")
    if base is not None and not _HUB_NAME.fullmatch(base):
        raise UserError(f"{base!r} is no name of a model on the hub", key="--base-model", hint="write OWNER/NAME")


def _base(folder: Path, found: origin.Origin) -> str | None:
    """What the hub calls the model that this one was made from, as far as the manifests say.

    An adapter's base is the very model that it was trained on, which may be an artifact.
    """
    if model_folder.is_adapter(folder) and len(found.stages) > 1:
        return None
    return next((source.hub for source in found.bases if source.hub), None)

"""A tokenizer with a padding token, a chat template or further tokens that its folder does not give it.

It is written as a folder of its own, and opened from there as any other: with the ids of its `tokenizer.json`.
"""

import hashlib
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from cordee import files, model_folder
from cordee.chat import spans
from cordee.compute.tokenizer import open_tokenizer
from cordee.errors import UserError, nearest

MADE_FOR_PADDING = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<|endoftext|>")
RESERVED = re.compile(r"<\|?(reserved_special_token|reserved|extra|unused)_?\d+\|?>")
"""Tokens without a meaning of their own."""
MARKER = re.compile(r"<[^<>\s]{1,40}>|\[/?[A-Z_]{2,20}\]")
"""What may mark a turn in the text of a chat template."""
_written: list[tempfile.TemporaryDirectory[str]] = []


@dataclass(frozen=True)
class Changes:
    """What a recipe asks of a tokenizer."""

    added_tokens: Sequence[str] = ()
    chat_template: Path | None = None
    pad_token: str | None = None


def changed(folder: Path, base: Path, changes: Changes) -> tuple[Path, list[str]]:
    """The folder of a tokenizer with changes: `folder` itself where nothing is changed.

    Args:
        folder: the tokenizer's.
        base: the model's, whose configs may name a padding token.
        changes: what is asked for. Without a padding token it is the tokenizer's own, one that the model's configs
            name, one that was made for it, or eos.

    Returns:
        The folder, which lasts as long as this process, and a note of each change.

    Raises:
        UserError: a token can't be added, or can't be used for padding.
    """
    notes: list[str] = []
    place, tokenizer = folder, open_tokenizer(folder, key="model")
    template = changes.chat_template.read_text(encoding="utf-8") if changes.chat_template else tokenizer.chat_template
    marks = {token for token in changes.added_tokens if token in str(template or "")}
    if new := [token for token in changes.added_tokens if not _is_added(tokenizer, token, special=token in marks)]:
        place = _copy(place, base, template=changes.chat_template, added={token: token in marks for token in new})
        tokenizer = open_tokenizer(place, key="added_tokens")
        ids = tokenizer.convert_tokens_to_ids(new)
        notes.append(f"added tokens: {', '.join(f'{token!r} {at}' for token, at in zip(new, ids, strict=True))}")
    elif changes.chat_template:
        place = _copy(place, base, template=changes.chat_template)
        tokenizer = open_tokenizer(place, key="chat_template")
    if changes.chat_template:
        notes += _unknown_markers(tokenizer)
    rows = model_folder.shape(files.read_json(base / "config.json")).vocab_size or 0
    if new or folder != base or not rows:  # tables grow with added tokens, and with an adapter's
        rows = max(rows, last_id(tokenizer) + 1)
    pad, why = _pad_token(tokenizer, base, changes.pad_token, rows)
    if pad != tokenizer.pad_token:
        place = _copy(place, base, pad=pad)
        notes.append(f"padding token: {pad!r}, {why}")
    return place, notes


def last_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The highest id of a token."""
    return max(map(int, tokenizer.get_vocab().values()))


def _is_added(tokenizer: PreTrainedTokenizerBase, token: str, *, special: bool) -> bool:
    added = tokenizer.added_tokens_decoder.values()
    return any(one.content == token and (one.special or not special) for one in added)


def _pad_token(tokenizer: PreTrainedTokenizerBase, base: Path, asked: str | None, rows: int) -> tuple[str, str]:
    """The padding token and where it comes from; `rows` are those of the embedding, in which it has to lie."""
    tokens = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if number < rows}
    if asked is not None:
        if asked not in tokens:
            known = (
                "is an ordinary piece of text" if asked in tokenizer.get_vocab() else "is no token of the vocabulary"
            )
            hint = nearest(asked, tokens) or "`added_tokens:` adds it"
            raise UserError(f"{asked!r} {known}", key="pad_token", hint=hint)
        return asked, "as asked for"
    own = tokenizer.pad_token
    if own is not None and tokenizer.pad_token_id < rows:
        return str(own), "the tokenizer's own"
    names = {number: token for token, number in tokens.items()}
    for file in ("generation_config.json", "config.json"):
        fields: dict[str, Any] = files.read_json(base / file) if (base / file).is_file() else {}
        named = model_folder.token_id(fields, "pad_token_id")
        if named in names:
            return names[named], f"which {file} names"
    end_of_turn = spans.end_of_turn(tokenizer)
    ends = {tokenizer.eos_token, tokenizer.bos_token, None if end_of_turn is None else names.get(end_of_turn)}
    made = [token for token in MADE_FOR_PADDING if token in tokens]
    made += [names[number] for number in sorted(names) if RESERVED.fullmatch(names[number])]
    if free := next((token for token in made if token not in ends), None):
        return free, "which ends no turn"
    if tokenizer.eos_token is None:
        raise UserError(
            "its tokenizer has no padding token, and no other that could stand for it", file=base, key="model",
            hint="name one as `pad_token:`, and add it by `added_tokens:` where there is none",
        )  # fmt: skip
    return str(tokenizer.eos_token), "the end of text: which tokens carry loss does not depend on it"


def _unknown_markers(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A note of the turn markers that the chat template writes, and that are several tokens each."""
    texts = ("qzx", "xzq")
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # noqa: BLE001 - a template raises whatever it likes; the rows will tell
        return []
    known = tokenizer.get_vocab()
    if not (unknown := [marker for marker in dict.fromkeys(MARKER.findall(text)) if marker not in known]):
        return []
    listed = ", ".join(unknown)
    return [f"the chat template writes {listed}, each several tokens; `added_tokens: [{listed}]` makes them tokens"]


def _copy(
    folder: Path,
    base: Path,
    *,
    template: Path | None = None,
    added: Mapping[str, bool] | None = None,
    pad: str | None = None,
) -> Path:
    """A copy of a tokenizer's folder with a change; where the same copy is there already, that one.

    Of added tokens, those that the chat template writes are special: others are content, which a reader wants to see.
    """
    names = files.tokenizer_files(folder)
    digest = hashlib.sha256(repr((template and template.read_bytes(), added, pad)).encode())
    for path in (*(folder / name for name in names), base / "config.json"):
        digest.update(path.name.encode() + path.read_bytes())
    if not _written:
        _written.append(tempfile.TemporaryDirectory(prefix="cordee-tokenizer-"))  # deleted when the process ends
    place = Path(_written[0].name) / digest.hexdigest()[:16]
    if place.is_dir():
        return place
    with files.replaced(place, last="tokenizer.json") as beside:
        kept = names if template is None else [name for name in names if not name.endswith(".jinja")]
        files.copy(folder, beside, kept)
        files.copy(base, beside, ["config.json"])  # a class of tokenizer may follow from it
        if added:
            own = Tokenizer.from_file(str(folder / "tokenizer.json"))
            for token, is_special in added.items():
                add = own.add_special_tokens if is_special else own.add_tokens
                add([AddedToken(token, normalized=False, special=is_special)])
            own.save(str(beside / "tokenizer.json"))
        settings = _settings(beside, "tokenizer_config.json")
        if template is not None:
            settings.pop("chat_template", None)
            files.write_text(beside / "chat_template.jinja", template.read_text(encoding="utf-8"))
        if pad is not None:
            settings["pad_token"] = pad
            if special := _settings(beside, "special_tokens_map.json"):
                files.write_json(beside / "special_tokens_map.json", special | {"pad_token": pad})
        files.write_json(beside / "tokenizer_config.json", settings)
    return place


def _settings(folder: Path, name: str) -> dict[str, Any]:
    return dict(files.read_json(folder / name)) if (folder / name).is_file() else {}

"""Opening tokenizers so that their ids are those of `tokenizer.json`.

transformers builds a tokenizer from the vocabulary and the merges by the class that `tokenizer_config.json` names, or
that the model's type implies. Where another class wrote `tokenizer.json`, text is encoded differently without warning:
spaces vanish, digits are grouped. So whatever is opened here has encoded a probe, and gave the ids that the tokenizers
library gives from `tokenizer.json` itself.
"""

import hashlib
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cordee import files, model_folder
from cordee.errors import Fault, UserError

PLAIN_CLASS = "PreTrainedTokenizerFast"
"""The class that takes `tokenizer.json` as it is, by the name that transformers 4 and 5 both know."""
PROBE = (
    *("Hello world. It's 2026, isn't it?", " leading", "  two", "trailing  ", "a  b   c"),
    *("a\nb\n\nc\r\n d", "\ta\t\tb", "def f(x):\n    return {'a': [x ** 2]}\n", "CamelCase snake_case ALLCAPS"),
    *("0 1 12 123 1234 12345 3.14 1,000,000 ½ ٣٤", "x=1;y+=2  # no", "▁ Ġ Ċ <0x0A>"),
    *("Zürich, façade; cafe\u0301 \uff26\uff55 \ufb01", "Ελλάδα Россия қазақ", "한국어 日本語 中文字符。"),
    *("ไทย हिन्दी עברית العربية", "👩‍👩‍👧 🇨🇭 ☃ \u200b\ufeff\u00a0"),
)
"""Texts of many scripts, spaces, digits and signs."""
SAMPLE = 2048
"""How many of the vocabulary's tokens, and of its added tokens, are spelled out and encoded as well."""

_known: dict[tuple[Path, str], tuple[Path, str]] = {}
# A folder and the digest of its files, to where AutoTokenizer opens it from, and what it does with the folder itself.
_corrected: list[tempfile.TemporaryDirectory[str]] = []


def open_tokenizer(folder: Path, *, key: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, with the ids of its `tokenizer.json`.

    It is what `AutoTokenizer` opens; where that encodes the probe differently, it is opened again as the plain class.

    Raises:
        UserError: the folder holds none, or none that transformers opens with the ids of `tokenizer.json`.
        Fault: it is damaged.
    """
    return _open(folder, key)[0]


def tokenizer_folder(folder: Path, *, key: str | None = None) -> Path:
    """A folder from which `AutoTokenizer` opens what `open_tokenizer` does, for libraries that open it themselves.

    It is `folder` itself, or a corrected copy that lasts as long as this process.
    """
    return _open(folder, key)[1]


def tokenizer_remark(folder: Path) -> str:
    """What `AutoTokenizer` does differently with a folder as it is, where `tokenizer_folder` is a corrected copy."""
    opens_from, problem = tokenizer_folder(folder), _known[_identity(folder)][1]
    if not problem:
        return ""
    alone = (folder / "config.json").is_file() and not (opens_from / "config.json").is_file()
    then = "; transformers itself takes another class for every model of this type" if alone else ""
    return f"the tokenizer is used and published as {PLAIN_CLASS}: {problem}{then}"


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy a tokenizer's files byte by byte, but for a `tokenizer_config.json` that had to be corrected.

    A tokenizer that was opened and saved again can differ.
    """
    opens_from = tokenizer_folder(source)
    files.copy(opens_from, folder, files.tokenizer_files(opens_from))


def difference(folder: Path, other: Path) -> str:
    """What the tokenizer in a folder does differently from another, whose tokens it may add to; empty if nothing.

    Files that were written again can differ in every byte and mean the same.
    """
    opened = open_tokenizer(folder)
    return _difference(opened, _own(other), {token.content for token in opened.added_tokens_decoder.values()})


def _own(folder: Path) -> Tokenizer:
    """What the tokenizers library makes of a folder's `tokenizer.json`."""
    try:
        own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the tokenizers library raises no narrower type
        raise Fault(f"can't be opened as a tokenizer: {error}", file=folder / "tokenizer.json") from error
    own.no_truncation()
    own.no_padding()
    return own


def _open(folder: Path, key: str | None) -> tuple[PreTrainedTokenizerBase, Path]:
    """The tokenizer, and where `AutoTokenizer` opens it from; encodes the probe once for each content of a folder."""
    if not (folder / "tokenizer.json").is_file():
        raise UserError("holds no tokenizer: it has no tokenizer.json", file=folder, key=key)
    model_folder.require_undamaged(folder, files.tokenizer_files(folder))
    identity = _identity(folder)
    if identity in _known:
        opens_from, _ = _known[identity]
        return _auto(opens_from), opens_from
    own = _own(folder)
    problems: list[str] = []
    for opens_from in _candidates(folder):
        try:
            opened = _auto(opens_from)
            problem = _difference(opened, own, _declared(opens_from))
        except Exception as error:  # noqa: BLE001 - whatever a class raises for a file that it was not made for
            problem = f"{type(error).__name__}: {error}"
        if not problem:
            _known[identity] = opens_from, problems[0] if problems else ""
            return opened, opens_from
        problems.append(problem)
    raise UserError(
        f"transformers does not open it with the ids of tokenizer.json: {problems[-1]}",
        file=folder / "tokenizer_config.json",
        key=key,
    )


def _auto(folder: Path) -> PreTrainedTokenizerBase:
    # not told about remote code, it would ask on the terminal and wait
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _files(folder: Path) -> list[str]:
    """All files of a folder that determine how a tokenizer is opened, as paths within it."""
    return [*files.tokenizer_files(folder), *(["config.json"] if (folder / "config.json").is_file() else [])]


def _identity(folder: Path) -> tuple[Path, str]:
    """A key for a folder and the content of all its files that determine how a tokenizer is opened."""
    digest = hashlib.sha256()
    for name in _files(folder):
        content = (folder / name).read_bytes()
        digest.update(f"{name} {len(content)} ".encode() + content)
    return folder.resolve(), digest.hexdigest()


def _candidates(folder: Path) -> Iterator[Path]:
    """Where `AutoTokenizer` may open the tokenizer from: its folder; a copy that names the plain class; that one alone.

    In the copy, added tokens are as `tokenizer.json` has them, which `tokenizer_config.json` can overrule. For a few
    model types transformers uses its own class, whatever is named: the last copy has no config.json.
    """
    yield folder
    kept = tempfile.TemporaryDirectory(prefix="cordee-tokenizer-")
    _corrected.append(kept)  # deleted when the process ends
    copy = Path(kept.name)
    files.copy(folder, copy, _files(folder))
    added = {token["content"]: token for token in files.read_json(folder / "tokenizer.json")["added_tokens"]}
    settings = _settings(folder) | {"tokenizer_class": PLAIN_CLASS}
    for token in settings.get("added_tokens_decoder", {}).values():
        token |= {name: value for name, value in added.get(token["content"], {}).items() if name != "id"}
    files.write_json(copy / "tokenizer_config.json", settings)
    yield copy
    if (copy / "config.json").is_file():
        (copy / "config.json").unlink()
        yield copy


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return dict(files.read_json(path)) if path.is_file() else {}


def _difference(opened: PreTrainedTokenizerBase, own: Tokenizer, declared: Collection[str]) -> str:
    """What a tokenizer does differently from the one of `tokenizer.json`; empty where there is nothing.

    Args:
        opened: what transformers made of a folder.
        own: what the tokenizers library made of its `tokenizer.json`.
        declared: strings of the folder's other files, which may name tokens that `tokenizer.json` does not hold.
    """
    name = type(opened).__name__
    if not opened.is_fast:
        return f"{name} is none of the tokenizers library"
    spelled = [*PROBE, *_spelled_out(own, opened)]
    for texts, special in ((spelled, False), (list(PROBE), True)):
        expected = [encoding.ids for encoding in own.encode_batch(texts, add_special_tokens=special)]
        found = opened(texts, add_special_tokens=special)["input_ids"]
        for text, theirs, ours in zip(texts, found, expected, strict=True):
            if theirs != ours:
                return f"{name} encodes {text!r} as {theirs[:8]}, not {ours[:8]}"
    back = opened.batch_decode(found, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    for said, right in zip(back, own.decode_batch(expected, skip_special_tokens=False), strict=True):
        if said != right:
            return f"{name} decodes to {said!r}, not {right!r}"
    vocabulary, ids = opened.get_vocab(), own.get_vocab()
    for token in sorted({*vocabulary, *ids}):
        if vocabulary.get(token) != ids.get(token) and (token in ids or token not in declared):
            return f"{name} has id {vocabulary.get(token)} for {token!r}, not {ids.get(token)}"
    return ""


def _spelled_out(own: Tokenizer, opened: PreTrainedTokenizerBase) -> Iterator[str]:
    """Texts of tokens spread over the vocabulary, one by one, and added tokens in the midst of text."""
    added = _any_of(opened.added_tokens_encoder)  # a token that transformers adds is no text any more
    chosen = [[number] for number in _spread(own.get_vocab().values())]
    for text in own.decode_batch(chosen, skip_special_tokens=False):
        if not added.search(text):
            yield text
    decoder = own.get_added_tokens_decoder()
    for number in _spread(decoder):
        token = decoder[number].content
        yield f"a {token} b{token}{token}\n{token}c"


def _spread(numbers: Iterable[int]) -> list[int]:
    """At most `SAMPLE` of some numbers, evenly."""
    ordered = sorted(numbers)
    return ordered[:: max(1, -(-len(ordered) // SAMPLE))]


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


def _declared(folder: Path) -> set[str]:
    """Every string in the files beside `tokenizer.json` that can declare a token."""
    found: set[str] = set()
    waiting = [files.read_json(folder / name) for name in files.TOKENIZER_FILES[1:4] if (folder / name).is_file()]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            found.add(value)
        elif isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value
    return found

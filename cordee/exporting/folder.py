"""Writes the folder of an exported model: its files as they are, verified, and its model card."""

import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from cordee import files, hashes, model_folder
from cordee.errors import Fault, UserError

CARD = "README.md"
CONVERTERS = ("convert_hf_to_gguf.py", "convert-hf-to-gguf")
"""llama.cpp's converter, by the names under which it is installed."""
_BESIDE = (
    *("generation_config.json", "preprocessor_config.json", "processor_config.json", model_folder.ADAPTERS_BASE),
    *("LICENSE*", "NOTICE*"),
)
_TOKENIZERS_SOURCES = ("tokenizer.model", "vocab.json", "merges.txt")
"""What some tokenizers have beside `tokenizer.json`."""


def contents(folder: Path) -> dict[str, Path]:
    """The files of a model or an adapter that are exported, by their names in the exported folder.

    Raises:
        UserError: it has no tokenizer.
    """
    is_adapter, tokenizer = model_folder.is_adapter(folder), model_folder.tokenizer_of(folder)
    found = [folder / model_folder.ADAPTER_WEIGHTS] if is_adapter else model_folder.weights(folder)
    found += [folder / (model_folder.ADAPTER_CONFIG if is_adapter else "config.json")]
    found += [path for pattern in ("*.safetensors.index.json", *_BESIDE) for path in sorted(folder.glob(pattern))]
    named = {path.name: path for path in found}
    own = files.tokenizer_files(tokenizer)
    if not own:
        raise UserError("has no tokenizer", file=folder)
    named |= {name: tokenizer / name for name in own}
    return named | {name: tokenizer / name for name in _TOKENIZERS_SOURCES if (tokenizer / name).is_file()}


def require_whole(named: dict[str, Path]) -> dict[str, str]:
    """Compare files with the manifests of the artifacts that they lie in, if any.

    Returns:
        The SHA-256 of each, by its name.

    Raises:
        Fault: one differs from what was published.
    """
    for folder in {path.parent for path in named.values()}:
        model_folder.require_undamaged(folder, [path.name for path in named.values() if path.parent == folder])
    return {name: hashes.of_file(path) for name, path in named.items()}


def write(
    out: Path,
    named: dict[str, Path],
    known: dict[str, str],
    finish: Callable[[Path], None],
) -> None:
    """Write the folder beside and rename it once it is whole.

    Args:
        out: the folder, which is not there yet.
        named: the files, by their names in it.
        known: the SHA-256 of each.
        finish: adds to the folder what is not copied.

    Raises:
        Fault: a copy differs from its file.
    """
    with files.replaced(out, last=CARD) as beside:
        for name, path in named.items():
            (beside / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, beside / name)
        for name, sha256 in known.items():
            if files.sha256(beside / name) != sha256:
                raise Fault("differs from what was copied: run it again", file=named[name])
        finish(beside)


def name_base(folder: Path, base: str | None) -> None:
    """Name an adapter's base as the hub does, in the place of a path of this machine; nothing if it is not known."""
    path = folder / model_folder.ADAPTER_CONFIG
    files.write_json(path, files.read_json(path) | {"base_model_name_or_path": base})


def converter() -> str:
    """llama.cpp's converter.

    Raises:
        UserError: it is not installed.
    """
    found = next(filter(None, map(shutil.which, CONVERTERS)), None)
    if not found:
        problem = f"llama.cpp's {CONVERTERS[0]} is not on PATH"
        hint = "get it with llama.cpp's source, make it executable, and install its requirements"
        raise UserError(problem, key="--gguf", hint=hint)
    return found


def convert(command: str, folder: Path, name: str) -> None:
    """Add `<name>.gguf`, in the dtype of the weights.

    Raises:
        Fault: the converter fails.
    """
    file = folder / f"{name}.gguf"
    arguments = [command, str(folder), "--outfile", str(file), "--outtype", "auto"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)  # noqa: S603 - no shell
    if done.returncode or not file.is_file():
        last = next(_lines_from_the_end(done.stderr), f"it ended with code {done.returncode}")
        raise Fault(f"can't be converted to GGUF: {last}", file=command)


def _lines_from_the_end(text: str) -> Iterator[str]:
    lines: Iterable[str] = reversed(text.splitlines())
    return (line.strip() for line in lines if line.strip())

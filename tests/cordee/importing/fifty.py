"""Fifty configurations with the key sets of public ones, ten of each peer; and the table of docs/import.md.

Whose key sets they are stands in docs/import.md.
"""

import sys
from collections import Counter
from pathlib import Path

from cordee.importing import peers
from cordee.importing.draft import Draft

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
PEERS = {
    "axolotl": "axolotl",
    "llama_factory": "LLaMA-Factory",
    "trl": "TRL",
    "alignment_handbook": "alignment-handbook",
    "torchtune": "torchtune",
}
"""Folder → name."""
CONFIGS = [path for name in PEERS for path in sorted((HERE / name).glob("*.yaml"))]


def general(path: str) -> str:
    """A key with `*` for the number of an item: `datasets.*.type`."""
    return ".".join("*" if part.isdecimal() else part for part in path.split("."))


def drafts(folder: str) -> list[Draft]:
    """The ten of a peer."""
    return [peers.read(path) for path in CONFIGS if path.parent.name == folder]


def table() -> str:
    """What could not be taken of the ten of each peer."""
    lines = ["| peer | key | in so many of ten | results may differ | why |", "|---|---|---|---|---|"]
    for folder, name in PEERS.items():
        count: Counter[tuple[str, bool, str]] = Counter()
        for draft in drafts(folder):
            count.update({(general(path), lost.is_felt, lost.why) for path, lost in draft.lost.items()})
        for (path, is_felt, why), times in sorted(count.items(), key=lambda item: (not item[0][1], -item[1], item[0])):
            lines.append(f"| {name} | `{path}` | {times} | {'yes' if is_felt else 'no'} | {why} |")
    return "\n".join(lines) + "\n"


def beside() -> str:
    """What the peers do without a key for it, in the ten of each."""
    lines = ["| peer | what it does without a key for it, and Cordée otherwise | in so many of ten |", "|---|---|---|"]
    for folder, name in PEERS.items():
        count = Counter(line for draft in drafts(folder) for line in set(draft.beside))
        lines += [f"| {name} | {line} | {times} |" for line, times in sorted(count.items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table() + "\n" + beside())

"""Plants damages into artifacts: a flipped bit, a file that is cut, gone, or was never there."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

KINDS = ("bit", "cut", "missing", "extra")


def plant(artifact: Path, rng: random.Random) -> str:
    """Damage one file of an artifact, its manifest as likely as any other; says what was done."""
    kind = rng.choice(KINDS)
    path = rng.choice(sorted(path for path in artifact.rglob("*") if path.is_file()))
    if kind == "extra":
        path = path.parent / rng.choice([".hidden", "extra.txt", "new/extra.txt", f"{path.name}.old"])
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    elif kind == "missing":
        path.unlink()
    else:
        content = path.read_bytes()
        if not content:
            path.write_bytes(b"x")
        elif kind == "cut":
            path.write_bytes(content[: rng.randrange(len(content))])
        else:
            bit = rng.randrange(8 * len(content))
            path.write_bytes(
                content[: bit // 8] + bytes([content[bit // 8] ^ (1 << bit % 8)]) + content[bit // 8 + 1 :]
            )
    return f"{kind}: {path.relative_to(artifact.parent)}"


def each(artifacts: list[Path], count: int, seed: int, keep: Path) -> Iterator[tuple[Path, str]]:
    """Plant `count` damages one after the other, each into an artifact chosen at random, which is restored after it."""
    rng = random.Random(seed)  # noqa: S311 - no secrets
    for _ in range(count):
        artifact = rng.choice(artifacts)
        copy = shutil.copytree(artifact, keep / "whole", symlinks=True)
        yield artifact, plant(artifact, rng)
        shutil.rmtree(artifact)
        copy.rename(artifact)

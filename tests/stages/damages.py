"""Plants damages into the artifacts of a store: a flipped bit, a file that is cut, gone, or was never there.

    python tests/stages/damages.py RUNS RECIPE [COUNT [SEED]]

plants them into a copy of a real store, one at a time, and prints how many `verify` noticed while `plan`, `status` and
`verify` went on over the rest.
"""

import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from cordee import manifest, plan, recipe, show
from cordee.artifact import Store
from cordee.plan import Plan

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


def printed(show_it: Callable[..., Any], *given: Any) -> tuple[Any, str]:
    """What a function that prints returns, and what it prints."""
    out = Console(width=200)
    with out.capture() as caught:
        result = show_it(out, *given)
    return result, caught.get()


def check(store: Store, load: Callable[[], Plan], count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Plant `count` damages one after the other, each into an artifact chosen at random, which is restored after it.

    Yields:
        what was done, and what is wrong with how it was noticed: empty if the artifact and no other was named as
        damaged, and `plan` and `status` were printed.
    """
    rng = random.Random(seed)  # noqa: S311 - no secrets
    artifacts = [found.path for found in store.scan()]
    with tempfile.TemporaryDirectory(dir=store.root.parent) as keep:
        for _ in range(count):
            artifact = rng.choice(artifacts)
            copy = shutil.copytree(artifact, Path(keep) / "whole", symlinks=True)
            what = plant(artifact, rng)
            is_whole, said = printed(show.verify, store.scan())
            named = [line.split()[1] for line in said.splitlines() if line.startswith("damaged")]
            problem = "" if not is_whole and named == [f"{artifact.parent.name}/{artifact.name}"] else f"named: {named}"
            for screen in (show.plan, show.status):
                printed(screen, load())
            yield what, problem
            shutil.rmtree(artifact)
            copy.rename(artifact)


def main(runs: str, file: str, count: str = "200", seed: str = "20261125") -> None:
    """Check a copy of a store, and print what was planted and what was missed."""
    began, kinds, missed = time.monotonic(), Counter[str](), []
    with tempfile.TemporaryDirectory() as folder:
        store = Store(shutil.copytree(runs, Path(folder) / "runs", symlinks=True))
        for what, problem in check(store, lambda: plan.make(recipe.load(Path(file)), store), int(count), int(seed)):
            kinds[f"{what.partition(':')[0]} in a {'manifest' if manifest.NAME in what else 'file'}"] += 1
            missed += [f"{what}: {problem}"] if problem else []
    lines = [f"{number:>4}  {kind}" for kind, number in sorted(kinds.items())]
    lines += [f"MISSED {line}" for line in missed]
    lines.append(f"{int(count) - len(missed)} of {count} damages noticed, in {time.monotonic() - began:.0f} s")
    sys.stdout.write("\n".join(lines) + "\n")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Manifests for tests: with all fields, of which a test gives those that matter to it."""

from pathlib import Path
from typing import Any

from cordee import files, manifest
from cordee.manifest import Manifest

FIELDS = {
    "recipe": "brook", "stage": "spring", "version": 1, "uses": "toys.spring", "fingerprint": "f1",
    "identity": {"config": {}, "seed": 0, "uses": "toys.spring"}, "execution": {}, "inputs": [],
    "started": "2026-11-25T21:00:00+00:00",
    "host": {"name": "node-1", "cpu": "Example CPU", "cores": 2, "memory_bytes": 25_000_000_000, "gpu": None,
             "platform": "Linux"},
    "packages": {}, "python": "3.11.7", "cordee": "0.1.0", "git": None, "metrics": {}, "proves": None, "seconds": 1.5,
    "peak_memory_bytes": 200_000_000, "files": [],
}  # fmt: skip


def draft(**fields: Any) -> Manifest:
    """A manifest with these fields, and the rest as above."""
    return Manifest.model_validate({**FIELDS, **fields}, strict=False)


def listed(folder: Path) -> list[dict[str, Any]]:
    """The files of a folder as a manifest lists them."""
    return [
        {"path": path.relative_to(folder).as_posix(), "bytes": path.stat().st_size, "sha256": files.sha256(path)}
        for path in files.walk(folder)
        if path.name != manifest.NAME
    ]


def seal(folder: Path, **fields: Any) -> None:
    """Write the manifest of what a folder holds now."""
    manifest.write(folder, draft(**{"files": listed(folder), **fields}))


def change(folder: Path, **fields: Any) -> None:
    """Replace fields of a folder's manifest, and give it the digest of its new content."""
    manifest.write(folder, draft(**{**manifest.read(folder).model_dump(), **fields}))

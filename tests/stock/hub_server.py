"""A loopback server of the hub's paths, as huggingface_hub asks them, from a folder of the hub's layout.

The folder holds `models/owner/name/…` and `datasets/owner/name/…`. What a repository holds when it is asked for is a
commit of `main`, which stays. Faults are planted by a file's name.
"""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

API = re.compile(r"/api/(models|datasets)/(.+?)(?:/(revision|tree)/([^/]+))?")
FILE = re.compile(r"/(datasets/)?(.+?)/resolve/([^/]+)/(.+)")
TOKEN = "hf_granted"  # noqa: S105 - the server's own


class Hub:
    """What the server has, what goes wrong, and what it was asked."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = ""
        self.commits: dict[tuple[str, str], dict[str, dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        """Names of repositories whose files need `TOKEN`."""
        self.short: set[str] = set()
        """Files that come without their last byte, and whose length says so."""
        self.cut: set[str] = set()
        """Files whose connection breaks in the middle, once."""
        self.flipped: dict[str, int] = {}
        """Files that come with a wrong byte, so many times."""
        self.slow: set[str] = set()
        """Files that never end."""
        self.sizes: dict[str, int] = {}
        """Files that are listed with another size."""
        self.outside: dict[str, bytes] = {}
        """Files that are listed beside those of a repository, by a path that no repository has."""
        self.asked: list[str] = []
        """The files that were sent, in part or whole."""
        self.released = threading.Event()

    def write(self, repository: str, contents: dict[str, str | bytes]) -> None:
        """Write files of a repository (`models/owner/name`), by their paths in it."""
        for name, content in contents.items():
            path = self.root / repository / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    def commit(self, kind: str, name: str) -> str | None:
        """The commit of `main`; None where there is no such repository."""
        folder = self.root / kind / name
        if not folder.is_dir():
            return None
        held = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        listed = [(path, hashlib.sha256(content).hexdigest()) for path, content in sorted(held.items())]
        commit = hashlib.sha1(json.dumps(listed).encode(), usedforsecurity=False).hexdigest()
        self.commits.setdefault((kind, name), {})[commit] = held
        return commit

    def find(self, kind: str, name: str, revision: str) -> tuple[str, dict[str, bytes]] | str:
        """A commit with its files, or the code of the error."""
        newest = self.commit(kind, name)
        if newest is None:
            return "RepoNotFound"
        commit = newest if revision == "main" else revision
        held = self.commits[kind, name].get(commit)
        return "RevisionNotFound" if held is None else (commit, held)


@contextlib.contextmanager
def serve(root: Path) -> Iterator[Hub]:
    """Serve a folder for as long as the context is open."""
    hub = Hub(root)

    class Handler(BaseHTTPRequestHandler):
        """Answers for this hub."""

        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            _answer(hub, self, is_head=True)

        def do_GET(self) -> None:
            _answer(hub, self, is_head=False)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()


def _answer(hub: Hub, handler: BaseHTTPRequestHandler, *, is_head: bool) -> None:
    path = urlsplit(handler.path).path
    if found := API.fullmatch(path):
        kind, name, what, revision = found.groups()
        _listing(hub, handler, kind, unquote(name), what, unquote(revision or "main"))
    elif found := FILE.fullmatch(path):
        kind = "datasets" if found[1] else "models"
        _file(hub, handler, (kind, unquote(found[2]), unquote(found[3]), unquote(found[4])), is_head=is_head)
    else:
        _send(handler, 404, b"", {})


def _listing(hub: Hub, handler: BaseHTTPRequestHandler, kind: str, name: str, what: str, revision: str) -> None:
    found = hub.find(kind, name, revision)
    if isinstance(found, str):
        _refuse(handler, found)
        return
    commit, held = found
    told: object = {"id": name, "sha": commit}
    if what == "tree":
        told = [_listed(hub, path, content) for path, content in {**held, **hub.outside}.items()]
    _send(handler, 200, json.dumps(told).encode(), {"Content-Type": "application/json"})


def _is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".parquet", ".bin"))


def _listed(hub: Hub, path: str, content: bytes) -> dict[str, object]:
    size, blob = hub.sizes.get(path, len(content)), b"blob %d\0" % len(content) + content
    listed = {"type": "file", "path": path, "size": size, "oid": hashlib.sha1(blob, usedforsecurity=False).hexdigest()}
    large = {"oid": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 134}
    return {**listed, "lfs": large} if _is_large(path) else listed


def _file(hub: Hub, handler: BaseHTTPRequestHandler, of: tuple[str, str, str, str], *, is_head: bool) -> None:
    kind, name, revision, path = of
    found = hub.find(kind, name, revision)
    if isinstance(found, str):
        _refuse(handler, found)
        return
    if name in hub.gated and handler.headers.get("Authorization") != f"Bearer {TOKEN}":
        _refuse(handler, "GatedRepo")
        return
    commit, held = found
    if path not in held:
        _refuse(handler, "EntryNotFound")
        return
    content = held[path]
    digest = hashlib.sha256(content) if _is_large(path) else hashlib.sha1(content, usedforsecurity=False)
    headers = {"ETag": f'"{digest.hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
    if is_head:
        _send(handler, 200, b"", {**headers, "Content-Length": str(len(content))})
        return
    hub.asked.append(f"{name}/{path}")
    _transfer(hub, handler, path, content, headers)


def _transfer(hub: Hub, handler: BaseHTTPRequestHandler, path: str, content: bytes, headers: dict[str, str]) -> None:
    """Send a file, with what is planted for it."""
    if path in hub.short:
        _send(handler, 200, content[:-1], headers)
    elif hub.flipped.get(path, 0):
        hub.flipped[path] -= 1
        _send(handler, 200, bytes([content[0] ^ 1]) + content[1:], headers)
    elif path in hub.cut | hub.slow:
        _send(handler, 200, content[: len(content) // 2], {**headers, "Content-Length": str(len(content))})
        if path in hub.slow:
            hub.released.wait(60)
        hub.cut.discard(path)
        handler.close_connection = True
    elif asked := re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", "")):
        start = int(asked[1])
        where = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        _send(handler, 206, content[start:], {**headers, **where})
    else:
        _send(handler, 200, content, headers)


def _refuse(handler: BaseHTTPRequestHandler, code: str) -> None:
    _send(handler, 403 if code == "GatedRepo" else 404, b"", {"X-Error-Code": code})


def _send(handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)

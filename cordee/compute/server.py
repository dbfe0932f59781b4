"""vLLM's OpenAI-compatible server on loopback, for a model and adapters on it.

It is announced once it is proven: each model's log-probabilities are the folder's, and a chat is rendered as
`cordee chat` renders it.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from cordee import files, model_folder
from cordee.chat.templates import Template
from cordee.compute import adapter, engine, probe, serving
from cordee.compute.talk import encode
from cordee.compute.tokenizer import open_tokenizer
from cordee.errors import Fault, UserError
from cordee.machine import die_with_parent

HOST = "127.0.0.1"
MODULE = "vllm.entrypoints.launchers.api_server.entry"
"""What the command `vllm serve` runs; that command itself does not know vLLM's build for CPUs."""
STOP_S = 30.0
"""How long the server may take to stop."""
QUESTION = [{"role": "user", "content": probe.TEXT}]
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_ERROR = re.compile(r"\b((?:\w+\.)*\w*(?:Error|Exception): .+)")


def models(name: str, folder: Path, adapters: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    """The folders that are served, by name: a model and adapters on it; first the base, where `folder` is an adapter.

    Raises:
        UserError: one is no model, or an adapter of another base, or reads texts or chats otherwise than `folder`;
            or a name is given twice.
        Fault: one is damaged.
    """
    base = model_folder.served_base(folder, "MODEL")
    model_folder.require_served(folder, "MODEL")
    found = [(name, folder)] if base == folder else [(base.resolve().name, base), (name, folder)]
    for other, place in adapters:
        model_folder.require_adapter(place, base, "--adapter")
        found.append((other, adapter.placed_on(place, base)))
        if _reads(found[-1][1]) != _reads(folder):
            problem = f"reads texts or chats otherwise than {name}, by a tokenizer or a chat template of its own"
            raise UserError(problem, file=place, key="--adapter", hint=f"serve it by itself: cordee serve {place}")
    names = [known for known, _ in found]
    if twice := [known for known in names if names.count(known) > 1]:
        raise UserError(f"two models would be served as {twice[0]!r}", key="--adapter", hint="choose another NAME")
    return dict(found)


def _reads(folder: Path) -> tuple[str, list[int] | None]:
    """What a folder's tokenizer and chat template do: equal for folders that can be served together."""
    place = model_folder.tokenizer_of(folder)
    return serving.tokens_of(place), _chat(open_tokenizer(place))


def _chat(tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """The token ids of a question in the chat template; None where there is none."""
    return encode(Template(tokenizer), QUESTION) if tokenizer.chat_template else None


def run(
    name: str,
    folder: Path,
    adapters: Iterable[tuple[str, Path]],
    *,
    port: int,
    max_length: int | None,
    dtype: engine.Dtype | None,
    say: Callable[[str], Any],
) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        name: of the model.
        folder: the model, or an adapter, whose tokenizer and chat template are used.
        adapters: further adapters on the same base, with their names.
        port: on the loopback address.
        max_length: of a request, in tokens; all positions of the model if None.
        dtype: computed in; the stored one if None.
        say: prints a line.

    Raises:
        UserError: vLLM is not installed or does not serve one of them, or the port is in use.
        Fault: the server ended, or it serves something else than these folders.
    """
    served = models(name, folder, adapters)
    stored = serving.stored_dtype(next(iter(served.values())))
    settings = engine.Settings(
        "vllm", max_length, dtype or stored, enforce_eager=not torch.cuda.is_available(), draws=True
    )
    serving.require_served(served, settings)
    _require_free(port)
    known = engine.probes(served.values())
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="cordee-serve-") as place:
        log, began, url = Path(place) / "vllm.log", time.monotonic(), f"http://{HOST}:{port}"
        say("vLLM starts …")
        command = _command(folder, served, port, settings, place)
        with contextlib.suppress(KeyboardInterrupt), _started(command, log) as child:
            _wait(child, url, log)
            _require_proven(url, folder, served, settings, known)
            say(_ready(url, folder, served, time.monotonic() - began))
            code = child.wait()
            raise Fault(f"vLLM's server ended with code {code}: {_last(log)}")
    say("stopped")


def _require_free(port: int) -> None:
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            tried.bind((HOST, port))
        except OSError as error:
            problem = f"{HOST}:{port} can't be used: {(error.strerror or str(error)).lower()}"
            raise UserError(problem, key="--port", hint="choose another one") from error


def _command(folder: Path, served: Mapping[str, Path], port: int, settings: engine.Settings, place: str) -> list[str]:
    """The argument vector of the server; `place` is a folder for its generation config."""
    (name, base), *adapters = served.items()
    stops = dict.fromkeys(stop for one in served.values() for stop in adapter.stop_token_ids(one))
    own = base / "generation_config.json"
    fields = files.read_json(own) if own.is_file() else {}
    files.write_json(Path(place) / own.name, fields | {"eos_token_id": list(stops)})
    arguments = settings.for_vllm(folder) | serving.for_adapters([path for _, path in adapters])
    arguments |= {
        "model": str(base.resolve()), "served_model_name": name, "host": HOST, "port": port,
        "generation_config": place, "uvicorn_log_level": "warning", "allowed_origins": "[]",
    }  # fmt: skip
    words = [sys.executable, "-m", MODULE]
    for key, value in arguments.items():
        option = f"--{key.replace('_', '-')}"
        if isinstance(value, list):
            words += [option, *value]
        elif key == "enable_chunked_prefill":  # the only one that is on by default
            words += [option] if value else [f"--no-{option.removeprefix('--')}"]
        else:
            words += [option] * value if isinstance(value, bool) else [option, str(value)]
    if adapters:
        modules = [json.dumps({"name": one, "path": str(path.resolve())}) for one, path in adapters]
        words += ["--max-loras", str(len(adapters)), "--lora-modules", *modules]
    return words


@contextlib.contextmanager
def _started(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The server, which is stopped at the end."""
    engine.prepare()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    del environment["VLLM_ALLOW_INSECURE_SERIALIZATION"]  # for checks within vLLM, which a server is not asked for
    with log.open("wb") as out:
        child = subprocess.Popen(  # noqa: S603 - the argument vector is our own
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
            # not killed: it has to end vLLM's other processes
            preexec_fn=partial(die_with_parent, signal.SIGTERM),  # noqa: PLW1509 - one system call, which waits for none
        )  # fmt: skip
    try:
        yield child
    finally:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(STOP_S)
        with contextlib.suppress(ProcessLookupError):  # all of them have ended
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _wait(child: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Wait until the server answers.

    Raises:
        Fault: it ended before.
    """
    while child.poll() is None:
        with contextlib.suppress(OSError), _DIRECT.open(f"{url}/health", timeout=5):
            return
        time.sleep(0.2)
    raise Fault(f"vLLM's server did not start: {_last(log)}")


def _last(log: Path) -> str:
    """The first error that a log names, or else its last line."""
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    found = _ERROR.search(text)
    return (found[1] if found else text.rpartition("\n")[2])[:400]


def _require_proven(
    url: str,
    folder: Path,
    served: Mapping[str, Path],
    settings: engine.Settings,
    known: Mapping[Path, probe.Probe],
) -> None:
    """Compare what the server says with what transformers says of each folder, and how it renders a chat.

    Raises:
        Fault: they differ.
    """
    base, largest = next(iter(served.values())), probe.limit(settings.dtype, is_eager=settings.enforce_eager)
    own = {}
    for name, place in served.items():
        ids = known[place].ids[: engine.longest_request(folder, settings.max_length) - 1]
        own[place] = _logprobs(url, name, ids)
        probe.require_own(own[place], place, known, largest)
        if place != base:
            probe.require_used(own[place], own[base], place, base, known)
    expected = _chat(open_tokenizer(model_folder.tokenizer_of(folder)))
    if expected is None:
        return
    said = _ask(f"{url}/tokenize", {"messages": QUESTION})["tokens"]
    if said != expected:
        raise Fault(f"vLLM's server renders a chat as {said[:12]}, and its template as {expected[:12]}", file=folder)


def _logprobs(url: str, name: str, ids: list[int]) -> torch.Tensor:
    """What the server says of each token but the first `[seq - 1]`, in nats."""
    body = {"model": name, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    said = _ask(f"{url}/v1/completions", body)["choices"][0]["prompt_logprobs"][1:]
    return torch.tensor([held[str(token)]["logprob"] for held, token in zip(said, ids[1:], strict=True)])


def _ask(url: str, body: Mapping[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})  # noqa: S310 - loopback
    try:
        with _DIRECT.open(request) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")
        raise Fault(f"vLLM's server refuses a request: {said[:300]}", file=url) from error


def _ready(url: str, folder: Path, served: Mapping[str, Path], seconds: float) -> str:
    """The line that says that it serves."""
    (name,) = (name for name, place in served.items() if place == folder)
    is_chat = open_tokenizer(model_folder.tokenizer_of(folder)).chat_template
    path = "chat/completions" if is_chat else "completions"
    body = {"model": name, **({"messages": [{"role": "user", "content": "Hello"}]} if is_chat else {"prompt": "Hello"})}
    words = ["curl", "-s", f"{url}/v1/{path}", "-H", "Content-Type: application/json", "-d", json.dumps(body)]
    return (
        f"ready after {seconds:.0f} s: {url}/v1 serves {', '.join(served)}; Ctrl-C stops it; try: {shlex.join(words)}"
    )

"""`cordee serve` with the real server, which takes long to start, and the `openai` client."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from cordee.compute import engine, generators, server, serving, talk
from cordee.errors import Fault, UserError

pytest.importorskip("vllm", reason="vLLM is not installed on this platform")
openai = pytest.importorskip("openai")
COMMAND = [sys.executable, "-P", "-c", "from cordee.cli import main; main()", "serve"]
TURN = {"role": "user", "content": "Alle Menschen sind frei."}
TOKENS = 12


@dataclass
class Server:
    """A running `cordee serve`."""

    process: subprocess.Popen[str]
    port: int
    ready: str

    @property
    def client(self):
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none")


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def running(checkpoints, adapters, tmp_path_factory):
    port = free_port()
    named = [word for name in ("small", "large") for word in ("--adapter", f"{name}={adapters[name]}")]
    command = [*COMMAND, str(checkpoints["first"]), *named, "--port", str(port), "--max-length", "256"]
    errors = (tmp_path_factory.mktemp("serve") / "errors").open("w+")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    lines = [process.stdout.readline() for _ in range(2)]
    errors.seek(0)
    assert "ready" in lines[1], errors.read()
    yield Server(process, port, lines[1])
    process.kill()
    process.wait()


def greedy(folder, turns):
    chat = talk.Chat(generators.Transformers(folder, generators.Settings(TOKENS, temperature=0.0)))
    return ["".join(chat.answer(turn)) for turn in turns]


def shown(answer):
    """As vLLM shows it: nothing of a letter whose last bytes were not generated."""
    return answer.rstrip("\ufffd")


@pytest.mark.long
def test_it_says_what_it_serves_and_its_example_works(running):
    assert f"http://127.0.0.1:{running.port}/v1 serves first, small, large; Ctrl-C stops it" in running.ready
    assert [model.id for model in running.client.models.list()] == ["first", "small", "large"]
    example = running.ready.partition("try: ")[2]
    done = subprocess.run(example, shell=True, capture_output=True, text=True, check=True)  # noqa: S602 - our own line
    assert json.loads(done.stdout)["choices"][0]["message"]["role"] == "assistant"


def listening(pid: int) -> set[tuple[str, int]]:
    """The addresses, in hexadecimal, and ports at which a process and those below it listen."""
    below, found = [pid], set()
    for one in below:
        for children in Path(f"/proc/{one}/task").glob("*/children"):
            below += map(int, children.read_text().split())
    links = [link.readlink().name for one in below for link in Path(f"/proc/{one}/fd").iterdir() if link.is_symlink()]
    for line in (Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()).splitlines():
        fields = line.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in links:
            address, _, port = fields[1].partition(":")
            found.add((address, int(port, 16)))
    return found


@pytest.mark.long
def test_it_listens_on_loopback_only(running):
    """But for the store of torch.distributed in vLLM's own process, which torch lets listen everywhere."""
    found = listening(running.process.pid)
    assert {address for address, port in found if port == running.port} == {"0100007F"}
    elsewhere = [address for address, _ in found if address not in ("0100007F", f"{'0' * 24}01000000")]
    assert len(elsewhere) <= 1


@pytest.mark.long
@pytest.mark.parametrize("name", ["first", "small", "large"])
def test_a_chat_is_answered_as_cordee_chat_answers_it(name, running, checkpoints, adapters):
    folder = checkpoints["first"] if name == "first" else adapters[name]
    turns = [TURN["content"], "Tous les hommes"]
    expected, messages = greedy(folder, turns), []
    for turn, answer in zip(turns, expected, strict=True):
        messages.append({"role": "user", "content": turn})
        asked = {"model": name, "messages": messages, "temperature": 0, "max_tokens": TOKENS}
        whole = running.client.chat.completions.create(**asked)
        assert whole.choices[0].message.content == shown(answer)
        streamed = running.client.chat.completions.create(**asked, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == shown(answer)
        messages.append({"role": "assistant", "content": answer})


@pytest.mark.long
def test_a_text_is_completed(running, checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["first"], tmp_path / "untemplated")
    (folder / "chat_template.jinja").unlink()
    asked = {"model": "first", "prompt": "Alle Menschen", "temperature": 0, "max_tokens": TOKENS}
    assert running.client.completions.create(**asked).choices[0].text == shown(greedy(folder, ["Alle Menschen"])[0])


@pytest.mark.long
def test_an_answer_ends_at_the_end_of_a_turn(running, checkpoints):
    from cordee.compute import adapter

    for end in adapter.stop_token_ids(checkpoints["first"]):
        asked = {"model": "small", "messages": [TURN], "max_tokens": 9, "logit_bias": {str(end): 100}}
        answer = running.client.chat.completions.create(**asked)
        assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("stop", 1)
        assert not answer.choices[0].message.content


@pytest.mark.long
def test_it_listens_on_loopback_alone(running):
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    rows += [line.split() for line in Path("/proc/net/tcp6").read_text().splitlines()[1:]]
    listening = [row[1] for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == running.port]
    assert listening == [f"0100007F:{running.port:04X}"]


@pytest.fixture
def proven(running, checkpoints, adapters):
    """Proves what the server serves by the names of other folders."""
    settings = engine.Settings("vllm", 256, "float32", enforce_eager=True)

    def call(folder=checkpoints["first"], **served):
        whole = {"first": checkpoints["first"], "small": adapters["small"], **served}
        known = engine.probes([*whole.values(), *checkpoints.values(), *adapters.values()])
        server._require_proven(f"http://127.0.0.1:{running.port}", folder, whole, settings, known)

    call()
    return call


@pytest.mark.long
def test_other_weights_than_the_folders_are_a_fault(proven, checkpoints, adapters):
    with pytest.raises(Fault, match=r"second: vLLM's log-probabilities differ by up to .* it holds other weights"):
        proven(first=checkpoints["second"])
    with pytest.raises(Fault, match="large: vLLM's log-probabilities"):
        proven(small=adapters["large"])
    with pytest.raises(Fault, match=r"refuses a request: .*does not exist"):
        proven(absent=checkpoints["first"])


@pytest.mark.long
def test_another_chat_template_is_a_fault(proven, checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["first"], tmp_path / "other")
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + "Menschen")
    with pytest.raises(Fault, match="renders a chat as"):
        proven(folder)


def test_a_server_that_does_not_start_is_a_fault_with_its_first_error(tmp_path):
    code = "print('(EngineCore pid=7) ERROR 01-01 ValueError: no such kernel'); raise RuntimeError('see above')"
    log = tmp_path / "log"
    problem = pytest.raises(Fault, match="did not start: ValueError: no such kernel")
    with server._started([sys.executable, "-c", code], log) as child, problem:
        server._wait(child, "http://127.0.0.1:9", log)


@pytest.mark.long
def test_what_can_not_be_served_is_one_line(checkpoints, running, cordee, monkeypatch):
    given = {"port": running.port, "max_length": 64, "dtype": None, "say": print}
    in_use = f"--port: 127.0.0.1:{running.port} can't be used: address already in use; choose another one"
    with pytest.raises(UserError, match=re.escape(in_use)):
        server.run("first", checkpoints["first"], [], **given)
    with pytest.raises(UserError, match=r"max_length: 4096 tokens were asked for, and .* has 512 positions"):
        server.run("first", checkpoints["first"], [], **{**given, "max_length": 4096})
    done = cordee("serve", str(checkpoints["first"]), "--adapter", "small")
    assert (done.returncode, done.stderr) == (2, "cordee: --adapter: 'small' names no adapter; write NAME=FOLDER\n")
    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UserError, match="vLLM is not installed"):
        server.run("first", checkpoints["first"], [], **given)


def test_models_that_can_not_be_served_together_are_one_line(checkpoints, adapters, tmp_path):
    first, small = checkpoints["first"], adapters["small"]
    with pytest.raises(UserError, match="two models would be served as 'first'"):
        server.models("first", first, [("first", small)])
    with pytest.raises(UserError, match="two models would be served as 'first'"):
        server.models("first", small, [])
    with pytest.raises(UserError, match=r"--adapter: is a model, not an adapter"):
        server.models("first", first, [("second", checkpoints["second"])])
    other = shutil.copytree(small, tmp_path / "other")
    record = {"files": {"model.safetensors": "0" * 64}}
    (other / "base_model.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"was trained on other weights than those of .*first"):
        server.models("first", first, [("other", other)])
    told = shutil.copytree(small, tmp_path / "told")
    for path in first.glob("*token*"):
        shutil.copy(path, told)
    shutil.copy(first / "chat_template.jinja", told)
    assert list(server.models("first", first, [("told", told)])) == ["first", "told"]
    (told / "chat_template.jinja").write_text((first / "chat_template.jinja").read_text() + "Menschen")
    with pytest.raises(UserError, match=r"reads texts or chats otherwise than first.* cordee serve "):
        server.models("first", first, [("told", told)])


def group(leader):
    """The processes of a server: those that it and its children started."""
    found = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout.splitlines()[
        1:
    ]
    parents = {int(pid): int(parent) for pid, parent in map(str.split, found)}
    known = {leader}
    while more := {pid for pid, parent in parents.items() if parent in known} - known:
        known |= more
    return known - {leader}


def alive(pids):
    """Those that run; one that has ended may wait for its parent as a zombie."""
    found = {pid: Path(f"/proc/{pid}/stat") for pid in pids}
    return [
        pid for pid, stat in found.items() if stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
    ]


@pytest.mark.long
def test_ctrl_c_stops_it_and_nothing_is_left(running):
    """The last test: it ends the server."""
    started = group(running.process.pid)
    assert len(started) >= 2
    running.process.send_signal(signal.SIGINT)
    assert running.process.wait(60) == 0
    assert running.process.stdout.read() == "stopped\n"
    assert alive(started) == []
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind(("127.0.0.1", running.port))


@pytest.mark.long
def test_a_killed_command_leaves_no_server(checkpoints):
    process = subprocess.Popen(
        [*COMMAND, str(checkpoints["first"]), "--port", str(free_port())], stdout=subprocess.PIPE, text=True
    )
    assert "vLLM starts" in process.stdout.readline()
    assert re.match("ready", process.stdout.readline())
    started = group(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 60
    while alive(started) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert alive(started) == []

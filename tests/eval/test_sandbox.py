"""A program that a model wrote computes and nothing else: each fault is planted, fails, and leaves nothing behind."""

import math
import os
import signal
import socket
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path

import evaluate
import pytest

from cordee import sandbox
from cordee.errors import UserError
from eval.measuring import code_eval

RIGHT = """
import collections, datetime, functools, hashlib, heapq, itertools, math, random, re, string, time, typing

def total(numbers):
    random.seed(len(numbers)), time.sleep(0.01), hashlib.sha256(b"x").hexdigest(), datetime.datetime.now()
    print(numbers)
    return sum(numbers)
"""
TEST = "assert total([1, 2, 3]) == 6"
FAULTS = {
    "wrong": "def total(numbers): return 7",
    "no Python": "def total(numbers) return 6",
    "a zero byte": "\0",
    "half of a surrogate pair": "x = '\ud800'",
    "TCP": "import socket; socket.socket(socket.AF_INET, socket.SOCK_STREAM)",
    "UDP": "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "UNIX": "import socket; socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)",
    "pair of sockets": "import socket; socket.socketpair()",
    "call of the server": "import socket; socket.create_connection(('127.0.0.1', {port}), timeout=1)",
    "write": "open('{outside}/written', 'w')",
    "write here": "open('written', 'w')",
    "write over": "import os; os.open('{outside}/kept', os.O_WRONLY)",
    "truncate": "import os; os.open('{outside}/kept', os.O_RDONLY | os.O_TRUNC)",
    "append": "open('{outside}/kept', 'a')",
    "delete": "import os; os.remove('{outside}/kept')",
    "rename": "import os; os.rename('{outside}/kept', '{outside}/other')",
    "link": "import os; os.symlink('{outside}/kept', '{outside}/other')",
    "folder": "import os; os.mkdir('{outside}/other')",
    "rights": "import os; os.chmod('{outside}/kept', 0)",
    "times": "import os; os.utime('{outside}/kept', (0, 0))",
    "read": "open('{outside}/kept').read()",
    "list": "import os; os.listdir('{outside}')",
    "environment": "import os; os.environ['CORDEE_SECRET']",
    "environment of the parent": "open('/proc/{parent}/environ', 'rb').read()",
    "memory of the parent": "import os; os.open('/proc/{parent}/mem', os.O_RDONLY)",
    "signal": "import os; os.kill({parent}, 0)",
    "fork": "import os; os.fork()",
    "grandchild": "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])",
    "shell": "import os; assert os.system('true') == 0",
    "execute": "import os; os.execv('/bin/true', ['true'])",
    "thread": "import threading; threading.Thread(target=print).start()",
    "limits": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "native code": "import ctypes; assert ctypes.CDLL(None).socket(2, 1, 0) >= 0",
    "io_uring": "import ctypes; assert ctypes.CDLL(None).syscall(425, 1, ctypes.create_string_buffer(120)) >= 0",
    "shared memory": "import ctypes; assert ctypes.CDLL(None).shmget(7, 4096, 0o1600) >= 0",
    "memory": "bytearray(100 << 30)",
    "memory in small pieces": "import mmap\nx = []\nwhile True: x.append(mmap.mmap(-1, 1 << 26))",
    "recursion": "def f(): return f()\nf()",
    "crash": "import ctypes; ctypes.string_at(0)",
    "exit": "import sys; sys.exit(0)",
    "exit at once": "import os; os._exit(0)",
    "interrupt": "raise KeyboardInterrupt",
    "other exception": "class Own(BaseException): pass\nraise Own",
    "builtins": "import builtins; builtins.BaseException = builtins.AssertionError = int; assert False",
    "says passed": "import os\nfor fd in range(3, 20):\n    try: os.write(fd, b'passed' * 9)\n    except OSError: pass",
    "prints": "print('x' * (64 << 20)); assert False",
    "input": "input()",
}
SLOW = {
    "loop": "while True: pass",
    "sleep": "import time; time.sleep(60)",
    "signals ignored": "import signal\nfor n in (1, 2, 14, 15, 24): signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
    "writes for ever": "import os\nwhile True: os.write(1, b'x' * 4096)",
    "exception that does not end": "class Own(Exception):\n    def __str__(self):\n        while True: pass\nraise Own",
}
LACKING = """
from cordee import sandbox, sandboxed
from cordee.errors import Fault

def lacking(call, first=None):  # a kernel without a system call, or without this value of its first argument
    also = [] if first is None else [(0x20, 0, 0, 16), (0x15, 0, 1, first)]
    sandboxed._instructions = lambda *_: [
        (0x20, 0, 0, 0), (0x15, 0, len(also) + 1, call), *also, (0x06, 0, 0, 0x50000 | 38), (0x06, 0, 0, 0x7FFF0000)
    ]
    sandboxed._call("prctl", 38, 1, 0, 0, 0)
    sandboxed._filter_calls()

"""
SAID = """
try:
    hides_files = sandbox.check()
    print(sandbox.run("assert True", 10), hides_files)
except Fault as error:
    print(error)
"""


@pytest.fixture
def outside(tmp_path):
    """A folder with a file, which must stay as it is."""
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "kept").chmod(0o600)
    return tmp_path


def left() -> list[int]:
    """Processes of programs that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if str(sandbox.SCRIPT).encode() in words or b"import time; time.sleep(60)" in words:
            found.append(int(path.parent.name))
    return found


def test_a_right_program_passes_with_the_packages_that_are_installed(monkeypatch):
    monkeypatch.setenv("CORDEE_SECRET", "secret")
    assert sandbox.run(f"import numpy, pandas\n{RIGHT}\n{TEST}", 10) == "passed"
    assert sandbox.run("import os; assert os.listdir() == [] and set(os.environ) <= {'OMP_NUM_THREADS', 'LC_CTYPE',"
                       "'PYTHONHASHSEED', 'LD_LIBRARY_PATH'}", 10) == "passed"  # fmt: skip
    assert left() == []


def test_sets_have_the_same_order_each_time():
    program = "assert list({'a', 'b', 'c', 'd', 'e', 'f'})[0] == %r"
    found = [letter for letter in "abcdef" if sandbox.run(program % letter, 10) == "passed"]
    assert len(found) == 1


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_no_right_program_fails_and_leaves_nothing(name, outside, monkeypatch):
    monkeypatch.setenv("CORDEE_SECRET", "secret")
    before = (outside / "kept").stat()
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = FAULTS[name]
        if "{" in program:
            program = program.format(outside=outside, port=server.getsockname()[1], parent=os.getpid())
        assert sandbox.run(f"{RIGHT}\n{program}\n{TEST}", 10) == "failed", "what follows the fault would pass"
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert (outside / "kept").stat() == before
    assert [path.name for path in outside.iterdir()] == ["kept"]
    assert left() == []


@pytest.mark.parametrize("name", SLOW)
def test_what_does_not_end_is_ended(name):
    began = time.monotonic()
    assert sandbox.run(SLOW[name], 0.5) == "timed out"
    assert time.monotonic() - began < 5
    assert left() == []


def test_a_program_ends_with_the_process_that_started_it(tmp_path):
    code = "from cordee import sandbox; sandbox.run('import time; time.sleep(60)', 60)"
    with subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}) as parent:
        deadline = time.monotonic() + 20
        while not left() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(left()) == 1
        parent.send_signal(signal.SIGKILL)
    while left() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left() == []


@pytest.mark.parametrize(
    ("lacks", "says"),
    [
        ("lacking(1000)", "passed True"),
        ("lacking(444)", "passed False"),
        ("lacking(157, 22)", "no sandbox for programs that models write: OSError: [Errno 38] prctl(22): Function not"),
        ("sandbox.sys.executable = '/bin/false'", "no sandbox for programs that models write: Python does not start"),
        ("sandbox.PROBE = 'import os; os.fork()'", "the sandbox for programs that models write does not hold: its"),
    ],
)
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the number of prctl is that of x86_64")
def test_what_a_kernel_lacks_is_said(lacks, says):
    done = subprocess.run([sys.executable, "-c", LACKING + lacks + SAID], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(says), done.stdout
    assert done.stdout.count("\n") == 1


def closed_form(outcomes, k):
    """The share of draws of k with a right one, by counting them."""
    draws = list(combinations(outcomes, k))
    return sum(any(draw) for draw in draws) / len(draws)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("right", range(8))
def test_pass_at_k_is_the_share_of_draws_with_a_right_candidate(right, k):
    outcomes = [True] * right + [False] * (7 - right)
    assert code_eval.pass_at_k(7, right, k) == pytest.approx(closed_form(outcomes, k), abs=1e-12)
    assert code_eval.pass_at_k(7, right, k) == pytest.approx(1 - math.comb(7 - right, k) / math.comb(7, k), abs=1e-12)


def test_the_metric_gives_what_that_of_evaluate_gives():
    add = ["def add(a, b): return a * b", "def add(a, b): return a + b", "import sys; sys.exit(0)"]
    means, results = code_eval.CodeEval().compute(
        references=["assert add(2, 3) == 5", "assert add(1, 1) == 2"], predictions=[add, add[1:]], k=[1, 2, 3]
    )
    assert means == {"pass@1": pytest.approx((1 / 3 + 1 / 2) / 2), "pass@2": pytest.approx((2 / 3 + 1) / 2)}
    assert [(number, one["passed"]) for number, one in results[0]] == [(0, False), (1, True), (2, False)]
    assert results[1][1] == (1, {"task_id": 1, "passed": False, "result": "failed", "completion_id": 1})


def test_only_this_metric_is_given_while_tasks_are_loaded_and_only_if_confirmed():
    original = evaluate.load
    with code_eval.offered(confirmed=True):
        assert isinstance(evaluate.load("code_eval"), code_eval.CodeEval)
        with pytest.raises(FileNotFoundError):
            evaluate.load("no_such_metric")
    assert evaluate.load is original
    with pytest.raises(UserError, match="`confirm_unsafe_code: true`"), code_eval.offered(confirmed=False):
        evaluate.load("code_eval")
    assert evaluate.load is original

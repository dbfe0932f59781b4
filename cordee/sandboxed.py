"""Runs one program, read from standard input, after giving up all that a computation does not need.

A script of its own, started by `sandbox.py` in a fresh interpreter: it imports the standard library only. What is given
up can't be taken back, neither by the program nor by native code that it loads, since the kernel refuses it.
"""

import ctypes
import os
import resource
import signal
import struct
import sys
from collections.abc import Iterable, Iterator

ALLOWED = {  # x86_64, aarch64
    "brk": (12, 214), "clock_getres": (229, 114), "clock_gettime": (228, 113), "clock_nanosleep": (230, 115),
    "close": (3, 57), "exit": (60, 93), "exit_group": (231, 94), "faccessat": (269, 48), "faccessat2": (439, 439),
    "fstat": (5, 80), "futex": (202, 98), "getcwd": (79, 17), "getdents64": (217, 61), "getegid": (108, 177),
    "geteuid": (107, 175), "getgid": (104, 176), "getitimer": (36, 102), "getpid": (39, 172), "getrandom": (318, 278),
    "getrusage": (98, 165), "gettid": (186, 178), "gettimeofday": (96, 169), "getuid": (102, 174), "lseek": (8, 62),
    "madvise": (28, 233), "mmap": (9, 222), "mprotect": (10, 226), "mremap": (25, 216), "munmap": (11, 215),
    "nanosleep": (35, 101), "newfstatat": (262, 79), "pipe2": (293, 59), "ppoll": (271, 73), "pread64": (17, 67),
    "pselect6": (270, 72), "read": (0, 63), "readlinkat": (267, 78), "readv": (19, 65), "restart_syscall": (219, 128),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "sched_getaffinity": (204, 123), "sched_yield": (24, 124), "setitimer": (38, 103), "sigaltstack": (131, 132),
    "statx": (332, 291), "sysinfo": (99, 179), "times": (100, 153), "uname": (63, 160), "write": (1, 64),
    "writev": (20, 66),
    "access": (21, None), "alarm": (37, None), "lstat": (6, None), "pipe": (22, None), "poll": (7, None),
    "readlink": (89, None), "select": (23, None), "stat": (4, None), "time": (201, None),
}  # fmt: skip
"""The system calls that a program may make, beside opening files to read. None of them reaches another process, the
network or a file's content on disk; the others answer as if the kernel did not have them."""
OPENS = {"openat": ((257, 56), 2), "open": ((2, None), 1)}
"""The system calls that open a file, each with the place of its flags."""
WRITES = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC
"""Flags of a file that is opened other than to read."""
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""By the kernel's name of a machine, its place in the tables and its number in a filter."""
READABLE = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/urandom", "/dev/zero")
"""What may be read beside Python and its packages, where the kernel has Landlock, which can hide the rest."""
LOAD, EQUALS, HAS_BITS, RETURN = 0x20, 0x15, 0x45, 0x06
"""Instructions of a filter (BPF)."""
KILL, ALLOW, REFUSE, ABSENT = 0x80000000, 0x7FFF0000, 0x00050000 | 13, 0x00050000 | 38
"""What a filter answers: the last two are the errors EACCES and ENOSYS."""
FILES = (1 << 13) - 1
"""All rights of Landlock's first version, which are on files and folders."""
READ_FILE, READ_FOLDER = 1 << 2, 1 << 3
libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Read a secret and a program from standard input; say `ready`, and the secret if the program ends by itself."""
    parent, memory, seconds, *packages = sys.argv[1:]
    secret, _, program = sys.stdin.buffer.read().partition(b"\n")
    sys.path += packages
    out, nothing = os.dup(1), os.open("/dev/null", os.O_RDWR)
    for stream in range(3):
        os.dup2(nothing, stream)
    try:
        _limit(int(parent), int(memory), int(seconds))
        hides = _hide_files((".", sys.base_prefix, *packages))
        _filter_calls()
    except Exception as error:  # noqa: BLE001 - is told to the other process, which raises it
        os.write(out, f"{type(error).__name__}: {error}".encode())
        return
    os.write(out, b"ready 1\n" if hides else b"ready 0\n")
    write, leave = os.write, os._exit
    exec(program.decode("utf-8", "surrogatepass"), {})  # noqa: S102 - what the sandbox is for
    write(out, secret)
    leave(0)


def _limit(parent: int, memory: int, seconds: int) -> None:
    """Gain no rights, end with the process that started this one; limit memory in bytes and the processor's seconds."""
    _call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    _call("prctl", 1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        raise ProcessLookupError("the process that started this one has ended")
    for name, limit in (("AS", memory), ("CPU", seconds), ("CORE", 0), ("FSIZE", 0), ("NOFILE", 64)):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))


def _hide_files(readable: Iterable[str]) -> bool:
    """Let only these folders and the system's libraries be read; False where the kernel has no Landlock."""
    if libc.syscall(444, None, 0, 1) < 1:
        return False
    rules = _call("syscall", 444, struct.pack("Q", FILES), 8, 0)
    for path in (*readable, *READABLE):
        if os.path.exists(path):  # noqa: PTH110 - pathlib takes as long to import as the interpreter to start
            place = os.open(path, os.O_PATH)
            rights = READ_FILE | READ_FOLDER if os.path.isdir(path) else READ_FILE  # noqa: PTH112 - as above
            _call("syscall", 445, rules, 1, struct.pack("=Qi", rights, place), 0)
            os.close(place)
    _call("syscall", 446, rules, 0)
    os.close(rules)
    return True


def _filter_calls() -> None:
    """Let the kernel refuse all system calls but those that are allowed."""
    name = os.uname().machine
    if name not in MACHINES:
        raise OSError(f"the numbers of the system calls of {name} are not known")
    program = list(_instructions(*MACHINES[name]))
    packed = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    held = ctypes.create_string_buffer(packed, len(packed))
    _call("prctl", 22, 2, struct.pack("HP", len(program), ctypes.addressof(held)))  # PR_SET_SECCOMP


def _instructions(place: int, machine: int) -> Iterator[tuple[int, int, int, int]]:
    """A filter's instructions: what is done, how many to skip if yes and if no, and with which number."""
    yield LOAD, 0, 0, 4  # the machine that a call is made for
    yield EQUALS, 1, 0, machine
    yield RETURN, 0, 0, KILL
    yield LOAD, 0, 0, 0  # the call's number
    for numbers in ALLOWED.values():
        if (number := numbers[place]) is not None:
            yield EQUALS, 0, 1, number
            yield RETURN, 0, 0, ALLOW
    for numbers, argument in OPENS.values():
        if (number := numbers[place]) is not None:
            yield EQUALS, 0, 4, number
            yield LOAD, 0, 0, 16 + 8 * argument
            yield HAS_BITS, 0, 1, WRITES
            yield RETURN, 0, 0, REFUSE
            yield RETURN, 0, 0, ALLOW
    yield RETURN, 0, 0, ABSENT


def _call(name: str, *arguments: object) -> int:
    """Call a function of the C library, each number as wide as a register."""
    wide = [ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments]
    done = int(getattr(libc, name)(*wide))
    if done < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}({arguments[0]}): {os.strerror(number)}")
    return done


if __name__ == "__main__":
    main()

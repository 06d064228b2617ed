"""The confined half of `sandbox.py`: limits itself, installs a seccomp filter, then runs one program.

Runs as a script of its own (`python -I -S sandbox_child.py FD`), with the standard library alone. It reads a request
from stdin, and writes one line to FD: the request's token and a word. "passed" is written only when the program came to
its end; the token says that the line is ours.

The filter is a list of the system calls that computing and importing need. All others fail with EPERM: sockets,
processes and threads, signals to others, and whatever creates, changes, renames or removes a file. `open` is let
through for reading only. A filter cannot be taken off again, and needs no privilege (no_new_privs).
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import json
import os
import platform
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

# Names with their numbers on x86_64 and aarch64; None where an architecture lacks the call.
ALLOWED: dict[str, tuple[int, int | None]] = {
    # files, reading only; `write` reaches the descriptors that we were given
    "read": (0, 63), "readv": (19, 65), "pread64": (17, 67), "write": (1, 64), "writev": (20, 66), "lseek": (8, 62),
    "close": (3, 57), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "stat": (4, None), "fstat": (5, 80),
    "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291), "access": (21, None), "faccessat": (269, 48),
    "faccessat2": (439, 439), "readlink": (89, None), "readlinkat": (267, 78), "getcwd": (79, 17),
    "getdents64": (217, 61), "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
    # memory
    "mmap": (9, 222), "munmap": (11, 215), "mremap": (25, 216), "mprotect": (10, 226), "madvise": (28, 233),
    "brk": (12, 214),
    # this thread, and signals to itself
    "futex": (202, 98), "set_robust_list": (273, 99), "set_tid_address": (218, 96), "rseq": (334, 293),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132),
    "setitimer": (38, 103), "getitimer": (36, 102), "alarm": (37, None), "pause": (34, None),
    "sched_yield": (24, 124), "exit": (60, 93), "exit_group": (231, 94), "restart_syscall": (219, 128),
    # who and when
    "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175),
    "getgid": (104, 176), "getegid": (108, 177), "uname": (63, 160), "sysinfo": (99, 179), "times": (100, 153),
    "time": (201, None), "gettimeofday": (96, 169), "getrusage": (98, 165), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "getrandom": (318, 278),
    "sched_getaffinity": (204, 123), "getcpu": (309, 168),
}  # fmt: skip

# Calls that are let through for some arguments only.
OPEN: dict[str, tuple[tuple[int, int | None], int]] = {"open": ((2, None), 1), "openat": ((257, 56), 2)}  # flags: where
FCNTL: tuple[int, int | None] = (72, 25)
IOCTL: tuple[int, int | None] = (16, 29)
PRLIMIT64: tuple[int, int | None] = (302, 261)
TGKILL: tuple[int, int | None] = (234, 131)

FCNTL_COMMANDS = (0, 1, 2, 3, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC
IOCTL_REQUESTS = (0x5401, 0x5413, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONCLEX, FIOCLEX: what opening a file asks
WRITING_FLAGS = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column in the tables, AUDIT_ARCH

_ALLOW, _KILL, _EPERM = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM
_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data; arguments are 8 bytes each
_X32 = 0x40000000

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 1, 22, 38, 2

Instruction = tuple[int, int, int, int]
"""Code, where to jump if true, where if false, and a constant."""


def build_filter(machine: str, *, pid: int) -> list[Instruction]:
    """The filter for a process `pid` on a machine as `platform.machine()` calls it. KeyError for an unknown one."""
    column, architecture = ARCHITECTURES[machine]
    program: list[Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_JUMP_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_JUMP_GREATER_EQUAL, 0, 1, _X32),
        (_RETURN, 0, 0, _KILL),
    ]
    for numbers in ALLOWED.values():
        program += _for_call(numbers[column], [(_RETURN, 0, 0, _ALLOW)])
    for numbers, flags in OPEN.values():
        program += _for_call(numbers[column], [
            *_argument(flags),
            (_JUMP_ANY_BIT, 0, 1, WRITING_FLAGS), (_RETURN, 0, 0, _EPERM), (_RETURN, 0, 0, _ALLOW),
        ])  # fmt: skip
    for numbers, allowed in ((FCNTL, FCNTL_COMMANDS), (IOCTL, IOCTL_REQUESTS)):
        program += _for_call(numbers[column], [*_argument(1), *_one_of(allowed)])
    # prlimit64(0, …, NULL, …) only reads our own limits; the pointer has two halves.
    program += _for_call(PRLIMIT64[column], [
        *_argument(0), (_JUMP_EQUAL, 1, 0, 0), (_RETURN, 0, 0, _EPERM),
        *_argument(2), (_JUMP_EQUAL, 1, 0, 0), (_RETURN, 0, 0, _EPERM),
        *_argument(2, half=1), (_JUMP_EQUAL, 1, 0, 0), (_RETURN, 0, 0, _EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ])  # fmt: skip
    program += _for_call(TGKILL[column], [*_argument(0), *_one_of((pid,))])  # abort() and raise()
    return [*program, (_RETURN, 0, 0, _EPERM)]


def _for_call(number: int | None, block: list[Instruction]) -> list[Instruction]:
    """`block`, which returns, for the system call `number`; others go on behind it. The number is loaded before."""
    if number is None:
        return []
    return [(_JUMP_EQUAL, 0, len(block), number), *block]


def _argument(index: int, *, half: int = 0) -> list[Instruction]:
    """Load the lower (or upper) 32 bits of an argument. Both architectures are little-endian."""
    return [(_LOAD, 0, 0, _ARGUMENTS + 8 * index + 4 * half)]


def _one_of(values: tuple[int, ...]) -> list[Instruction]:
    block: list[Instruction] = []
    for value in values:
        block += [(_JUMP_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW)]
    return [*block, (_RETURN, 0, 0, _EPERM)]


def confine() -> None:
    """Install the filter on this process, and see that it works. OSError or KeyError where that cannot be."""
    instructions = build_filter(platform.machine(), pid=os.getpid())
    packed = b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)
    buffer = ctypes.create_string_buffer(packed, len(packed))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))

    program = Program(len(instructions), ctypes.cast(buffer, ctypes.c_void_p))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(program))
    attempts: dict[str, Callable[[], object]] = {
        "open a socket": socket.socket,
        "write a file": lambda: os.open("/dev/null", os.O_WRONLY),
        "remove a file": lambda: os.remove("/nonexistent/prefillshare"),
        "signal another process": lambda: os.kill(os.getppid(), 0),
        "start a process": os.fork,
    }
    for what, attempt in attempts.items():
        try:
            done = attempt()
        except PermissionError:
            continue
        if what == "start a process" and done == 0:
            os._exit(0)
        raise OSError(errno.ENOTSUP, f"the filter is installed, and the process could still {what}")


def _prctl(option: int, value: int, argument: int = 0) -> None:
    call: Any = ctypes.CDLL(None, use_errno=True).prctl
    call.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    if call(option, value, argument, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl {option}: {os.strerror(number)}")


def limit(cpu_s: int, memory_bytes: int) -> None:
    """Limits that hold for all that this process still does."""
    for kind, value in (
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_DATA, memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(kind, (value, value))


def main() -> None:
    channel = int(sys.argv[1])
    request = json.loads(sys.stdin.buffer.read())
    token, program = request["token"], request["program"]

    def tell(word: str) -> None:
        os.write(channel, f"{token} {word}\n".encode())
        os._exit(0)

    try:
        os.close(0)
        os.open("/dev/null", os.O_RDONLY)  # becomes 0, the lowest that is free
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        limit(request["cpu_s"], request["memory_bytes"])
        confine()
    except (KeyError, OSError, ValueError) as error:
        tell(f"refused {type(error).__name__}: {error}")
    sys.argv = [""]
    sys.path += request["path"]
    # Names of Python's own and no text: what the program has read must not get out in its errors.
    names = {kind: kind.__name__ for kind in vars(builtins).values() if isinstance(kind, type)}
    try:
        exec(compile(program, "<answer>", "exec"), {})
    except BaseException as error:
        tell(f"raised {next(names[kind] for kind in type(error).__mro__ if kind in names)}")
    tell("passed")


if __name__ == "__main__":
    main()

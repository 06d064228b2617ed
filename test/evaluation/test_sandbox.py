"""`evaluation/sandbox.py`: hostile programs can do nothing but compute, and cannot pass by ending early."""

from __future__ import annotations

import os
import re
import runpy
import signal
from pathlib import Path

import psutil
import pytest

from sglang_prefillshare.errors import SandboxError
from sglang_prefillshare.evaluation import sandbox, sandbox_child
from sglang_prefillshare.evaluation.sandbox import Limits, check_sandbox, run_python
from sglang_prefillshare.evaluation.sandbox_child import ALLOWED, build_filter

SHORT = Limits(cpu_s=1, wall_s=8.0)
DENIED = "raised:PermissionError"


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file in a folder, which must both be as they were in the end."""
    (tmp_path / "folder").mkdir()
    file = tmp_path / "folder" / "file"
    file.write_text("precious")
    return file


def test_a_program_that_ends_passes() -> None:
    check_sandbox()
    assert run_python("x = sum(range(10))\nassert x == 45").is_right


def test_what_programs_import_works() -> None:
    program = """
import bisect, collections, copy, datetime, decimal, fractions, functools, hashlib, heapq, itertools, json, math
import operator, random, re, statistics, string, typing
datetime.datetime.strptime("2020", "%Y"), "a".encode("utf-16"), hashlib.md5(b"a").hexdigest(), random.random()
print("hello"); print(open(math.__spec__.origin if math.__spec__.has_location else json.__file__, "rb").read(10))
import numpy
assert numpy.linalg.inv(numpy.eye(3) * 2)[0, 0] == 0.5
"""
    assert run_python(program).is_right


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("assert 1 == 2", "raised:AssertionError"),
        ("def f(:", "raised:SyntaxError"),
        ("class Mine(ValueError): pass\nraise Mine", "raised:ValueError"),
        ("class Mine(BaseException): pass\nraise Mine", "raised:BaseException"),
        ("input()", "raised:EOFError"),
        ("exit(0)", "raised:NameError"),
        ("import sys; sys.exit(0)", "raised:SystemExit"),
        ("import os; os._exit(0)", "ended_early"),
        ("import os\nos.write(1, b'passed'); os._exit(0)", "ended_early"),
        ("import os\nfor fd in range(3, 20):\n  try: os.write(fd, b'0123456789abcdef passed\\n')\n"
         "  except OSError: pass\nos._exit(0)", "ended_early"),
        ("import os\nfor fd in range(3, 20):\n  try: os.write(fd, b'x refused it\\n')\n"
         "  except OSError: pass\nos._exit(0)", "ended_early"),
        ("import atexit, os\natexit.register(os._exit, 0)\nassert False", "raised:AssertionError"),
        ("def f(n): return f(n + 1) + 1\nf(0)", "raised:RecursionError"),
        ("import ctypes; ctypes.string_at(0)", "killed:SIGSEGV"),
        ("import os; os.abort()", "killed:SIGABRT"),
    ],
)  # fmt: skip
def test_a_program_that_fails_or_ends_early_does_not_pass(program: str, error: str) -> None:
    verdict = run_python(program, SHORT)
    assert (verdict.is_right, verdict.error, verdict.why) == (False, error, None)


@pytest.mark.parametrize(
    "program",
    [
        "import socket; socket.create_connection(('127.0.0.1', 1))",
        "import socket; socket.socketpair()",
        "import urllib.request; urllib.request.URLopener",  # the import alone is no harm
        "import asyncio; asyncio.run(asyncio.sleep(0))",
        "import os; os.fork()",
        "import os\nwhile True: os.fork()",
        "import os; os.execv('/bin/true', ['true'])",
        "import subprocess; subprocess.run(['true'])",
        "import multiprocessing as m; p = m.get_context('fork').Process(target=print); p.start()",
        "import os; os.kill(os.getppid(), 15)",
        "import os; os.kill(-1, 0)",
        "import os; os.killpg(0, 0)",
        "import signal; signal.pidfd_send_signal(0, 15)",
        "import fcntl, os; fcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())",
        "import os; os.memfd_create('x')",
        "import os; os.mkfifo('fifo')",
        "import os; os.nice(5)",
        "import os; os.setsid()",
        "import os; os.sched_setaffinity(0, [0])",
        "import os, resource; resource.prlimit(os.getppid(), resource.RLIMIT_CPU)",
    ],
)
def test_nothing_but_computing_is_allowed(program: str) -> None:
    verdict = run_python(program, SHORT)
    allowed = "URLopener" in program
    assert verdict.is_right if allowed else verdict.error == DENIED, verdict


def test_threads_are_refused() -> None:
    assert run_python("import threading; threading.Thread(target=print).start()").error == "raised:RuntimeError"


@pytest.mark.parametrize(
    "program",
    [
        "os.remove(file)",
        "shutil.rmtree(folder)",
        "os.rmdir(folder)",
        "os.rename(file, file + '2')",
        "os.replace(file, file + '2')",
        "open(file, 'w')",
        "open(file, 'a')",
        "open(file, 'r+')",
        "os.open(file, os.O_RDONLY | os.O_TRUNC)",
        "os.open(file + '2', os.O_RDONLY | os.O_CREAT)",
        "os.truncate(file, 0)",
        "os.chmod(file, 0)",
        "os.utime(file)",
        "os.link(file, file + '2')",
        "os.symlink(file, file + '2')",
        "os.mkdir(folder + '/new')",
        "tempfile.TemporaryFile()",
        "open(folder + '/big', 'wb').write(b'x' * (1 << 30))",
    ],
)
def test_no_file_is_written_renamed_or_removed(program: str, victim: Path) -> None:
    before = victim.stat()
    names = f"import os, shutil, tempfile\nfile, folder = {str(victim)!r}, {str(victim.parent)!r}\n"
    error = run_python(names + program, SHORT).error
    assert error in (DENIED, "raised:FileNotFoundError"), error  # tempfile tries every folder, and finds none
    assert victim.read_text() == "precious" and [*victim.parent.iterdir()] == [victim]
    assert (victim.stat().st_mode, victim.stat().st_mtime_ns) == (before.st_mode, before.st_mtime_ns)


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
        "import signal\nfor n in range(1, 65):\n  try: signal.signal(n, signal.SIG_IGN)\n"
        "  except (OSError, ValueError): pass\nwhile True: pass",
        "while True: print('x' * 100_000)",
    ],
)
def test_computing_for_ever_ends(program: str) -> None:
    assert run_python(program, SHORT).error == "timed_out"


@pytest.mark.parametrize(
    "program",
    [
        "import time; time.sleep(100)",
        "import os, time\nfor fd in range(999):\n  try: os.close(fd)\n  except OSError: pass\ntime.sleep(100)",
        "import os\nfor fd in range(3, 999):\n  try:\n    while True: os.write(fd, b'x' * 999)\n  except OSError: pass",
    ],
)
def test_waiting_for_ever_ends_and_leaves_no_process(program: str) -> None:
    assert run_python(program, Limits(cpu_s=1, wall_s=0.7)).error == "timed_out"
    assert not [child for child in psutil.Process().children() if "sandbox_child.py" in " ".join(child.cmdline())]


@pytest.mark.parametrize("program", ["x = bytearray(8 << 30)", "x = []\nwhile True: x.append(bytearray(1 << 24))"])
def test_memory_is_limited(program: str) -> None:
    assert run_python(program, Limits(memory_bytes=256 << 20)).error == "raised:MemoryError"


def test_nothing_of_ours_reaches_a_program_or_leaves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    program = "import os\nassert not {name for name in os.environ if 'NUM_THREADS' not in name and name != 'LC_CTYPE'}"
    assert run_python(program).is_right
    descriptors = "import os\nassert len(os.listdir('/proc/self/fd')) <= 5"  # 0 to 2, the pipe, and this folder
    assert run_python(descriptors).is_right
    read = f"open('/proc/{os.getpid()}/environ').read().replace(chr(0), ' ')"
    told = run_python(f"raise type({read}, (Exception,), {{}})({read})")
    assert (told.error, told.why) == ("raised:Exception", None)


CHILD = Path(sandbox_child.__file__)


def child_that(folder: Path, change: str) -> Path:
    """A sandbox child that something is wrong with."""
    script = folder / "child.py"
    script.write_text(
        f"import runpy\nmain = runpy.run_path({str(CHILD)!r})['main']\nnames = main.__globals__\n{change}\nmain()"
    )
    return script


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("names['platform'].machine = lambda: 'riscv64'", r"cannot confine a program \(KeyError: 'riscv64'\)"),
        ("names['_PR_SET_SECCOMP'] = 9999", r"cannot confine a program \(OSError: .*prctl 9999: Invalid argument"),
        ("names['build_filter'] = lambda machine, *, pid: [(6, 0, 0, 0x7FFF0000)]", "could still open a socket"),
    ],
)
def test_a_machine_that_cannot_confine_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, message: str
) -> None:
    monkeypatch.setattr(sandbox, "_CHILD", child_that(tmp_path, change))
    for run in (check_sandbox, lambda: run_python("import os; os._exit(0)")):
        with pytest.raises(SandboxError, match=message):
            run()


def test_the_childs_own_failure_is_no_verdict_on_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_CHILD", child_that(tmp_path, "raise RuntimeError"))
    with pytest.raises(SandboxError, match=r"does not run an empty program here \(ended_early\)"):
        check_sandbox()


# The filter itself, interpreted here: for machines that we are not on

ALLOW, KILL, EPERM = 0x7FFF0000, 0x80000000, 0x00050001
PID = 4321


def decide(machine: str, number: int, *arguments: int, architecture: int | None = None) -> int:
    """What the kernel would do with a system call."""
    own = sandbox_child.ARCHITECTURES[machine][1]
    data = {0: number, 4: own if architecture is None else architecture}
    for index in range(6):
        value = arguments[index] if index < len(arguments) else 0
        data |= {16 + 8 * index: value & 0xFFFFFFFF, 20 + 8 * index: value >> 32 & 0xFFFFFFFF}
    program = build_filter(machine, pid=PID)
    assert len(program) < 4096
    place = accumulator = 0
    while True:
        code, if_true, if_false, constant = program[place]
        assert max(if_true, if_false) < 256
        if code == 0x20:
            accumulator = data[constant]
        elif code == 0x06:
            return constant
        else:
            holds = {0x15: accumulator == constant, 0x35: accumulator >= constant, 0x45: bool(accumulator & constant)}
            place += if_true if holds[code] else if_false
        place += 1


NUMBERS = {  # of x86_64 and aarch64
    "openat": (257, 56), "socket": (41, 198), "clone": (56, 220), "execve": (59, 221), "kill": (62, 129),
    "unlinkat": (263, 35), "ptrace": (101, 117), "fcntl": (72, 25), "ioctl": (16, 29), "prlimit64": (302, 261),
    "tgkill": (234, 131), "io_uring_setup": (425, 425), "openat2": (437, 437), "clone3": (435, 435), "bpf": (321, 280),
}  # fmt: skip


@pytest.mark.parametrize("machine", sandbox_child.ARCHITECTURES)
def test_the_filter_lets_through_what_it_should(machine: str) -> None:
    column = sandbox_child.ARCHITECTURES[machine][0]
    number = {name: pair[column] for name, pair in NUMBERS.items()}
    for name in (
        "socket",
        "clone",
        "execve",
        "kill",
        "unlinkat",
        "ptrace",
        "io_uring_setup",
        "openat2",
        "clone3",
        "bpf",
    ):
        assert decide(machine, number[name]) == EPERM, name
    for name, pair in ALLOWED.items():
        if pair[column] is not None:
            assert decide(machine, pair[column] or 0) == ALLOW, name
    cloexec = os.O_RDONLY | os.O_CLOEXEC
    assert decide(machine, number["openat"], 0, 0, cloexec) == ALLOW
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC):
        assert decide(machine, number["openat"], 0, 0, cloexec | flags) == EPERM
    assert decide(machine, number["fcntl"], 0, 1) == ALLOW and decide(machine, number["fcntl"], 0, 8) == EPERM
    assert decide(machine, number["ioctl"], 0, 0x5401) == ALLOW and decide(machine, number["ioctl"], 0, 0x5412) == EPERM
    assert decide(machine, number["prlimit64"], 0, 7, 0) == ALLOW
    for arguments in ((1, 7, 0), (0, 7, 8), (0, 7, 1 << 32)):
        assert decide(machine, number["prlimit64"], *arguments) == EPERM
    assert decide(machine, number["tgkill"], PID, 1, signal.SIGABRT) == ALLOW
    assert decide(machine, number["tgkill"], PID + 1, 1, signal.SIGABRT) == EPERM
    assert decide(machine, 0, architecture=0x40000003) == KILL  # 32-bit calls have other numbers
    assert decide(machine, 0x40000000) == KILL  # and so has x32


@pytest.mark.parametrize(
    ("column", "header"),
    [(0, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), (1, "/usr/include/asm-generic/unistd.h")],
)
def test_numbers_are_those_of_the_kernels_headers(column: int, header: str) -> None:
    if not Path(header).is_file():
        pytest.skip("waits for a machine with the kernel's headers")
    found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)$", Path(header).read_text(), re.MULTILINE)
    numbers = {name.replace("fstatat", "newfstatat") if column else name: int(number) for name, number in found}
    special = {"fcntl": sandbox_child.FCNTL, "ioctl": sandbox_child.IOCTL, "prlimit64": sandbox_child.PRLIMIT64}
    opening = {name: pair for name, (pair, _) in sandbox_child.OPEN.items()}
    for name, pair in {**ALLOWED, **special, **opening, "tgkill": sandbox_child.TGKILL}.items():
        assert numbers.get(name) == pair[column], name


def test_the_child_is_a_script_that_stands_alone() -> None:
    assert runpy.run_path(str(CHILD), run_name="not main")["main"]
    assert "sglang_prefillshare" not in CHILD.read_text()

"""A room: namespaces over one root folder, as an engine's container has them, and the processes in it.

All mounts lie in the room's own mount namespace. They are gone with its first process, which dies with us, so no folder
of this machine can be removed through one, whatever ends the test.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PATH = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
TOOLS = ("chroot", "ip", "mount", "nsenter", "setpriv", "unshare")

# Mounts, says so, and then only reaps what others leave behind. Arguments: source, target, rw or ro, for each bind.
_FIRST_PROCESS = """
set -e
mount --bind "$ROOT" "$ROOT"
mount -t proc proc "$ROOT/proc"
mount -t sysfs -o ro sysfs "$ROOT/sys"
mount -t tmpfs -o mode=755,size=64k dev "$ROOT/dev"
for name in null zero full random urandom tty; do
    : >"$ROOT/dev/$name"
    mount --bind "/dev/$name" "$ROOT/dev/$name"
done
ln -s /proc/self/fd "$ROOT/dev/fd"
for number in 0 1 2; do ln -s "fd/$number" "$ROOT/dev/$(echo stdin stdout stderr | cut -d ' ' -f $((number + 1)))"; done
mkdir "$ROOT/dev/shm"
mount -t tmpfs -o mode=1777,size="$SHARED_MEMORY" shm "$ROOT/dev/shm"
[ "$NETWORK" = ours ] || ip link set lo up
while [ $# -gt 0 ]; do
    mount --bind "$1" "$ROOT$2"
    [ "$3" = rw ] || mount -o remount,bind,ro "$ROOT$2"
    shift 3
done
echo ready
sleep infinity & wait
"""


def lacking() -> str:
    """What this machine lacks for a room, in words; empty if nothing."""
    if os.geteuid() != 0:
        return "root, for namespaces and mounts"
    if absent := [name for name in TOOLS if shutil.which(name) is None]:
        return f"the commands {', '.join(absent)} (on Debian: apt install iproute2 util-linux)"
    unshare = ["unshare", "--mount", "--pid", "--ipc", "--net", "--fork"]
    tried = subprocess.run([*unshare, "mount", "-t", "tmpfs", "tried", "/mnt"], capture_output=True, text=True)
    return f"leave for namespaces and mounts ({tried.stderr.strip()})" if tried.returncode else ""


@dataclass(frozen=True, slots=True)
class Bind:
    """A path of this machine, at a path of the room."""

    source: Path
    target: Path
    is_writable: bool = False


@dataclass(frozen=True, slots=True)
class User:
    """Whom a process runs as. One without privileges has no capability and can gain none."""

    uid: int = 0
    gid: int = 0
    is_privileged: bool = True


class Room:
    """Own mounts, processes and IPC; own network, which is loopback alone, unless it is to have this machine's.

    Ours until `close`, which kills all processes in it by killing the first.
    """

    def __init__(
        self, root: Path, *, binds: Sequence[Bind] = (), has_network: bool = False, shared_memory: str = "64m"
    ) -> None:
        self._root = root
        self._namespaces = ["--mount", "--pid", "--ipc", *([] if has_network else ["--net"])]
        self._made = _make_targets(root, binds)
        rows = [(str(bind.source), str(bind.target), "rw" if bind.is_writable else "ro") for bind in binds]
        dies_with_us = ["setpriv", "--pdeathsig", "KILL", "unshare", *self._namespaces, "--fork", "--kill-child"]
        self._holder = subprocess.Popen(
            [*dies_with_us, "sh", "-c", _FIRST_PROCESS, "room", *(word for row in rows for word in row)],
            env={
                "PATH": PATH,
                "ROOT": str(root),
                "SHARED_MEMORY": shared_memory,
                "NETWORK": "ours" if has_network else "own",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self._holder.stdout is not None
        said = self._holder.stdout.readline()
        if said != "ready\n":
            self.close()
            raise RuntimeError(f"no room over {root}: {said}")
        (self._first,) = children(self._holder.pid)

    def command(self, words: Sequence[str], *, user: User, workdir: str) -> list[str]:
        """`words` as a command of this machine that runs them in the room, with the environment that it gets."""
        inside = ["/usr/bin/setpriv", f"--reuid={user.uid}", f"--regid={user.gid}", "--clear-groups"]
        if not user.is_privileged:
            inside += ["--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"]
        entering = [_found("nsenter"), f"--target={self._first}", *self._namespaces, _found("chroot"), str(self._root)]
        return [*entering, *inside, "/usr/bin/env", f"--chdir={workdir}", *words]

    def close(self) -> None:
        first = children(self._holder.pid)
        self._holder.kill()
        self._holder.wait()
        assert self._holder.stdout is not None
        self._holder.stdout.close()
        deadline = time.monotonic() + 30.0
        while any(Path(f"/proc/{pid}").exists() for pid in first):  # the kernel ends all others before the first
            assert time.monotonic() < deadline, f"process {first} of a room did not end in 30 s"
            time.sleep(0.01)
        for path in reversed(self._made):
            with contextlib.suppress(OSError):  # something else lies in it by now
                path.rmdir() if path.is_dir() else path.unlink()


@contextlib.contextmanager
def room(
    root: Path, *, binds: Sequence[Bind] = (), has_network: bool = False, shared_memory: str = "64m"
) -> Iterator[Room]:
    opened = Room(root, binds=binds, has_network=has_network, shared_memory=shared_memory)
    try:
        yield opened
    finally:
        opened.close()


class Process:
    """A process in a room that goes on running; `command` is what `Room.command` made. Its output goes to `log`."""

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], log: Path) -> None:
        self._log = log
        with log.open("w") as out:
            self._entered = subprocess.Popen(list(command), env=dict(env), stdout=out, stderr=subprocess.STDOUT)

    @property
    def has_ended(self) -> bool:
        return self._entered.poll() is not None

    def stop(self, *, within_s: float) -> float:
        """SIGTERM, as an engine sends it; seconds until it ended. Raises `subprocess.TimeoutExpired`."""
        began = time.monotonic()
        for pid in children(self._entered.pid):  # nsenter waits outside and passes no signal on
            os.kill(pid, signal.SIGTERM)
        self._entered.wait(within_s)
        return time.monotonic() - began

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def _found(name: str) -> str:
    path = shutil.which(name)
    assert path is not None, f"found no {name}, wanted what lacking() asks for"
    return path


def _make_targets(root: Path, binds: Sequence[Bind]) -> list[Path]:
    """Something to mount upon for each bind; returns what was not there, parents first."""
    made: list[Path] = []
    for bind in binds:
        target = root / str(bind.target).lstrip("/")
        for path in [*reversed(target.parents), target]:
            if path.exists() or path.is_symlink():
                continue
            made.append(path)
            if path == target and not bind.source.is_dir():
                path.touch()
            else:
                path.mkdir()
    return made

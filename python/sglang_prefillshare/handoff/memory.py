"""Memory that another process of this user can map: anonymous files that vanish with their last user.

A KV pool lives in a `memfd`: it has no name in any file system, so nothing is left behind when a process is killed, and
no other user can open it. A peer on the same host maps it through `/proc/<pid>/fd/<fd>`.
"""

from __future__ import annotations

import mmap
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import numpy.typing as npt

from sglang_prefillshare.errors import HandoffError

if TYPE_CHECKING:
    import torch

ALIGNMENT: Final = 4096
CHOOSE_NIXL: Final = "choose --disaggregation-transfer-backend nixl"


def align(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, slots=True)
class RegionHandle:
    """Where a peer finds a region: the owner's process, that process's start time, its descriptor, the size in bytes.

    The start time tells a process from a later one that was given the same number.
    """

    pid: int
    started: int
    fd: int
    size: int


class SharedRegion:
    """`size` bytes mapped into this process, zero until written. The mapping lives as long as this object."""

    _owned: Final[list[SharedRegion]] = []

    def __init__(self, mapping: mmap.mmap, *, handle: RegionHandle) -> None:
        self._mapping = mapping
        self.handle = handle
        self.address = int(np.frombuffer(mapping, dtype=np.uint8).ctypes.data)

    @classmethod
    def create(cls, size: int, *, name: str) -> SharedRegion:
        """Allocate a region that this process owns; pages are taken from memory when they are first written."""
        try:
            fd = os.memfd_create(name, os.MFD_CLOEXEC)
            os.fchmod(fd, 0o600)
            os.ftruncate(fd, size)
            handle = RegionHandle(pid=os.getpid(), started=process_start("self"), fd=fd, size=size)
            region = cls(mmap.mmap(fd, size), handle=handle)
        except OSError as error:
            raise HandoffError(
                f"cannot make {size} bytes of shared memory: {error.strerror}. Raise the limits of the process (ulimit "
                f"-a) or of its container, or {CHOOSE_NIXL}."
            ) from error
        cls._owned.append(region)
        return region

    @classmethod
    def attach(cls, handle: RegionHandle) -> SharedRegion:
        """Map, read-only, a region that a live process of this user on this host owns."""
        path = Path(f"/proc/{handle.pid}/fd/{handle.fd}")
        try:
            if process_start(handle.pid) != handle.started:
                raise HandoffError(f"process {handle.pid} is not the prefill worker that offered its KV pool any more.")
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                found = os.fstat(fd).st_size
                if found != handle.size:
                    raise HandoffError(
                        f"process {handle.pid} offered {handle.size} bytes, the region has {found}. "
                        "Start prefill and decode in the same version."
                    )
                return cls(mmap.mmap(fd, handle.size, prot=mmap.PROT_READ), handle=handle)
            finally:
                os.close(fd)
        except OSError as error:
            raise HandoffError(
                f"cannot map the KV pool of process {handle.pid}: {error.strerror}. Prefill and decode must run on one "
                "host, in one PID namespace, as one user; across hosts choose --disaggregation-transfer-backend nixl."
            ) from error

    @classmethod
    def owning(cls, address: int) -> tuple[SharedRegion, int] | None:
        """The region of this process that holds `address`, and the offset in it; None if no region does."""
        for region in cls._owned:
            offset = address - region.address
            if 0 <= offset < region.handle.size:
                return region, offset
        return None

    def array(self, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """A view of all of it as numbers; of a peer's region, read-only."""
        return np.frombuffer(self._mapping, dtype=dtype)

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A view of the region as a contiguous tensor of `shape` and `dtype` that starts at byte `offset`."""
        import torch

        count = dtype.itemsize
        for extent in shape:
            count *= extent
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable.*")  # a peer's region is read-only by intent
            flat = torch.frombuffer(self._mapping, dtype=torch.uint8, count=count, offset=offset)
        return flat.view(dtype).view(shape)


def memory_space(*namespaces: str) -> str:
    """Names this host since it booted, and the process's `namespaces` (`pid`, `ipc`): equal where they are shared."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return " ".join([boot, *(os.readlink(f"/proc/self/ns/{name}") for name in namespaces)])


def watch_process(pid: int, started: int) -> int:
    """A pidfd of the peer's process `pid`, which tells of its end. Raises `HandoffError` if it cannot be seen."""
    try:
        if process_start(pid) != started:
            raise ProcessLookupError(pid)
        return os.pidfd_open(pid)
    except OSError as error:
        raise HandoffError(
            f"process {pid} of the peer cannot be seen from here ({error.strerror or 'it is gone'}). The prefillshare "
            "backend needs both workers on one host and in one PID namespace, with its own /proc (--pid host, or one "
            f"container for both); otherwise {CHOOSE_NIXL}."
        ) from error


def process_start(pid: int | Literal["self"]) -> int:
    """When process `pid` started, in clock ticks since boot; raises `OSError` if there is none.

    Of itself a process asks as `self`: by number it finds itself only where /proc is of its own PID namespace.
    """
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[19])

"""`handoff/memory.py`, with an owner that is another process."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import json
import mmap
import os
import stat
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_prefillshare.errors import HandoffError
from sglang_prefillshare.handoff.memory import ALIGNMENT, RegionHandle, SharedRegion, align, process_start

SIZE = 3 * 4096

_OWNER = """
import dataclasses, json, sys
from sglang_prefillshare.handoff.memory import SharedRegion
region = SharedRegion.create(int(sys.argv[1]), name=sys.argv[2])
print(json.dumps(dataclasses.asdict(region.handle)), flush=True)
for line in sys.stdin:
    offset, data = json.loads(line)
    region._mapping[offset : offset + len(data)] = bytes(data)
    print("written", flush=True)
"""


class Owner:
    """A process that owns a region, as a prefill worker does."""

    def __init__(self, size: int = SIZE) -> None:
        self.name = f"test-{uuid.uuid4().hex}"
        self._process = subprocess.Popen(
            [sys.executable, "-c", _OWNER, str(size), self.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.handle = RegionHandle(**json.loads(self._answer()))
        assert self.handle.pid == self._process.pid

    def write(self, offset: int, data: bytes) -> None:
        assert self._process.stdin is not None
        print(json.dumps([offset, list(data)]), file=self._process.stdin, flush=True)
        assert self._answer() == "written\n"

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


@pytest.fixture
def owner() -> Iterator[Owner]:
    owner = Owner()
    try:
        yield owner
    finally:
        owner.kill()


def read(region: SharedRegion, offset: int, count: int) -> bytes:
    return bytes(region.tensor(offset, (count,), torch.uint8).tolist())


def holders(name: str) -> list[str]:
    """Whatever on this machine still refers to the memory `name`: files, open descriptors, mappings."""
    found = [str(path) for folder in ("/dev/shm", "/tmp") for path in Path(folder).glob(f"*{name}*")]
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if name in (process / "maps").read_text():
                found.append(f"{process}/maps")
        with contextlib.suppress(OSError):
            for descriptor in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if name in os.readlink(descriptor):
                        found.append(str(descriptor))
    return found


def test_a_peer_sees_what_the_owner_writes_before_and_after_it_mapped(owner: Owner) -> None:
    owner.write(0, b"before")
    region = SharedRegion.attach(owner.handle)
    assert read(region, 0, 8) == b"before\0\0"
    owner.write(SIZE - 5, b"after")
    assert read(region, SIZE - 5, 5) == b"after"
    assert len(region._mapping) == SIZE


def test_a_peer_cannot_write(owner: Owner) -> None:
    region = SharedRegion.attach(owner.handle)
    with pytest.raises(TypeError, match="readonly"):
        region._mapping[0] = 1
    # Nor can it be made writable: it was opened for reading only.
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.c_void_p(region.address)
    assert libc.mprotect(address, ctypes.c_size_t(SIZE), mmap.PROT_READ | mmap.PROT_WRITE) == -1
    assert ctypes.get_errno() == errno.EACCES
    owner.write(0, b"x")
    assert read(region, 0, 1) == b"x"


def test_a_region_outlives_a_killed_owner_only_for_as_long_as_a_peer_maps_it() -> None:
    owner = Owner()
    owner.write(100, b"kept")
    region = SharedRegion.attach(owner.handle)
    assert len(holders(owner.name)) >= 3  # the owner's descriptor and mapping, our mapping
    owner.kill()
    assert read(region, 100, 4) == b"kept"
    assert holders(owner.name)
    assert all(found.startswith(f"/proc/{os.getpid()}/") for found in holders(owner.name))
    del region
    assert holders(owner.name) == []


def test_a_peer_that_lets_go_leaves_no_descriptor_open(owner: Owner) -> None:
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(20):
        SharedRegion.attach(owner.handle)
    for wrong in (dataclasses.replace(owner.handle, size=1), dataclasses.replace(owner.handle, fd=0)):
        with pytest.raises(HandoffError):
            SharedRegion.attach(wrong)
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_process_that_was_given_a_dead_owners_number_is_refused(owner: Owner) -> None:
    other = dataclasses.replace(owner.handle, started=owner.handle.started - 1)
    with pytest.raises(HandoffError, match=f"process {owner.handle.pid} is not the prefill worker"):
        SharedRegion.attach(other)


@pytest.mark.parametrize("change", [-4096, -1, 1, 4096])
def test_a_region_of_another_size_is_refused(owner: Owner, change: int) -> None:
    with pytest.raises(HandoffError, match=f"offered {SIZE + change} bytes, the region has {SIZE}"):
        SharedRegion.attach(dataclasses.replace(owner.handle, size=SIZE + change))


def test_a_dead_owner_is_refused() -> None:
    owner = Owner()
    owner.kill()
    with pytest.raises(HandoffError, match="cannot map the KV pool of process"):
        SharedRegion.attach(owner.handle)


def test_a_descriptor_that_is_not_open_is_refused(owner: Owner) -> None:
    with pytest.raises(HandoffError, match="No such file"):
        SharedRegion.attach(dataclasses.replace(owner.handle, fd=999))


def test_what_cannot_be_mapped_is_refused(tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        pid, size = os.getpid(), os.fstat(folder).st_size
        handle = RegionHandle(pid=pid, started=process_start(pid), fd=folder, size=size or 4096)
        with pytest.raises(HandoffError, match=r"cannot map the KV pool of process .*: No such device"):
            SharedRegion.attach(handle)
    finally:
        os.close(folder)


def test_only_its_owners_user_may_open_a_region() -> None:
    region = SharedRegion.create(4096, name="test-mode")
    assert stat.S_IMODE(os.fstat(region.handle.fd).st_mode) == 0o600
    assert not os.get_inheritable(region.handle.fd)


def test_a_new_region_is_zero_and_takes_memory_only_when_it_is_written() -> None:
    size = 1 << 38  # more than any machine of ours has
    region = SharedRegion.create(size, name="test-sparse")
    tensor = region.tensor(size - 8, (2,), torch.float32)
    assert tensor.tolist() == [0.0, 0.0]
    assert os.fstat(region.handle.fd).st_blocks * 512 < 1 << 20


def test_tensors_are_views_at_their_offset() -> None:
    region = SharedRegion.create(4096, name="test-tensor")
    tensor = region.tensor(64, (2, 3), torch.float32)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((2, 3), torch.float32, True)
    assert tensor.data_ptr() == region.address + 64
    tensor.copy_(torch.arange(6, dtype=torch.float32).reshape(2, 3))
    peer = SharedRegion.attach(region.handle)
    assert peer.tensor(64, (2, 3), torch.float32).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert peer.tensor(76, (1,), torch.float32).tolist() == [3]
    assert peer.tensor(64, (3, 2), torch.bfloat16).data_ptr() == peer.address + 64
    with pytest.raises(ValueError):
        region.tensor(4096 - 4, (2,), torch.float32)


def test_the_region_that_owns_an_address_is_found_with_the_offset(owner: Owner) -> None:
    first, second = (SharedRegion.create(2 * 4096, name=f"test-{i}") for i in range(2))
    for region in (first, second):
        for offset in (0, 1, 5000, 2 * 4096 - 1):
            assert SharedRegion.owning(region.address + offset) == (region, offset)
    tensor = second.tensor(4096, (4,), torch.float32)
    assert SharedRegion.owning(tensor.data_ptr()) == (second, 4096)

    assert SharedRegion.owning(torch.zeros(8).data_ptr()) is None
    peers = SharedRegion.attach(owner.handle)
    assert SharedRegion.owning(peers.address) is None, "a peer's region is not ours to hand out"
    after = SharedRegion.owning(first.address + 2 * 4096)
    assert after is None or after[0] is not first


@given(size=st.integers(0, 1 << 45))
def test_sizes_are_rounded_up_to_whole_pages(size: int) -> None:
    aligned: Any = align(size)
    assert aligned % ALIGNMENT == 0
    assert 0 <= aligned - size < ALIGNMENT


def test_a_processs_start_is_its_own_and_does_not_change() -> None:
    mine = process_start(os.getpid())
    time.sleep(0.05)
    child = subprocess.Popen(["sleep", "60"])
    try:
        assert mine == process_start(os.getpid()) < process_start(child.pid)
    finally:
        child.kill()
        child.wait()
    with pytest.raises(OSError):
        process_start(child.pid)


def test_a_process_with_a_strange_name_has_a_start(tmp_path: Path) -> None:
    program = tmp_path / ") 1 (x"
    program.symlink_to("/bin/sleep")
    child = subprocess.Popen([program, "60"])
    try:
        deadline = time.monotonic() + 5
        while program.name not in Path(f"/proc/{child.pid}/stat").read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert program.name in Path(f"/proc/{child.pid}/stat").read_text()
        assert abs(process_start(child.pid) - process_start(os.getpid())) < 3600 * 24 * 100 * 100
        assert process_start(child.pid) > process_start(os.getpid())
    finally:
        child.kill()
        child.wait()

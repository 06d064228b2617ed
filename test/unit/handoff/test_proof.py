"""`handoff/proof.py`: a page handed over with a real process, in shared memory; what is wrong is said, and what is not
known is no failure."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from sglang_prefillshare.errors import HandoffError
from sglang_prefillshare.handoff import messages, proof
from sglang_prefillshare.handoff.copy import copy_pages
from sglang_prefillshare.handoff.geometry import KVGeometry
from sglang_prefillshare.handoff.lease_table import create_lease_region
from sglang_prefillshare.handoff.mapping import map_pool
from sglang_prefillshare.handoff.memory import SharedRegion, process_start
from sglang_prefillshare.handoff.pool import PageList, PoolView
from sglang_prefillshare.handoff.ranks import Rank

GEOMETRY = KVGeometry(page_size=4, kv_dtype="float32", page_bytes=(96, 4096, 96, 4096))
PAGE_COUNT = 3


@pytest.fixture
def pool() -> tuple[messages.Pool, PoolView]:
    """A pool with something on every page: as it is offered, and as its owner addresses it."""
    offsets = (0, 4096, 65536, 69632)
    region = SharedRegion.create(1 << 17, name="test-kv")
    region.array(np.uint8)[:] = np.arange(1 << 17) % 251
    leases = create_lease_region().handle
    offer = messages.Pool(
        bootstrap_addr="",
        pid=os.getpid(),
        started=process_start("self"),
        lease_fd=leases.fd,
        lease_bytes=leases.size,
        page_count=PAGE_COUNT,
        geometry=GEOMETRY,
        memory=messages.HostMemory(region.handle.fd, region.handle.size, offsets),
        rank=Rank(),
    )
    view = PoolView.at([region.address + at for at in offsets], GEOMETRY.page_bytes, PAGE_COUNT, owner=region)
    return offer, view


def everything(view: PoolView) -> bytes:
    return b"".join(proof.read_page(view, page, device=None) for page in range(view.page_count))


def test_another_process_reads_the_pool_and_the_pool_is_as_it_was(pool: tuple[messages.Pool, PoolView]) -> None:
    offer, view = pool
    before = everything(view)
    proof.prove_lending(offer, view, device=None)
    assert everything(view) == before


@contextmanager
def pulled(view: PoolView, lent: messages.Pool, source: PageList, target: PageList) -> Iterator[None]:
    copy_pages(map_pool(lent, device=None), view, source, target)
    yield


def test_a_page_of_another_process_is_pulled_and_the_pool_is_as_it_was(pool: tuple[messages.Pool, PoolView]) -> None:
    view = pool[1]
    before = everything(view)
    proof.prove_pulling(GEOMETRY, view, lambda *what: pulled(view, *what), device=None)
    assert everything(view) == before


def test_a_pool_that_is_not_where_it_says_fails_and_so_does_a_copy_of_something_else(
    pool: tuple[messages.Pool, PoolView],
) -> None:
    offer, view = pool
    elsewhere = PoolView.at((view.addresses + 128).tolist(), GEOMETRY.page_bytes, 1, owner=view.owner)
    with pytest.raises(HandoffError, match=r"other bytes than were written.*transfer-backend nixl"):
        proof.prove_lending(offer, elsewhere, device=None)

    @contextmanager
    def nothing(*_: object) -> Iterator[None]:
        yield

    with pytest.raises(HandoffError, match="other bytes than were written"):
        proof.prove_pulling(GEOMETRY, view, nothing, device=None)


def test_the_peers_own_reason_is_told(pool: tuple[messages.Pool, PoolView]) -> None:
    offer, view = pool
    before = everything(view)
    closed = messages.HostMemory(offer.lease_fd + 4000, offer.memory.region_bytes, offer.memory.offsets)  # type: ignore[union-attr]
    with pytest.raises(HandoffError, match=r"cannot map the KV pool of process \d+: No such file.*nixl"):
        proof.prove_lending(messages.Pool(**{**_fields(offer), "memory": closed}), view, device=None)
    with pytest.raises(HandoffError, match=r"cannot be seen from here .it is gone.*--pid host"):
        proof.prove_lending(messages.Pool(**{**_fields(offer), "started": 1}), view, device=None)
    assert everything(view) == before


def _fields(offer: messages.Pool) -> dict[str, object]:
    return {name: getattr(offer, name) for name in offer.__struct_fields__}


@pytest.mark.parametrize(
    ("command", "reason"),
    [(["/does/not/exist"], "could be started"), (["true"], "has ended"), (["sleep", "60"], "says nothing for 0.3 s")],
)
def test_a_peer_that_gives_no_answer_proves_nothing(
    monkeypatch: pytest.MonkeyPatch, pool: tuple[messages.Pool, PoolView], command: list[str], reason: str
) -> None:
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _command, **pipes: real(command, **pipes))
    monkeypatch.setattr(proof, "PEER_TIMEOUT_S", 0.3)
    before = everything(pool[1])
    with pytest.raises(proof.UntriedError, match=reason):
        proof.prove_lending(*pool, device=None)
    assert everything(pool[1]) == before


def test_a_peer_ends_with_its_worker_and_loads_no_torch() -> None:
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", proof.__name__],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    output, imported = process.communicate(timeout=30)
    assert (process.returncode, output) == (0, b"")
    names = {line.rpartition(b"|")[2].strip() for line in imported.splitlines()}
    assert b"numpy" in names and not {b"torch", b"numba", b"triton", b"sglang"} & names


_WORKER = """
import os
from sglang_prefillshare.errors import HandoffError
from sglang_prefillshare.handoff import messages, proof
from sglang_prefillshare.handoff.geometry import KVGeometry
from sglang_prefillshare.handoff.lease_table import create_lease_region
from sglang_prefillshare.handoff.memory import SharedRegion, process_start
from sglang_prefillshare.handoff.pool import PoolView
from sglang_prefillshare.handoff.ranks import Rank
try:
    region, leases = SharedRegion.create(4096, name="kv"), create_lease_region().handle
    memory, geometry = messages.HostMemory(region.handle.fd, 4096, (0,)), KVGeometry(1, "float32", (96,))
    offer = messages.Pool(
        "", os.getpid(), process_start("self"), leases.fd, leases.size, 1, geometry, memory, Rank()
    )
    proof.prove_lending(offer, PoolView.at([region.address], (96,), 1, owner=region), device=None)
    print("proved")
except HandoffError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("around", "told"),
    [
        (["unshare", "--pid", "--fork", "--mount-proc"], "proved"),
        (["unshare", "--pid", "--fork"], "cannot be seen from here (it is gone)"),
        (["prlimit", "--fsize=1024"], "cannot make 4096 bytes of shared memory: File too large"),
    ],
    ids=["a PID namespace", "a PID namespace without its /proc", "a limit"],
)
def test_in_a_container_that_is_not_as_it_must_be_the_reason_is_told(around: list[str], told: str) -> None:
    """Namespaces and limits of the kernel's own."""
    if (
        shutil.which(around[0]) is None
        or subprocess.run([*around, "true"], check=False, stderr=subprocess.DEVNULL).returncode
    ):
        pytest.skip(f"{around[0]} is not to be had here")
    done = subprocess.run([*around, sys.executable, "-c", _WORKER], stdout=subprocess.PIPE, text=True, check=True)
    assert told in done.stdout
    assert told == "proved" or "choose --disaggregation-transfer-backend nixl" in done.stdout


def test_only_want_of_room_on_a_gpu_leaves_it_open() -> None:
    busy = proof.explain(proof.cuda_memory.DriverError("cuDevicePrimaryCtxRetain", "CUDA_ERROR_OUT_OF_MEMORY"))
    assert isinstance(busy, proof.UntriedError)
    broken = proof.explain(proof.cuda_memory.DriverError("cuMemcpyDtoD", "CUDA_ERROR_UNKNOWN"))
    assert not isinstance(broken, proof.UntriedError) and "choose --disaggregation-transfer-backend nixl" in str(broken)
    compiler = proof.explain(RuntimeError("Failed to find C compiler."))
    assert "Failed to find C compiler." in str(compiler) and "nixl" in str(compiler)


def test_a_worker_that_is_killed_leaves_no_peer(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    program = (
        "import pathlib, time\nfrom sglang_prefillshare.handoff import proof\n"
        f"peer = proof.Peer()\npathlib.Path({str(told)!r}).write_text(str(peer._process.pid))\ntime.sleep(60)\n"
    )
    worker = subprocess.Popen([sys.executable, "-c", program])
    while not told.exists() or not told.read_text():
        assert worker.poll() is None
    watched = os.pidfd_open(int(told.read_text()))
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    poller = select.poll()
    poller.register(watched, select.POLLIN)
    assert poller.poll(20_000), "the peer outlives its worker"
    os.close(watched)

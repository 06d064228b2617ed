"""The machine code that the launcher's own arguments compile to, for GPUs that need not be here.

`warmup` takes the way of a launch, specialization of the arguments included, and stops before the driver loads the
binary. The driver that it asks for the GPU at hand is exchanged for one that names the architecture.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from prefillshare_kernels import rows
from prefillshare_kernels.pool import KVPool
from prefillshare_kernels.rows import LARGE, Launch, Paged, Staged, plan

pytestmark = [
    pytest.mark.skipif(not isinstance(rows.copy_rows, triton.JITFunction), reason="needs TRITON_INTERPRET to be unset"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset"),
]

CPU = torch.device("cpu")
VECTORS_PER_THREAD = LARGE.words // (32 * LARGE.warps) // 2
"""16-byte accesses, of two words each."""


@dataclass(frozen=True)
class NamedGPU:
    """As much of a Triton driver as a compilation asks for."""

    arch: int

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> str:
        return f"sm_{self.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def arch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[int]:
    monkeypatch.setattr(driver, "_active", NamedGPU(request.param))
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        rows.copy_rows.device_caches.clear()
        yield request.param
        rows.copy_rows.device_caches.clear()


def pool(row_bytes: list[int], heads: int, page_size: int) -> KVPool:
    """A pool at addresses as a GPU's allocator gives them; nothing is there, and nothing is read."""
    addresses = tuple((number + 1) << 30 for number in range(len(row_bytes)))
    return KVPool(addresses, tuple(row_bytes), page_size, 1 << 20, CPU, heads)


def page_list(side: KVPool, tokens: int, first: int = 0) -> torch.Tensor:
    return torch.zeros(triton.cdiv(first + tokens, side.page_size), dtype=torch.int32)


def launch_of(kind: str, source: KVPool, target: KVPool, head_count: int, tokens: int = 640) -> Launch:
    staged = Staged(torch.empty(tokens * sum(source.row_bytes), dtype=torch.uint8))
    paged_source = Paged(source, page_list(source, tokens))
    paged_target = Paged(target, page_list(target, tokens), head=target.heads - head_count)
    sides = {"copy": (paged_source, paged_target), "gather": (paged_source, staged), "scatter": (staged, paged_target)}
    launch = plan(*sides[kind], tokens=tokens, head_count=head_count)
    assert launch is not None
    return launch


def compiled(launch: Launch) -> Any:
    return rows.copy_rows.warmup(*launch.arguments, grid=launch.grid, **launch.constants)


def resource_usage(cubin: bytes, directory: Path) -> dict[str, int]:
    """What `cuobjdump -res-usage` says: REG, STACK, LOCAL, SHARED and so on."""
    path = directory / "kernel.cubin"
    path.write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", said)}


GEOMETRIES = {
    "Llama-3.1-8B": ([8 * 128 * 2] * 64, 8, 8),
    "two of Llama-3.1-8B's heads": ([8 * 128 * 2] * 64, 8, 2),
    "SmolLM2": ([3 * 64 * 2] * 60, 3, 3),
    "MLA": ([576 * 2] * 27, 1, 1),
    "K wider than V": ([4 * 192 * 2] * 8 + [4 * 128 * 2] * 8, 4, 4),
}
"""Bytes of a row in each buffer, heads of the pool, heads copied."""


@pytest.mark.parametrize("kind", ["copy", "gather", "scatter"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_rows_move_in_vectors_of_sixteen_bytes_and_no_register_spills(
    arch: int, geometry: str, kind: str, tmp_path: Path
) -> None:
    row_bytes, heads, head_count = GEOMETRIES[geometry]
    kernel = compiled(launch_of(kind, pool(row_bytes, heads, 16), pool(row_bytes, heads, 64), head_count))
    assert kernel.metadata.target.arch == arch

    ptx = kernel.asm["ptx"]
    stores = re.findall(r"\bst\.global\S*", ptx)
    loads = re.findall(r"\bld\.global\S*", ptx)
    assert stores == ["st.global.v2.b64"] * VECTORS_PER_THREAD
    assert loads.count("ld.global.v2.b64") == VECTORS_PER_THREAD
    # The others read tables and page lists: fewer than one of at most 8 bytes for each vector and side.
    assert len(loads) - VECTORS_PER_THREAD <= 2 * VECTORS_PER_THREAD + 3

    code = re.findall(r"\b(?:LDG|STG|LDL|STL)\.?\S*", kernel.asm["sass"])
    wide_loads = [at for at, name in enumerate(code) if name.startswith("LDG") and ".128" in name]
    wide_stores = [at for at, name in enumerate(code) if name.startswith("STG") and ".128" in name]
    assert len(wide_loads) == len(wide_stores) == VECTORS_PER_THREAD
    assert max(wide_loads) < min(wide_stores), "a thread has all its loads in flight before it waits for one"
    assert not [name for name in code if name.startswith(("LDL", "STL"))]

    usage = resource_usage(kernel.asm["cubin"], tmp_path)
    assert usage["STACK"] == usage["LOCAL"] == 0
    assert usage["REG"] <= 80, "6 programs share a multiprocessor"


def test_no_request_costs_a_compilation_of_its_own(arch: int) -> None:
    base, decode = pool([2048] * 4, 8, 1), pool([2048] * 4, 8, 16)
    hashes = set()
    for tokens, first, skipped in ((1, 0, 0), (15, 1, 1), (16, 16, 3), (4096, 0, 0)):
        source_pages = torch.zeros(skipped + tokens, dtype=torch.int32)[skipped:]  # of any alignment
        target_pages = page_list(decode, tokens, first)
        launch = plan(Paged(base, source_pages), Paged(decode, target_pages, first), tokens=tokens, head_count=8)
        assert launch is not None
        hashes.add(compiled(launch).hash)
    for head in (0, 1, 7):
        part = plan(Paged(base, source_pages, head=head), Paged(decode, target_pages), tokens=4096, head_count=1)
        assert part is not None
        hashes.add(compiled(part).hash)
    assert len(hashes) == 3  # all heads of a small and of a large copy, one head of a small one

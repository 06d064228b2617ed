"""How close do page copies come to what the device copies at best, and does one launch beat staging and torch?

Two KV pools with the geometry of Llama-3.1-8B on one GPU. The variants take turns in random order, each behind a write
of --flush-mib that empties the L2 cache:

    copy          ours, from pool to pool, one launch, planned in each call
    planned       the same, planned and compiled beforehand, as the handoff does
    handoff       the handoff's whole copy: page lists from the host, launch, and the wait until it has run
    staged        ours, gather to a contiguous buffer and scatter from it, two launches
    torch         index_select and index_copy_, for each of the 64 buffers
    sglang        SGLang's own staging gather and scatter, where sglang can be imported
    limit         torch's copy_ of as many contiguous bytes: the limit

Every variant's answer is compared with plain indexing before it is timed. Times are between CUDA events on the stream,
so they contain the waits for the host that a variant causes: SGLang's gather takes its page list from host memory and
waits for its own stream, the others find theirs on the GPU. "host us" is the time until the call returns. "share" is
the variant's bytes read and written per second, as a part of the limit's at the same size; "vs limit" is its time in
copies at the limit. Writes every sample to --out. Needs a CUDA device; with TRITON_INTERPRET=1 it runs on a CPU too,
which shows that it runs and no more.

    python benchmark/kernels/copy_pages.py --repeats 50
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
import triton

from prefillshare_kernels.copy_pages import copy_pages, copy_pages_moved_bytes
from prefillshare_kernels.planned import PlannedCopy
from prefillshare_kernels.pool import KVPool
from prefillshare_kernels.reference import slots_of
from prefillshare_kernels.staging import (
    gather_pages,
    gather_pages_moved_bytes,
    scatter_pages,
    scatter_pages_moved_bytes,
    staging_bytes,
)
from sglang_prefillshare.environment import describe_environment
from sglang_prefillshare.handoff.device_copy import DeviceCopier
from sglang_prefillshare.handoff.pool import PoolView

ROOT = Path(__file__).resolve().parents[2]
KV_HEADS, HEAD_DIM, DTYPE = 8, 128, torch.bfloat16
ROW_BYTES = KV_HEADS * HEAD_DIM * DTYPE.itemsize
LIMIT = "limit"
PACKAGES = ("sglang-prefillshare", "sglang", "torch", "triton")


@dataclass(frozen=True)
class Variant:
    """`moved_bytes` is what it reads plus what it writes."""

    name: str
    moved_bytes: int
    run: Callable[[], object]
    is_page_copy: bool = True


@dataclass
class Row:
    """All samples of one variant in one setting."""

    variant: str
    page_size: int
    order: str
    tokens: int
    payload_bytes: int
    moved_bytes: int
    gpu_ms: list[float] = field(default_factory=list)
    host_us: list[float] = field(default_factory=list)

    @property
    def median_ms(self) -> float:
        return statistics.median(self.gpu_ms)


@dataclass(frozen=True)
class Pools:
    """Both pools and the staging memory, made once and used in every setting. Buffers: K of all layers, then V."""

    source: list[torch.Tensor]
    target: list[torch.Tensor]
    staging: torch.Tensor
    flush: torch.Tensor
    sglang_staging: Any | None

    @property
    def layers(self) -> int:
        return len(self.source) // 2

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in all layers."""
        return len(self.source) * ROW_BYTES


@click.command(help=__doc__)
@click.option("--sizes-mib", default="1,4,16,64,256,1024", show_default=True, help="Bytes to copy, over all layers.")
@click.option("--layers", default=32, show_default=True)
@click.option("--page-sizes", default="1,16,64", show_default=True)
@click.option(
    "--repeats",
    type=click.IntRange(min=2),
    default=30,
    show_default=True,
    help="Timed samples of each variant in each setting.",
)
@click.option("--warmup", default=5, show_default=True)
@click.option("--flush-mib", default=256, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--out",
    default=ROOT / "out" / "bench" / "kernels" / "copy_pages.json",
    type=click.Path(path_type=Path),
    show_default="out/bench/kernels/copy_pages.json",
)
def main(
    sizes_mib: str, layers: int, page_sizes: str, repeats: int, warmup: int, flush_mib: int, seed: int, out: Path
) -> None:
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not triton.knobs.runtime.interpret:
        click.echo(
            "copy_pages.py measures GPU memory traffic: it needs a CUDA device, and torch finds none. "
            "TRITON_INTERPRET=1 shows on a CPU that it runs.",
            err=True,
        )
        sys.exit(2)
    device = torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")
    draw = random.Random(seed)
    torch.manual_seed(seed)
    sizes = [int(float(size) * 2**20) for size in sizes_mib.split(",")]
    pools = make_pools(layers, max(sizes), flush_mib << 20, device)
    described = describe_environment(PACKAGES, device=device.type) | {
        "capability": list(torch.cuda.get_device_capability(device)) if has_gpu else None,
        "seed": seed,
        "repeats": repeats,
        "warmup": warmup,
        "flush_mib": flush_mib,
        "geometry": {"layers": layers, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "dtype": str(DTYPE)},
        "sglang_staging": pools.sglang_staging is not None,
    }
    versions = described["versions"]
    name = described["device"]["name"] if has_gpu else "no GPU, interpreted"
    click.echo(f"{name}, torch {versions['torch']}, triton {versions['triton']}")
    click.echo(f"reproduce: {described['command']}\n")
    click.echo("page  order       MiB  variant  median ms      p10      p90     GB/s  share  vs limit   host us")
    rows: list[Row] = []
    for page_size in (int(number) for number in page_sizes.split(",")):
        for order in ("contiguous", "random"):
            for size in sizes:
                tokens = size // pools.token_bytes
                if tokens == 0 or tokens % page_size:
                    continue  # not a whole page, and only ours copies parts of one
                setting = measure(pools, page_size, order, tokens, repeats=repeats, warmup=warmup, draw=draw)
                rows += setting
                show(setting)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(described | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    click.echo(f"\nevery sample: {out}")


def make_pools(layers: int, largest_bytes: int, flush_bytes: int, device: torch.device) -> Pools:
    """Pools twice the largest copy, so that random pages are spread; the source holds random bits."""
    slots = 2 * max(largest_bytes // (2 * layers * ROW_BYTES), 64)
    shape = (slots, KV_HEADS, HEAD_DIM)
    source = [torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16, device=device) for _ in range(2 * layers)]
    target = [torch.zeros(shape, dtype=DTYPE, device=device) for _ in range(2 * layers)]
    try:
        from sglang.srt.disaggregation.common.staging_buffer import StagingBuffer

        sglang_staging = StagingBuffer(largest_bytes, str(device), device.index) if device.type == "cuda" else None
    except ImportError as error:
        click.echo(f"without the variant sglang: {error}", err=True)
        sglang_staging = None
    return Pools(
        source=[buffer.view(DTYPE) for buffer in source],
        target=target,
        staging=torch.empty(largest_bytes, dtype=torch.uint8, device=device),
        flush=torch.empty(flush_bytes, dtype=torch.uint8, device=device),
        sglang_staging=sglang_staging,
    )


def measure(
    pools: Pools, page_size: int, order: str, tokens: int, *, repeats: int, warmup: int, draw: random.Random
) -> list[Row]:
    device = pools.staging.device
    lists = [page_list(buffers, page_size, order, tokens, draw) for buffers in (pools.source, pools.target)]
    source_pages, target_pages = (torch.tensor(pages, dtype=torch.int32, device=device) for pages in lists)
    variants = variants_for(pools, page_size, tokens, source_pages, target_pages)
    for variant in variants:
        if variant.is_page_copy:
            check(variant, pools, page_size, tokens, source_pages, target_pages)
    rows = {
        variant.name: Row(variant.name, page_size, order, tokens, tokens * pools.token_bytes, variant.moved_bytes)
        for variant in variants
    }
    for repeat in range(warmup + repeats):
        draw.shuffle(variants)
        for variant in variants:
            gpu_ms, host_us = sample(variant, pools.flush)
            if repeat >= warmup:
                rows[variant.name].gpu_ms.append(gpu_ms)
                rows[variant.name].host_us.append(host_us)
    return list(rows.values())


def page_list(buffers: list[torch.Tensor], page_size: int, order: str, tokens: int, draw: random.Random) -> list[int]:
    page_count = buffers[0].shape[0] // page_size
    wanted = tokens // page_size
    if order == "random":
        return draw.sample(range(page_count), wanted)
    start = draw.randrange(page_count - wanted + 1)
    return list(range(start, start + wanted))


def variants_for(
    pools: Pools, page_size: int, tokens: int, source_pages: torch.Tensor, target_pages: torch.Tensor
) -> list[Variant]:
    source = KVPool.from_tensors(pools.source, page_size=page_size)
    target = KVPool.from_tensors(pools.target, page_size=page_size)
    payload = staging_bytes(source, tokens=tokens)
    read = slots_of(source_pages, page_size=page_size, first=0, tokens=tokens)
    written = slots_of(target_pages, page_size=page_size, first=0, tokens=tokens)
    front, back = pools.staging[:payload], torch.empty(payload, dtype=torch.uint8, device=pools.staging.device)

    def staged() -> None:
        gather_pages(source, source_pages, pools.staging)
        scatter_pages(pools.staging, target, target_pages)

    def indexed() -> None:
        for src, dst in zip(pools.source, pools.target, strict=True):
            dst.index_copy_(0, written, src.index_select(0, read))

    moved_bytes = copy_pages_moved_bytes(source, tokens=tokens)
    paged = [pages_of(buffers, page_size) for buffers in (pools.source, pools.target)]
    whole_pages = [KVPool.from_tensors(buffers, page_size=1) for buffers in paged]
    planned = PlannedCopy(*whole_pages)
    both_lists = torch.cat((source_pages, target_pages))
    views = [PoolView.of_tensors(buffers) for buffers in paged]
    on_host = [pages.cpu().numpy() for pages in (source_pages, target_pages)]
    copier = DeviceCopier(pools.staging.device)
    copier.prepare(*views)

    staged_bytes = gather_pages_moved_bytes(source, tokens=tokens) + scatter_pages_moved_bytes(target, tokens=tokens)
    variants = [
        Variant("copy", moved_bytes, lambda: copy_pages(source, target, source_pages, target_pages)),
        Variant("planned", moved_bytes, lambda: planned(both_lists, len(source_pages), stream=current_stream(pools))),
        Variant("handoff", moved_bytes, lambda: copier(views[0], views[1], on_host[0], on_host[1])),
        Variant("staged", staged_bytes, staged),
        Variant("torch", 4 * payload, indexed),
        Variant(LIMIT, 2 * payload, lambda: back.copy_(front), is_page_copy=False),
    ]
    if pools.sglang_staging is not None:
        variants.append(Variant("sglang", 4 * payload, sglang_staged(pools, page_size, source_pages, target_pages)))
    return variants


def pages_of(buffers: list[torch.Tensor], page_size: int) -> list[torch.Tensor]:
    """Each buffer as [pages, page's rows ...]; slots that fill no page are left out."""
    count = buffers[0].shape[0] // page_size
    return [buffer[: count * page_size].view(count, page_size * KV_HEADS, HEAD_DIM) for buffer in buffers]


def current_stream(pools: Pools) -> int | None:
    device = pools.staging.device
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None


def sglang_staged(
    pools: Pools, page_size: int, source_pages: torch.Tensor, target_pages: torch.Tensor
) -> Callable[[], None]:
    """SGLang's pair, called as its prefill and decode sides do for equal tensor-parallel widths."""
    from sglang.srt.disaggregation.common.staging_buffer import gather_all_layers_to_staging, scatter_staging_to_kv

    source_list = source_pages.cpu().numpy()
    onto = target_pages.long()

    def run() -> None:
        gather_all_layers_to_staging(
            pools.source[: pools.layers],
            pools.source[pools.layers :],
            source_list,
            pools.sglang_staging,
            0,
            KV_HEADS,
            page_size,
        )
        scatter_staging_to_kv(
            pools.sglang_staging.buffer,
            pools.target[: pools.layers],
            pools.target[pools.layers :],
            onto,
            page_size,
            prefill_attn_tp_size=1,
            decode_attn_tp_size=1,
            dst_tp_rank=0,
            total_kv_heads=KV_HEADS,
        )

    return run


def check(
    variant: Variant,
    pools: Pools,
    page_size: int,
    tokens: int,
    source_pages: torch.Tensor,
    target_pages: torch.Tensor,
) -> None:
    """Raise `RuntimeError` where a variant leaves the target other than plain indexing does, in any bit."""
    for dst in pools.target:
        dst.zero_()
    variant.run()
    read = slots_of(source_pages, page_size=page_size, first=0, tokens=tokens)
    written = slots_of(target_pages, page_size=page_size, first=0, tokens=tokens)
    for number, (src, dst) in enumerate(zip(pools.source, pools.target, strict=True)):
        expected = torch.zeros_like(dst).view(torch.int16)
        expected[written] = src.view(torch.int16)[read]
        if not torch.equal(dst.view(torch.int16), expected):
            raise RuntimeError(
                f"Variant {variant.name!r} copied {tokens} tokens in pages of {page_size} wrongly in buffer {number}. "
                "Run `pytest test/kernels` on this machine."
            )


def sample(variant: Variant, flush: torch.Tensor) -> tuple[float, float]:
    """(milliseconds on the stream, microseconds of the call) of one run."""
    if flush.device.type != "cuda":
        called = time.perf_counter()
        variant.run()
        seconds = time.perf_counter() - called
        return seconds * 1e3, seconds * 1e6
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    flush.zero_()
    start.record()
    called = time.perf_counter()
    variant.run()
    returned = time.perf_counter()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end), (returned - called) * 1e6


def show(setting: list[Row]) -> None:
    limit = next(row for row in setting if row.variant == LIMIT)
    for row in sorted(setting, key=lambda row: row.median_ms):
        low, *_, high = (
            statistics.quantiles(row.gpu_ms, n=10, method="inclusive") if len(row.gpu_ms) > 1 else row.gpu_ms * 2
        )
        rate = row.moved_bytes / row.median_ms
        share = rate / (limit.moved_bytes / limit.median_ms)
        mib = row.payload_bytes / 2**20
        click.echo(
            f"{row.page_size:4}  {row.order:10} {mib:4.4g}  {row.variant:7} {row.median_ms:10.4f} "
            f"{low:8.4f} {high:8.4f} {rate / 1e6:8.0f} {share:6.1%} {row.median_ms / limit.median_ms:8.2f}x "
            f"{statistics.median(row.host_us):9.0f}"
        )


if __name__ == "__main__":
    main()

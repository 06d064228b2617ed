"""What does attention cost for a few new tokens over a cached prefix: SGLang's `torch_native`, and ours in its place?

One layer in the shape of SmolLM2-135M (9 heads, 3 KV heads, head size 64), float32, one thread, the two taking turns.
The answers are compared before anything is timed. Prints a table; needs no server.

    python benchmark/kernels/cpu_attention.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import click
import torch
from sglang.srt.plugins import load_plugins

load_plugins()

from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend  # noqa: E402

from sglang_prefillshare.host.cpu_attention import run_sdpa_forward_extend  # noqa: E402

HEADS, KV_HEADS, HEAD_DIM, SLOTS = 9, 3, 64, 12_000
CASES = ((0, 512), (512, 64), (2048, 64), (8192, 64))
"""(cached tokens, new tokens)"""


@click.command(help=__doc__)
@click.option("--repeats", default=15, show_default=True)
def main(repeats: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    key, value = (torch.randn(SLOTS, KV_HEADS, HEAD_DIM) for _ in range(2))
    original = TorchNativeAttnBackend._run_sdpa_forward_extend
    click.echo("cached   new   torch_native ms        ours ms   ratio")
    for cached, new in CASES:
        query = torch.randn(new, HEADS, HEAD_DIM)
        slots = torch.randperm(SLOTS)[: cached + new].unsqueeze(0)
        rest = (key, value, slots, *(torch.tensor([n]) for n in (0, cached + new, cached, new)))
        settings = {"scaling": HEAD_DIM**-0.5, "enable_gqa": True, "causal": True}
        arguments = (None, query, torch.empty_like(query), *rest)
        theirs = partial(original, *arguments, **settings)
        ours = partial(run_sdpa_forward_extend, original, *arguments, **settings)
        torch.testing.assert_close(ours().clone(), theirs(), atol=2e-6, rtol=1e-5)
        pairs = [(milliseconds(theirs), milliseconds(ours)) for _ in range(repeats)]
        before, after = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        click.echo(f"{cached:6} {new:5} {before:17.2f} {after:14.2f} {ratio:7.1f}")


def milliseconds(function: Callable[[], torch.Tensor]) -> float:
    started = time.perf_counter()
    function()
    return (time.perf_counter() - started) * 1000


if __name__ == "__main__":
    main()

"""What do SGLang's own CPU operators cost, and ours in their place: attention, and products with weights?

One layer in the shape of SmolLM2-135M (9 heads, 3 KV heads, head size 64, hidden size 576), one thread, the two taking
turns. The answers are compared before anything is timed. Prints tables; needs no server.

    python benchmark/kernels/cpu_operators.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import click
import torch
from sglang.srt.plugins import load_plugins

load_plugins()

from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend  # noqa: E402

from sglang_prefillshare.host.cpu.attention import run_sdpa_forward_decode, run_sdpa_forward_extend  # noqa: E402
from sglang_prefillshare.host.cpu.linear import apply  # noqa: E402

HEADS, KV_HEADS, HEAD_DIM, SLOTS, HIDDEN, INTERMEDIATE = 9, 3, 64, 12_000, 576, 1536
EXTEND = ((0, 512), (512, 64), (2048, 64), (8192, 64))
"""(cached tokens, new tokens)"""
DECODE = ((1, 512), (1, 2048), (8, 512), (8, 2048))
"""(requests, tokens of each)"""
TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024)

Call = Callable[[], torch.Tensor]
Case = tuple[str, Call, Call]


@click.command(help=__doc__)
@click.option("--repeats", default=15, show_default=True)
def main(repeats: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    show("attention of new tokens over a cached prefix, float32", extend(), repeats, 2e-6)
    show("attention of decode, float32", decode(torch.float32), repeats, 2e-6)
    show("attention of decode, bfloat16", decode(torch.bfloat16), repeats, 1e-2)
    show("products with weights, float32", linear(torch.float32), repeats, 1e-4)
    show("products with weights, bfloat16", linear(torch.bfloat16), repeats, 2e-2)


def show(title: str, cases: Iterator[Case], repeats: int, tolerance: float) -> None:
    click.echo(f"\n{title}\n{'':32} {'SGLang ms':>10} {'ours ms':>10} {'ratio':>7}")
    for name, theirs, ours in cases:
        torch.testing.assert_close(ours().clone(), theirs(), atol=tolerance, rtol=1e-2)
        pairs = [(milliseconds(theirs), milliseconds(ours)) for _ in range(repeats)]
        before, after = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        click.echo(f"{name:32} {before:10.2f} {after:10.2f} {ratio:7.1f}")


def extend() -> Iterator[Case]:
    key, value = (torch.randn(SLOTS, KV_HEADS, HEAD_DIM) for _ in range(2))
    original = TorchNativeAttnBackend._run_sdpa_forward_extend
    for cached, new in EXTEND:
        query = torch.randn(new, HEADS, HEAD_DIM)
        slots = torch.randperm(SLOTS)[: cached + new].unsqueeze(0)
        rest = (key, value, slots, *(torch.tensor([n]) for n in (0, cached + new, cached, new)))
        settings: dict[str, Any] = {"scaling": HEAD_DIM**-0.5, "enable_gqa": True, "causal": True}
        arguments = (None, query, torch.empty_like(query), *rest)
        yield (
            f"{cached} cached, {new} new tokens",
            partial(original, *arguments, **settings),
            partial(run_sdpa_forward_extend, original, *arguments, **settings),
        )


def decode(dtype: torch.dtype) -> Iterator[Case]:
    key, value = (torch.randn(SLOTS, KV_HEADS, HEAD_DIM).to(dtype) for _ in range(2))
    original = TorchNativeAttnBackend._run_sdpa_forward_decode
    for requests, length in DECODE:
        query = torch.randn(requests, HEADS, HEAD_DIM).to(dtype)
        slots = torch.stack([torch.randperm(SLOTS)[:length] for _ in range(requests)])
        rest = (key, value, slots, torch.arange(requests), torch.full((requests,), length))
        settings: dict[str, Any] = {"scaling": HEAD_DIM**-0.5, "enable_gqa": True}
        found, wanted = torch.empty_like(query), torch.empty_like(query)
        theirs = partial(original, None, query, wanted, *rest, **settings)
        ours = partial(run_sdpa_forward_decode, original, None, query, found, *rest, **settings)
        yield f"{requests} of {length} tokens", then(theirs, wanted), then(ours, found)


def linear(dtype: torch.dtype) -> Iterator[Case]:
    shapes = (
        (HIDDEN + 2 * KV_HEADS * HEAD_DIM, HIDDEN),
        (HIDDEN, HIDDEN),
        (2 * INTERMEDIATE, HIDDEN),
        (HIDDEN, INTERMEDIATE),
    )
    # Of 30 layers, as in the model: the weights come from memory and not from the cache of the call before.
    layers = [[SimpleNamespace(weight=torch.randn(shape).to(dtype) * 0.02) for shape in shapes] for _ in range(30)]

    def plain(_self: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.nn.functional.linear(x, layer.weight, bias)

    for tokens in TOKENS:
        inputs = {width: torch.randn(tokens, width).to(dtype) for width in (HIDDEN, INTERMEDIATE)}

        def run(function: Callable[..., torch.Tensor], inputs: dict[int, torch.Tensor] = inputs) -> torch.Tensor:
            found = [function(None, each, inputs[each.weight.shape[1]], None) for layer in layers for each in layer]
            return found[-1]

        yield f"{tokens} tokens, 30 layers", partial(run, plain), partial(run, partial(apply, plain))


def then(call: Call, found: torch.Tensor) -> Call:
    """The call, whose answer is what it wrote to `found`."""

    def run() -> torch.Tensor:
        call()
        return found

    return run


def milliseconds(function: Call) -> float:
    started = time.perf_counter()
    function()
    return (time.perf_counter() - started) * 1000


if __name__ == "__main__":
    main()

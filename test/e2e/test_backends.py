"""The oracle holds over every transfer backend, architecture and page size that we claim.

`make test` runs one topology that differs from the shared one in all of them; `make test-slow` runs the full set: 8
topologies of 26 prompts each, 208 prompts of 2 to 1,500 tokens.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sglang_prefillshare.deployment import Deployment
from test.support.device import ON_GPU
from test.support.models import Arch, make_base, make_decode_module
from test.support.oracle import Oracle, clear_prompt
from test.support.servers import (
    deploy,
    greedy,
    launch_server,
    pairing,
    post,
    post_pair,
    session,
    topology,
    until_idle,
)

NEW_TOKENS = 16
FEW_LENGTHS = (1, 2, 16, 17, 33, 65, 200, 700)
ALL_LENGTHS = (
    2,
    3,
    5,
    8,
    15,
    16,
    17,
    18,
    31,
    32,
    33,
    48,
    63,
    64,
    65,
    66,
    100,
    128,
    129,
    200,
    333,
    512,
    700,
    1000,
    1300,
    1500,
)


@dataclass(frozen=True, slots=True)
class Setup:
    """A topology of one prefill and one decode worker."""

    backend: str
    arch: Arch
    tied: bool
    page_size: int
    chunk: int | None
    attention: str | None = None
    flags: tuple[str, ...] = ()

    def __str__(self) -> str:
        tied = "tied" if self.tied else "untied"
        more = [name for name in (self.attention, *self.flags) if name is not None]
        return "-".join((self.backend, self.arch, tied, f"page{self.page_size}", f"chunk{self.chunk}", *more))

    @property
    def args(self) -> dict[str, Any]:
        args: dict[str, Any] = {"disaggregation-transfer-backend": self.backend, "page-size": self.page_size}
        if self.chunk is not None:
            args["chunked-prefill-size"] = self.chunk
        if self.attention is not None:
            args["attention-backend"] = self.attention
        return args | dict.fromkeys(self.flags, True)


def nixl(setup: Setup, *more: pytest.MarkDecorator) -> Any:
    return pytest.param(setup, marks=[pytest.mark.nixl, *more], id=str(setup))


def ours(setup: Setup, *more: pytest.MarkDecorator) -> Any:
    return pytest.param(setup, marks=list(more), id=str(setup))


slow = pytest.mark.slow
FAST = [nixl(Setup("nixl", "qwen3", tied=True, page_size=16, chunk=64))]
FULL = [
    ours(Setup("prefillshare", "llama", tied=False, page_size=1, chunk=64), slow),
    ours(Setup("prefillshare", "llama", tied=True, page_size=16, chunk=64), slow),
    ours(Setup("prefillshare", "qwen3", tied=False, page_size=16, chunk=None), slow),
    ours(Setup("prefillshare", "qwen3", tied=True, page_size=1, chunk=64), slow),
    nixl(Setup("nixl", "llama", tied=False, page_size=16, chunk=64), slow),
    nixl(Setup("nixl", "llama", tied=True, page_size=1, chunk=64), slow),
    nixl(Setup("nixl", "qwen3", tied=False, page_size=1, chunk=None), slow),
    nixl(Setup("nixl", "qwen3", tied=True, page_size=16, chunk=64), slow),
]
EAGER = ("disable-overlap-schedule", "disable-decode-cuda-graph", "disable-prefill-cuda-graph")
GPU = [
    ours(Setup("prefillshare", "llama", tied=False, page_size=64, chunk=256, attention="fa3"), pytest.mark.gpu),
    ours(Setup("prefillshare", "qwen3", tied=True, page_size=1, chunk=64, attention="triton"), pytest.mark.gpu),
    ours(
        Setup("prefillshare", "llama", tied=False, page_size=1, chunk=None, attention="triton", flags=EAGER),
        pytest.mark.gpu,
    ),
    ours(Setup("prefillshare", "llama", tied=False, page_size=1, chunk=64, attention="flashinfer"), pytest.mark.gpu),
]
"""Everything else that a GPU shows is the default: overlap scheduling, and CUDA graphs in both phases."""


def check(setup: Setup, folder: Path, lengths: tuple[int, ...]) -> None:
    base = make_base(folder / "base", setup.arch, tied=setup.tied, seed=11)
    coder = make_decode_module(folder / "coder", base, seed=12)
    oracle = Oracle(base, coder)
    prompts = [clear_prompt(oracle, length, NEW_TOKENS, seed=length) for length in lengths]
    with deploy(topology(base, {"coder": coder}, args=setup.args)) as running:
        for answers in (asyncio.run(ask_all(running, prompts)), asyncio.run(ask_all(running, prompts))):
            # The second time prefill finds its pages: a floor to whole pages, and at least one token is computed.
            for prompt, answer in zip(prompts, answers, strict=True):
                oracle.check(prompt, answer.token_ids, NEW_TOKENS)
        for prompt, answer in zip(prompts, answers, strict=True):
            floor = max(0, len(prompt) - 2) // setup.page_size * setup.page_size
            assert answer.body["meta_info"]["cached_tokens"] == floor


async def ask_all(running: Deployment, prompts: list[list[int]]) -> list[Any]:
    gate = asyncio.Semaphore(8)
    prefill, decode = running.worker("base"), running.worker("coder")
    async with session() as client:

        async def ask(prompt: list[int]) -> Any:
            async with gate:
                return (await post_pair(client, prefill, decode, "/generate", greedy(prompt, NEW_TOKENS)))[1]

        answers = await asyncio.gather(*(ask(prompt) for prompt in prompts))
        await until_idle(client, running.workers)
        return answers


@pytest.fixture(autouse=True)
def _needs_nixl(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("nixl"):
        pytest.importorskip("nixl", reason="waits for the packages nixl and nixl-cu13: run `make setup`")


@pytest.mark.timeout(400)
@pytest.mark.parametrize("setup", FAST)
def test_a_few_prompts_equal_the_oracle(setup: Setup, tmp_path: Path) -> None:
    check(setup, tmp_path, FEW_LENGTHS)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("setup", GPU)
def test_a_few_prompts_equal_the_oracle_on_a_gpu(setup: Setup, tmp_path: Path) -> None:
    if not ON_GPU:
        pytest.skip("waits for a CUDA device")
    if setup.attention == "flashinfer":
        pytest.importorskip("flashinfer", reason="waits for the package flashinfer")
    check(setup, tmp_path, FEW_LENGTHS)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("setup", FULL)
def test_many_prompts_equal_the_oracle(setup: Setup, tmp_path: Path) -> None:
    check(setup, tmp_path, ALL_LENGTHS)


@pytest.mark.slow
@pytest.mark.nixl
@pytest.mark.timeout(400)
def test_a_plain_decode_worker_gets_an_error_and_not_the_bases_token(tmp_path: Path) -> None:
    """SGLang's own decode would take what prefill sampled as its first token: the masked room number stops it."""
    base = make_base(tmp_path / "base", seed=11)
    coder = make_decode_module(tmp_path / "coder", base, seed=12)
    over_nixl = {"disaggregation-transfer-backend": "nixl"}
    plain_decode = ["--disaggregation-mode", "decode", "--disaggregation-transfer-backend", "nixl"]
    plain_decode += ["--disaggregation-decode-retraction-backup", "cpu_tensor"]

    async def run(running: Deployment, url: str) -> Any:
        prefill = running.worker("base")
        async with session() as client:
            body = greedy(list(range(10, 60)), 4, rid="plain") | pairing(prefill)
            leg = asyncio.create_task(post(client, f"{prefill.url}/generate", body))
            answer = await post(client, f"{url}/generate", body)
            async with client.post(f"{prefill.url}/abort_request", json={"rid": "plain"}):
                await leg
            await until_idle(client, running.workers)
            return answer

    with deploy(topology(base, {"coder": coder}, args=over_nixl)) as running, launch_server(coder, plain_decode) as url:
        answer = asyncio.run(run(running, url))
    assert answer.status == 500, answer

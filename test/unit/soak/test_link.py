"""The storm's links: what they pass on, and how they break where a request asks for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import aiohttp
import pytest
from aiohttp import web

from test.soak.link import FAULT_HEADER, Breaks, LinkFault, Links, Way

ANSWER = b"x" * 2000

Ask = Callable[[LinkFault | None], Awaitable[bytes]]


def behind_a_link(links: Links, role: str, do: Callable[[Ask], Awaitable[None]]) -> None:
    """A worker of `role` that reads a request to its end and answers `ANSWER`, asked through a link."""

    async def run() -> None:
        async def answer(request: web.Request) -> web.Response:
            await request.read()
            return web.Response(body=ANSWER)

        app = web.Application()
        app.router.add_post("/generate", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        [address] = runner.addresses
        try:
            async with links.to(f"http://127.0.0.1:{address[1]}", role) as url, aiohttp.ClientSession() as client:

                async def ask(fault: LinkFault | None) -> bytes:
                    headers = {} if fault is None else {FAULT_HEADER: fault.header()}
                    async with client.post(f"{url}/generate", data=b"y" * 500, headers=headers) as response:
                        return await response.read()

                await do(ask)
        finally:
            await runner.cleanup()

    asyncio.run(run())


def fault(breaks: Breaks, *, way: Way = Way.ANSWER, after_bytes: int = 300, is_lasting: bool = False) -> LinkFault:
    return LinkFault(7, "decode", breaks, way, after_bytes, stall_s=0.3, is_lasting=is_lasting)


def test_a_fault_survives_its_header() -> None:
    made = LinkFault(3, "prefill", Breaks.STALL, Way.REQUEST, 17, stall_s=0.25, is_lasting=True)
    assert LinkFault.parse(made.header()) == made


@pytest.mark.parametrize("breaks", [Breaks.RESET, Breaks.CLOSE])
@pytest.mark.parametrize("way", list(Way))
def test_a_link_breaks_once_and_only_for_the_request_that_asks_for_it(breaks: Breaks, way: Way) -> None:
    links = Links()

    async def do(ask: Ask) -> None:
        assert await ask(None) == ANSWER
        with pytest.raises(aiohttp.ClientError):
            await ask(fault(breaks, way=way))
        assert await ask(fault(breaks, way=way)) == ANSWER  # another try of the same request
        assert await ask(None) == ANSWER

    behind_a_link(links, "decode", do)
    assert links.happened == {f"decode {way} {breaks}": 1}
    assert links.open_count == 0


def test_a_lasting_fault_meets_every_try_and_another_role_none() -> None:
    links = Links()

    async def do(ask: Ask) -> None:
        for _ in range(2):
            with pytest.raises(aiohttp.ClientError):
                await ask(fault(Breaks.RESET, is_lasting=True))

    async def other(ask: Ask) -> None:
        assert await ask(fault(Breaks.RESET, is_lasting=True)) == ANSWER

    behind_a_link(links, "decode", do)
    behind_a_link(links, "prefill", other)
    assert links.happened == {"decode answer reset": 2}


@pytest.mark.parametrize("way", list(Way))
def test_a_stall_passes_and_a_dead_link_does_not(way: Way) -> None:
    links = Links()

    async def do(ask: Ask) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(ask(fault(Breaks.STALL, way=way, is_lasting=True)), timeout=0.1)
        assert await ask(fault(Breaks.STALL, way=way, is_lasting=True)) == ANSWER
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(ask(fault(Breaks.DEAD, way=way, is_lasting=True)), timeout=0.6)

    behind_a_link(links, "decode", do)
    assert links.happened == {f"decode {way} stall": 2, f"decode {way} dead": 1}
    assert links.open_count == 0

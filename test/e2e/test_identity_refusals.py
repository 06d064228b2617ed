"""KV of another base is refused in the handshake, and every worker says whose KV it writes or reads."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from sglang_prefillshare.deployment import Deployment
from test.support.models import make_base, make_decode_module
from test.support.servers import Answer, greedy, launch_server, pairing, post, session, until_idle


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A decode worker whose module was trained on another base of the same shape."""
    folder = tmp_path_factory.mktemp("stranger")
    other = make_base(folder / "other", "llama", tied=False, seed=99)
    module = make_decode_module(folder / "module", other, seed=98)
    with launch_server(module, ["--prefill-share-role", "decode", "--prefill-share-base", str(other)]) as url:
        yield url


def test_a_decode_worker_of_another_base_is_refused_in_the_handshake(deployment: Deployment, stranger: str) -> None:
    prefill = deployment.worker("base")

    async def run() -> list[Answer]:
        async with session() as client:
            found = []
            for _ in range(2):  # refused every time, and the decode worker survives it
                body = greedy(list(range(10, 60)), 4, rid="refused") | pairing(prefill)
                leg = asyncio.create_task(post(client, f"{prefill.url}/generate", body))
                found.append(await post(client, f"{stranger}/generate", body))
                async with client.post(f"{prefill.url}/abort_request", json={"rid": "refused"}):
                    await leg
            await until_idle(client, deployment.workers)
            return found

    for answer in asyncio.run(run()):
        assert answer.status == 500
        reason = json.dumps(answer.body)
        assert "serves base psk1-" in reason and "was fine-tuned on psk1-" in reason and "of its own base" in reason


def test_workers_describe_their_base(deployment: Deployment, stranger: str) -> None:
    async def run() -> list[dict[str, Any]]:
        urls = [*(worker.url for worker in deployment.workers), stranger]
        async with session() as client:
            found = []
            for url in urls:
                async with client.get(f"{url}/prefill_share") as response:
                    found.append(await response.json())
            return found

    *ours, other = asyncio.run(run())
    assert {info["base_fingerprint"] for info in ours} != {other["base_fingerprint"]}
    assert len({info["base_fingerprint"] for info in ours}) == 1
    assert [info["role"] for info in ours] == ["prefill", "decode", "decode", "decode"]
    assert {info["kv_dtype"] for info in ours} == {"float32"}

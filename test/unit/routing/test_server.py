"""The router as a process: it listens, serves, and ends on a signal."""

import asyncio
import signal
import socket
import sys

import pytest

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.routing.config import RouterConfig
from sglang_prefillshare.routing.server import serve
from test.unit.routing.routing_harness import run, running_system, until

PROGRAM = """
import sys
from sglang_prefillshare.routing.config import RouterConfig
from sglang_prefillshare.routing.server import serve
serve(RouterConfig(prefill=[sys.argv[2]], decode={"planner": [sys.argv[3]]}, port=int(sys.argv[1]),
                   poll_interval_s=0.05, stop_grace_s=0.1))
print("returned", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_calls_in_flight_and_serve_returns(number):
    async def scenario():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        async with running_system(decode={"planner": 1}) as system:
            prefill, decode = system.prefill[0], system.decode["planner"][0]
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", PROGRAM, str(port), prefill.url, decode.url), stdout=asyncio.subprocess.PIPE
            )
            try:
                system.url = f"http://127.0.0.1:{port}"
                async with asyncio.timeout(15):
                    while True:
                        try:
                            if (await system.get("/health")).status == 200:
                                break
                        except OSError:
                            pass
                        await asyncio.sleep(0.05)
                prefill.behave = decode.behave = "hang"
                client = asyncio.create_task(system.chat())
                await decode.arrived.wait()
                process.send_signal(number)
                answer = await client
                assert answer.status == 503 and "stopping" in answer.error
                output, _ = await process.communicate()
                assert output == b"returned\n"
                assert process.returncode == 0
                await until(lambda: bool(decode.aborted and prefill.aborted))
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()

    run(scenario())


def test_an_address_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = RouterConfig(prefill=["http://127.0.0.1:1"], decode={"planner": ["http://127.0.0.1:2"]}, port=port)
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port}"):
            serve(config)

"""Runs the router's app on uvicorn and uvloop, and ends it in an orderly way."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Final

import uvicorn
from starlette.applications import Starlette

from sglang_prefillshare.bounded_http import BoundedHttpProtocol
from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.routing.app import Router, create_app
from sglang_prefillshare.routing.config import RouterConfig

_KEEP_ALIVE_S: Final = 75
"""Clients close idle connections before this, rather than sending a request into one that we are closing."""
_ACCEPTED_PER_TURN: Final = 16
_GC_THRESHOLDS: Final = (20_000, 20, 50)
"""Python's own are for programs that make little garbage. A request makes thousands of objects, all of which go without
the collector; looking for what does not, so often, took a fifth of a short stream's time."""

logger = logging.getLogger(__name__)


class RouterServer(uvicorn.Server):
    """On SIGINT or SIGTERM: refuse new requests, give those in flight `stop_grace_s`, then end their legs."""

    def __init__(self, app: Starlette, config: RouterConfig) -> None:
        self._router: Router = app.state.router
        self._stop_grace_s = config.stop_grace_s
        super().__init__(
            uvicorn.Config(
                app,
                host=config.host,
                port=config.port,
                loop="uvloop",
                http=BoundedHttpProtocol,
                ws="none",
                proxy_headers=False,
                lifespan="on",
                access_log=False,
                log_config=None,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                # The legs end at stop_grace_s, and their answers need a moment to leave.
                timeout_graceful_shutdown=max(1, round(config.stop_grace_s + 2 * config.abort_timeout_s)),
            )
        )

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's. libuv accepts one connection of each listening descriptor in a turn of the loop, so under load
        new clients would wait for seconds: each socket has several descriptors."""
        await super().serve([twin for one in sockets or () for twin in (one, *_twins(one))] or None)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        async with asyncio.TaskGroup() as group:
            ending = group.create_task(self._end_legs())
            await super().shutdown(sockets)
            ending.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but the signal is not raised again afterwards: `serve` returns to its caller."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def _end_legs(self) -> None:
        self._router.dispatcher.refuse_new()
        await asyncio.sleep(self._stop_grace_s)
        if self._router.pool.leg_count:
            logger.warning("stopping: ending the requests still in flight after %g s", self._stop_grace_s)
        self._router.dispatcher.stop()


def _twins(listener: socket.socket) -> Iterator[socket.socket]:
    return (listener.dup() for _ in range(_ACCEPTED_PER_TURN - 1))


def serve(config: RouterConfig, *, router: Router | None = None) -> None:
    """Run the router until SIGINT or SIGTERM. Raises `ConfigError` if its address cannot be bound."""
    server = RouterServer(create_app(config, router=router), config)
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((config.host, config.port))
        except OSError as error:
            raise ConfigError(
                f"The router cannot listen on {config.host}:{config.port}: {error.strerror}. Choose another."
            ) from error
        logger.info("router listens on http://%s:%d", *listener.getsockname()[:2])
        gc.collect()
        gc.freeze()  # what was imported is never garbage
        gc.set_threshold(*_GC_THRESHOLDS)
        server.run(sockets=[listener])

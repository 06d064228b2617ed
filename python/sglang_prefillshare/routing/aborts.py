"""Abort messages: what a worker is told of a leg that is left before its answer was read."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import aiohttp

from sglang_prefillshare.routing.config import RouterConfig
from sglang_prefillshare.routing.telemetry import Metrics
from sglang_prefillshare.routing.workers import Worker

logger = logging.getLogger(__name__)


class Aborts:
    """Sends abort messages in `background`, which is the app's, so that they survive the request they belong to."""

    def __init__(
        self, config: RouterConfig, *, metrics: Metrics, session: aiohttp.ClientSession, background: asyncio.TaskGroup
    ) -> None:
        self._config = config
        self._metrics = metrics
        self._session = session
        self._background = background

    def start(self, worker: Worker, rids: Sequence[str], authorization: str | None) -> None:
        abort = self._tell(worker, rids, authorization)
        try:
            self._background.create_task(abort)
        except RuntimeError:  # the app is already down
            abort.close()

    async def _tell(self, worker: Worker, rids: Sequence[str], authorization: str | None) -> None:
        """Tell a worker to drop its leg. Closing the connection alone lets SGLang find out seconds later."""
        headers = {}
        if self._config.worker_api_key is not None:
            headers["authorization"] = f"Bearer {self._config.worker_api_key}"
        elif authorization is not None:
            headers["authorization"] = authorization
        timeout = aiohttp.ClientTimeout(total=self._config.abort_timeout_s)
        for rid in rids:
            try:
                async with self._session.post(
                    worker.url + "/abort_request", json={"rid": rid}, headers=headers, timeout=timeout
                ) as response:
                    await response.read()
                    is_confirmed = response.status == 200
            except Exception as error:  # the leg is lost either way, and nobody waits for this task
                logger.debug("abort of %s at %s: %r", rid, worker.url, error)
                is_confirmed = False
            if not is_confirmed:
                self._metrics.abort_failures.labels(worker.role).inc()
                return

"""Modules that come and go while the router serves: adapters, loaded on all workers that serve adapters, or on none.

A worker checks the adapter itself, against its manifest and against what SGLang can serve; its refusal is passed on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

import aiohttp

from sglang_prefillshare.routing import _json
from sglang_prefillshare.routing.config import RouterConfig
from sglang_prefillshare.routing.membership import MODULE_NAME_RULE, is_module_name
from sglang_prefillshare.routing.workers import Worker, WorkerPool

logger = logging.getLogger(__name__)

RESTORE_AGAIN_S: Final = 60.0
"""After a worker refused an adapter that the others have, until it is asked again."""


class ModuleError(Exception):
    """Why modules stay as they are, or what went wrong on the way; `status` is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class _Loaded:
    path: str
    base: str | None


@dataclass(frozen=True, slots=True)
class _Answer:
    worker: Worker
    status: int
    text: str

    @property
    def is_ok(self) -> bool:
        return self.status == HTTPStatus.OK


class Adapters:
    """Loads and unloads adapters on the pool's workers.

    `poll` brings what the router knows of a worker up to date; `on_dropped` is told of each module that is gone.
    """

    def __init__(
        self,
        config: RouterConfig,
        *,
        pool: WorkerPool,
        session: aiohttp.ClientSession,
        poll: Callable[[Worker], Awaitable[None]],
        on_dropped: Callable[[str], None],
        group: asyncio.TaskGroup,
    ) -> None:
        self._config = config
        self._pool = pool
        self._session = session
        self._poll = poll
        self._on_dropped = on_dropped
        self._group = group
        self._loaded: dict[str, _Loaded] = {}
        self._changing: set[str] = set()
        self._restoring: set[tuple[Worker, str]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._restore_at: dict[tuple[Worker, str], float] = {}

    async def load(self, name: str, path: str, *, base: str | None = None) -> list[Worker]:
        """Load the adapter at `path`, on the workers' machines, as module `name`; returns who has it.

        All workers that serve adapters take it, or none keeps it. `base` chooses among them where they are of several
        bases. Raises `ModuleError`; what a worker said is its message then.
        """
        if not is_module_name(name):
            raise ModuleError(HTTPStatus.BAD_REQUEST, f"{name!r} cannot name a decode module: {MODULE_NAME_RULE}")
        if not path:
            raise ModuleError(HTTPStatus.BAD_REQUEST, "path is empty, wanted the adapter's folder on the workers.")
        if name in self._pool.modules:
            raise ModuleError(
                HTTPStatus.CONFLICT, f"The module {name!r} is served already. Delete it first, or choose another name."
            )
        with self._changing_alone(name):
            workers = self._candidates(base)
            was_withdrawn = name in self._pool.withdrawn
            self._pool.withdrawn.add(name)  # nobody is to ask for it before all have it
            is_loaded = False
            try:
                await self._unload(name, [worker for worker in workers if name in (worker.adapters or ())])
                answers = await self._tell_all(workers, "/load_lora_adapter", {"lora_name": name, "lora_path": path})
                refused = next((answer for answer in answers if not answer.is_ok), None)
                if refused is not None:
                    # One that gave no clear answer may have it too.
                    await self._unload(name, [a.worker for a in answers if a.status != HTTPStatus.BAD_REQUEST])
                    raise _passed_on(refused, f"loading the module {name!r}")
                is_loaded = True
            finally:
                if not is_loaded and not was_withdrawn:
                    self._pool.withdrawn.discard(name)
            self._loaded[name] = _Loaded(path, workers[0].base)
            self._pool.add_module(name, workers)
            logger.info("module %r: loaded on %s", name, ", ".join(worker.url for worker in workers))
            return workers

    async def unload(self, name: str) -> list[Worker]:
        """Stop new requests for a module, let those under way finish, and unload it; returns who had it."""
        if name not in self._pool.modules:
            raise ModuleError(
                HTTPStatus.NOT_FOUND, f"There is no module {name!r}. The decode modules are: {self._names()}."
            )
        workers = self._pool.decode[name]
        own = next((worker for worker in workers if worker.info is not None and worker.adapters is None), None)
        if own is not None:
            raise ModuleError(
                HTTPStatus.BAD_REQUEST,
                f"The module {name!r} is no adapter: {own.url} serves it with weights of its own. "
                f"Take that worker out: DELETE /admin/workers?url={own.url}",
            )
        if not any(worker.adapters is not None for worker in workers):
            raise ModuleError(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"No worker of the module {name!r} has said yet whether it is an adapter. Ask again once one is ready.",
            )
        with self._changing_alone(name):
            self._pool.withdrawn.add(name)
            self._loaded.pop(name, None)
            await self._pool.under_way.none_left(name, timeout_s=self._config.drain_deadline_s)
            holders = [w for w in self._pool.decode.get(name, ()) if w.is_reachable and name in (w.adapters or ())]
            answers = await self._unload(name, holders)
            self._pool.drop_module(name)
            self._on_dropped(name)
            refused = next((answer for answer in answers if not answer.is_ok), None)
            if refused is not None:
                raise _passed_on(refused, f"the module {name!r} gets no requests any more, but unloading it")
            logger.info("module %r: unloaded", name)
            return holders

    def restore(self, worker: Worker) -> None:
        """Give a worker that came, or came back, the adapters that the others were given."""
        if worker.adapters is None or not worker.is_ready:
            return
        for name, loaded in self._loaded.items():
            key = (worker, name)
            if name in worker.adapters or name in self._changing or key in self._restoring:
                continue
            if loaded.base == worker.base and time.monotonic() >= self._restore_at.get(key, 0.0):
                self._restoring.add(key)
                task = self._group.create_task(self._restore(worker, name, loaded))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    def forget(self, worker: Worker) -> None:
        self._restore_at = {key: at for key, at in self._restore_at.items() if key[0] is not worker}

    def stop(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _restore(self, worker: Worker, name: str, loaded: _Loaded) -> None:
        try:
            body = {"lora_name": name, "lora_path": loaded.path}
            [answer] = await self._tell_all([worker], "/load_lora_adapter", body)
            if not answer.is_ok:
                self._restore_at[worker, name] = time.monotonic() + RESTORE_AGAIN_S
                logger.error("%s does not take the module %r, which others have: %s", worker.label, name, answer.text)
            elif self._loaded.get(name) == loaded:
                self._pool.add_module(name, [worker])
                logger.info("module %r: loaded on %s, which came later", name, worker.url)
            else:  # taken away meanwhile
                await self._unload(name, [worker])
        except Exception:  # a bug of ours must not end the router
            logger.exception("giving the module %r to the %s failed", name, worker.label)
        finally:
            self._restoring.discard((worker, name))

    # -- workers

    def _candidates(self, base: str | None) -> list[Worker]:
        """The workers that serve adapters, all of one base."""
        having = [worker for worker in self._pool if worker.adapters is not None]
        if not having:
            raise ModuleError(
                HTTPStatus.BAD_REQUEST,
                "No decode worker here serves adapters. Start one on the base with --lora-paths, or serve the module "
                "with a worker of its own and add that: POST /admin/workers.",
            )
        ready = [worker for worker in having if worker.is_ready]
        bases = list(dict.fromkeys(worker.base for worker in ready if worker.base is not None))
        if base is None and len(bases) > 1:
            raise ModuleError(
                HTTPStatus.BAD_REQUEST,
                f"The workers that serve adapters are of several bases. Name the module's as base: {', '.join(bases)}.",
            )
        chosen = [worker for worker in ready if base in (None, worker.base)]
        if not chosen:
            of = "" if base is None else f" of the base {base}"
            states = "; ".join(f"{worker.url} is {worker.status}, of {worker.base}" for worker in having)
            raise ModuleError(HTTPStatus.SERVICE_UNAVAILABLE, f"No worker{of} that serves adapters is ready: {states}.")
        return chosen

    async def _unload(self, name: str, workers: Sequence[Worker]) -> list[_Answer]:
        return await self._tell_all(workers, "/unload_lora_adapter", {"lora_name": name})

    async def _tell_all(self, workers: Sequence[Worker], path: str, body: dict[str, Any]) -> list[_Answer]:
        """Tell all at once, and look at each again afterwards, so that what the router knows of it is right."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._tell(worker, path, body)) for worker in workers]
        async with asyncio.TaskGroup() as group:
            for worker in workers:
                group.create_task(_awaited(self._poll(worker)))
        return [task.result() for task in tasks]

    async def _tell(self, worker: Worker, path: str, body: dict[str, Any]) -> _Answer:
        headers = {}
        if self._config.worker_api_key is not None:
            headers["authorization"] = f"Bearer {self._config.worker_api_key}"
        timeout = aiohttp.ClientTimeout(total=self._config.admin_timeout_s, sock_connect=self._config.connect_timeout_s)
        try:
            async with self._session.post(worker.url + path, json=body, headers=headers, timeout=timeout) as response:
                return _Answer(worker, response.status, _text_of(await response.read()))
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return _Answer(worker, HTTPStatus.BAD_GATEWAY, f"it did not answer: {str(error) or type(error).__name__}")

    @contextlib.contextmanager
    def _changing_alone(self, name: str) -> Iterator[None]:
        if name in self._changing:
            raise ModuleError(HTTPStatus.CONFLICT, f"The module {name!r} is being loaded or unloaded. Ask again later.")
        self._changing.add(name)
        try:
            yield
        finally:
            self._changing.discard(name)

    def _names(self) -> str:
        return ", ".join(self._pool.modules) or "none"


async def _awaited(awaitable: Awaitable[None]) -> None:
    await awaitable


def _text_of(answer: bytes) -> str:
    """What a worker says in words: SGLang's answer to loading, or an error of any form."""
    try:
        said = _json.loads(answer)
    except ValueError:
        return answer[:500].decode("utf-8", "replace").strip()
    if isinstance(said, dict):
        error = said.get("error")
        for text in (said.get("error_message"), error.get("message") if isinstance(error, dict) else error):
            if isinstance(text, str) and text:
                return text
    return answer[:500].decode("utf-8", "replace")


def _passed_on(answer: _Answer, what: str) -> ModuleError:
    """A worker's refusal is the client's to mend; whatever else it answers is not."""
    is_refusal = answer.status == HTTPStatus.BAD_REQUEST
    status = HTTPStatus.BAD_REQUEST if is_refusal else HTTPStatus.BAD_GATEWAY
    return ModuleError(status, f"{what[0].upper()}{what[1:]} failed at {answer.worker.url}: {answer.text}")

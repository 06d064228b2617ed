"""Who is a member now: workers join as the sources say and are polled; leaving, they finish their requests first.

`membership` says what changes (pure), `sources` reads, and the pool keeps what the workers are.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.routing.config import RouterConfig
from sglang_prefillshare.routing.membership import ADMIN, STATIC, Member, changes, wanted_members
from sglang_prefillshare.routing.sources import Reader, reader_of
from sglang_prefillshare.routing.workers import Worker, WorkerPool

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class SourceState:
    """What a source said last that could be used, and why its newest word could not."""

    members: tuple[Member, ...] = ()
    problem: str | None = None


class Roster:
    """Keeps the pool's members as the sources want them.

    `poll` asks one worker; `on_forgotten` is told of each that is gone. Tasks run in `group`, from `start` to `stop`.
    """

    def __init__(
        self,
        config: RouterConfig,
        *,
        pool: WorkerPool,
        poll: Callable[[Worker], Awaitable[None]],
        on_forgotten: Callable[[Worker], None],
        group: asyncio.TaskGroup,
        readers: Mapping[str, Reader] | None = None,
    ) -> None:
        self._config = config
        self._pool = pool
        self._poll = poll
        self._on_forgotten = on_forgotten
        self._group = group
        self._readers = readers or {str(source): reader_of(source, config) for source in config.sources}
        self._sources = {STATIC: SourceState(config.members)}
        self._sources |= {name: SourceState() for name in self._readers}
        self._sources[ADMIN] = SourceState()
        self._removed: set[str] = set()
        """Taken out by an administrator, though a source names them still."""
        self._polls: dict[Worker, asyncio.Task[None]] = {}
        self._leaving: dict[Worker, asyncio.Task[None]] = {}
        self._follows: list[asyncio.Task[None]] = []
        self._is_ending = False

    def start(self) -> None:
        """Poll the members, and follow the sources."""
        for worker in self._pool:
            self._polls[worker] = self._group.create_task(self._poll_until_gone(worker))
        for name, reader in self._readers.items():
            self._follows.append(self._group.create_task(self._follow(name, reader)))

    def stop(self) -> None:
        self._is_ending = True
        for task in (*self._polls.values(), *self._leaving.values(), *self._follows):
            task.cancel()

    # -- what an administrator does

    def add(self, url: str) -> Worker:
        """Make `url` a member, whatever the sources say; it says itself what it is."""
        self._removed.discard(url)
        if url not in self._named():
            self._sources[ADMIN].members += (Member(url),)
        self._apply()
        return self._pool[url]

    def remove(self, worker: Worker, *, for_good: bool = False) -> None:
        """Drain `worker` and forget it. A source that names it on does not bring it back, `add` does.

        A module of the flags stays one without a worker, unless its last was removed `for_good`.
        """
        if for_good:
            self._pool.abandon(worker.modules)
        admin = self._sources[ADMIN]
        admin.members = tuple(member for member in admin.members if member.url != worker.url)
        if worker.url in self._named():
            self._removed.add(worker.url)
        self._apply()

    def drain(self, worker: Worker, *, is_draining: bool) -> None:
        """Keep new requests away from `worker`, or let them come again. It stays a member."""
        worker.is_drained = is_draining
        logger.info("%s: %s", worker.label, "is kept free of new requests" if is_draining else "takes requests again")
        self._pool.judge_all()

    # -- what is shown

    def sources_of(self, url: str) -> list[str]:
        """Who names a member."""
        return [name for name, state in self._sources.items() if any(member.url == url for member in state.members)]

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {"source": name, "members": len(state.members), "problem": state.problem}
            for name, state in self._sources.items()
        ]

    # -- sources

    def update(self, source: str, members: Sequence[Member]) -> None:
        """The source names these now."""
        self._sources[source].members = tuple(members)
        self._removed &= self._named()
        self._apply()

    def _named(self) -> set[str]:
        return {member.url for state in self._sources.values() for member in state.members}

    async def _follow(self, name: str, reader: Reader) -> None:
        state = self._sources[name]
        while not self._is_ending:
            try:
                urls = await reader.read()
                if urls is not None:
                    state.problem = None
                    self.update(name, [Member(url) for url in urls])
            except ConfigError as error:
                if state.problem != str(error):
                    state.problem = str(error)
                    logger.error("%s: %s Its last %d workers are kept.", name, error, len(state.members))
            except Exception:  # a bug of ours must not end the router
                logger.exception("reading %s failed", name)
            await asyncio.sleep(reader.interval_s)

    # -- members

    def _apply(self) -> None:
        wanted = wanted_members({name: state.members for name, state in self._sources.items()}, removed=self._removed)
        found = changes(self._pool.urls, wanted)
        for url in found.left:
            self._leave(self._pool[url])
        for url in wanted:
            if url in self._pool and self._pool[url].is_leaving:
                self._stay(self._pool[url])
        for member in found.joined:
            worker = self._pool.join(member)
            logger.info("%s: joins (%s)", worker.label, ", ".join(self.sources_of(member.url)))
            self._polls[worker] = self._group.create_task(self._poll_until_gone(worker))

    def _leave(self, worker: Worker) -> None:
        if worker.is_leaving:
            return
        worker.is_leaving = True
        logger.info("%s: leaves, %d requests under way", worker.label, len(worker.legs))
        self._pool.judge_all()
        if worker.legs:
            self._leaving[worker] = self._group.create_task(self._see_off(worker))
        else:
            self._forget(worker)

    def _stay(self, worker: Worker) -> None:
        worker.is_leaving = False
        if (task := self._leaving.pop(worker, None)) is not None:
            task.cancel()
        logger.info("%s: stays", worker.label)
        self._pool.judge_all()

    async def _see_off(self, worker: Worker) -> None:
        """Its requests end, or are ended after `drain_deadline_s`; then it is forgotten."""
        deadline_s = self._config.drain_deadline_s
        try:
            async with asyncio.timeout(deadline_s):
                await worker.has_no_leg.wait()
        except TimeoutError:
            logger.warning("%s: ending %d requests that take over %g s", worker.label, len(worker.legs), deadline_s)
            worker.fail_legs(f"The {worker.label} was taken out, and the request took over {deadline_s:g} s more.")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config.abort_timeout_s):
                    await worker.has_no_leg.wait()
        if worker.is_leaving:
            self._forget(worker)

    def _forget(self, worker: Worker) -> None:
        self._leaving.pop(worker, None)
        self._pool.forget(worker)
        self._polls.pop(worker).cancel()
        self._on_forgotten(worker)
        logger.info("%s: is forgotten", worker.label)

    async def _poll_until_gone(self, worker: Worker) -> None:
        # A cancellation alone can get lost: in a poll that runs out of time at that moment.
        while not self._is_ending and worker in self._polls:
            try:
                await self._poll(worker)
            except Exception:  # a bug of ours must not stop the polls, nor take the other pollers down
                logger.exception("polling the %s failed", worker.label)
            await asyncio.sleep(self._config.poll_interval_s)

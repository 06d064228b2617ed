"""A whole topology on this machine: which processes run on which ports, started, watched and ended together.

    with Deployment(load_topology("topology.yaml")) as deployment:
        requests.post(f"{deployment.router_url}/v1/chat/completions", ...)

The values come from `config.py`, what is to be run is in `plans.py`, one process is `process.py`'s, what a person sees
is `display.py`'s. What a topology that is read anew changes is decided in `reloads.py`, and the router is told of it
through `router_admin.py`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Protocol, Self, TextIO

from sglang_prefillshare.config import Topology
from sglang_prefillshare.environment import has_accelerator
from sglang_prefillshare.errors import ConfigError, PrefillShareError, WorkerError
from sglang_prefillshare.plans import (
    WORKER_COMMAND,
    WORKER_HOST,
    Commands,
    WorkerPlan,
    admin_key,
    choose_backend,
    plan_topology,
    plan_unified,
    plan_workers,
    router_command,
    with_backend_of,
)
from sglang_prefillshare.ports import GivenPorts, Port, PortBlocks
from sglang_prefillshare.preload import Preloader, preloader
from sglang_prefillshare.process import ExitStatus, StopGrace, SupervisedProcess, describe_exit
from sglang_prefillshare.readiness import CANNOT_HAND_OVER, probe
from sglang_prefillshare.reloads import check_reload, free_name, match, summary
from sglang_prefillshare.restarts import Restart, RestartPolicy
from sglang_prefillshare.router_admin import ADMIN_KEY_VARIABLE, READY, RouterAdmin

ROUTER_READY_TIMEOUT_S: Final = 60.0
"""The router loads nothing. If it is not ready soon after the workers are, it has refused one of them and says why."""

ADMIT_TIMEOUT_S: Final = 30.0
"""How long a running router may take to send requests to a worker that is ready. It looks at it every second."""

DRAIN_DEADLINE_S: Final = 120.0
"""After which the router ends the requests on a worker that leaves, where its flags say nothing else."""

_DRAIN_SLACK_S: Final = 15.0
_TAIL_LINES_IN_ERROR: Final = 20


class State(StrEnum):
    """Where a worker or the router is in its life."""

    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class Worker:
    """A worker or the router as it runs, process after process. Changed by its deployment only."""

    plan: WorkerPlan
    state: State = State.WAITING
    is_arriving: bool = False
    """It is started while others serve, and none of them yet: that it fails costs nobody else anything."""
    is_leaving: bool = False
    """It is to end while others go on."""
    launch_count: int = 0
    restart_at: float | None = None
    """When it is started again, while it waits for that."""
    late_because: str | None = None
    """Why its process was ended by us, while it is being ended for not getting ready."""
    restarted_deaths: list[float] = field(default_factory=list)
    """When it died, each time that it was started again."""
    started_at: float | None = None
    ready_at: float | None = None
    process: SupervisedProcess | None = None
    last_answer: str = "no answer yet"
    log_file: Path | None = None

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def url(self) -> str:
        return self.plan.url

    @property
    def pid(self) -> int | None:
        return None if self.process is None else self.process.pid

    @property
    def waited_s(self) -> float:
        """Seconds from its start until it was ready, or until now."""
        if self.started_at is None:
            return 0.0
        return (time.monotonic() if self.ready_at is None else self.ready_at) - self.started_at

    @property
    def where_its_log_is(self) -> str:
        """A sentence to put after another one; empty without a log."""
        return "" if self.log_file is None else f" Its log is {self.log_file}."

    def tail(self, line_count: int = _TAIL_LINES_IN_ERROR) -> list[str]:
        """Its last lines of output."""
        return [] if self.process is None else self.process.tail(line_count)

    def describe(self) -> dict[str, Any]:
        """As plain values, for `--json-ready`."""
        return {
            "name": self.name,
            "role": self.plan.role,
            "module": self.plan.module,
            "adapters": list(self.plan.adapters),
            "url": self.url,
            "pid": self.pid,
            "bootstrap_port": self.plan.bootstrap_port,
            "log": None if self.log_file is None else str(self.log_file),
        }


class Observer(Protocol):
    """Is told what happens. `on_line` is called from several threads, the others from the deployment's own."""

    def on_state(self, worker: Worker) -> None: ...

    def on_line(self, worker: Worker, line: str) -> None: ...

    def on_restart(self, worker: Worker, restart: Restart, reason: str) -> None:
        """It died, as `reason` says, and will be started again."""

    def on_reload(self, told: str, *, is_refused: bool) -> None:
        """The topology was read anew, with the result that is told."""

    def on_wait(self, workers: Sequence[Worker]) -> None:
        """Called about once a second while something is being waited for."""


class Silent:
    """Observes nothing; a failing worker's last lines are in the error all the same."""

    def on_state(self, worker: Worker) -> None: ...

    def on_line(self, worker: Worker, line: str) -> None: ...

    def on_restart(self, worker: Worker, restart: Restart, reason: str) -> None: ...

    def on_reload(self, told: str, *, is_refused: bool) -> None: ...

    def on_wait(self, workers: Sequence[Worker]) -> None: ...


@dataclass(frozen=True, slots=True)
class DeploymentOptions:
    """How to start and to end, whatever the topology. Times in seconds.

    `ready_timeout_s` counts for each worker from its own start. `start_concurrency` workers load at the same time;
    `None` is one for each usable core. Without `restarts` a process that dies while all serve ends everything, as
    one that dies before always does: who measures must not measure a restart. On a host without an accelerator workers
    are forked from the `preloader`, which several deployments may share; a deployment without one makes its own.
    """

    ready_timeout_s: float = 300.0
    start_concurrency: int | None = None
    grace: StopGrace = field(default_factory=StopGrace)
    poll_interval_s: float = 0.25
    log_dir: Path | None = None
    commands: Commands = field(default_factory=Commands)
    restarts: RestartPolicy | None = None
    preloader: Preloader | None = None

    def __post_init__(self) -> None:
        if self.ready_timeout_s <= 0:
            raise ConfigError(f"ready_timeout_s is {self.ready_timeout_s}, wanted more than 0.")
        if self.start_concurrency is not None and self.start_concurrency < 1:
            raise ConfigError(f"start_concurrency is {self.start_concurrency}, wanted 1 or more.")


class StopRequestedError(Exception):
    """`request_stop` was called while a deployment started or served. Not a failure."""


@dataclass(frozen=True, slots=True)
class _Event:
    """What the threads tell the deployment's own; `launch` says which process of the worker it is about."""

    kind: Literal["stop", "reload", "ready", "ended", "tick"]
    worker: Worker | None = None
    launch: int = 0


class _ArrivalError(Exception):
    """A worker that was to come while others serve does not; those are not touched by it."""


@dataclass(frozen=True, slots=True)
class _Change:
    """From those who serve to those that another topology wants, `workers`, in its order."""

    topology: Topology
    workers: tuple[Worker, ...]
    arriving: tuple[Worker, ...]
    leaving: tuple[Worker, ...]

    def summary(self) -> str:
        return summary(
            came=[worker.name for worker in self.arriving],
            left=[worker.name for worker in self.leaving],
            kept_count=len(self.workers) - len(self.arriving),
        )


class Deployment:
    """Every process of one topology. Inside `with`, all are ready; after it, none is left, whatever happened.

    Entering raises `WorkerError` when a worker ends or is not ready in time, naming it with its last lines. What ends
    later is noticed by `wait`, which restarts it if the options say so, and `check`; until one of them is called
    nothing happens, so that a caller may try what it is like without it.
    """

    def __init__(
        self, topology: Topology, *, options: DeploymentOptions | None = None, observer: Observer | None = None
    ) -> None:
        self._options = options or DeploymentOptions()
        self._observer: Observer = observer or Silent()
        self._topology = topology
        self._ports = PortBlocks(avoid=topology.router.port)
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._start_concurrency = self._options.start_concurrency or len(os.sched_getaffinity(0))
        self._has_started = False
        self._is_reload_wanted = False
        self._admin_key = admin_key(topology.router, os.environ) or secrets.token_urlsafe(32)
        self._flagged_urls: frozenset[str] = frozenset()
        """The workers' URLs in the flags of the router that runs."""
        self._preloader = self._options.preloader
        self._arriving: list[Worker] = []
        self._leaving: list[Worker] = []
        self.workers: list[Worker] = []
        self.router: Worker | None = None

    @property
    def router_url(self) -> str:
        assert self.router is not None, "the router is planned when the deployment starts"
        return self.router.url

    @property
    def url(self) -> str:
        """Where clients ask: the router's, or the unified server's."""
        return self.workers[0].url if self._topology.is_unified else self.router_url

    def worker(self, name: str) -> Worker:
        """The worker of this name: `base` or `base.0`, a decode module's name or `coder.1`."""
        for worker in self.workers:
            if worker.name == name:
                return worker
        raise ConfigError(f"no worker is called {name!r}, wanted {', '.join(w.name for w in self.workers)}.")

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the workers, then the router; return when all are ready."""
        options = self._options
        if options.log_dir is not None:
            try:
                options.log_dir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"cannot write logs to {options.log_dir}: {error.strerror}.") from error
        plans, router_plan = self._plan()
        self.workers = [Worker(plan) for plan in plans]
        self.router = None if router_plan is None else Worker(router_plan)
        for worker in self._all():
            self._observer.on_state(worker)
        if self._preloader is None and options.commands.worker == WORKER_COMMAND:
            self._preloader = preloader(plans[0].env)
        self._bring_up(self.workers, self._start_concurrency, options.ready_timeout_s)
        if self.router is not None:  # after the workers, whose descriptions it reads
            self._bring_up([self.router], 1, min(options.ready_timeout_s, ROUTER_READY_TIMEOUT_S))
        self._has_started = True

    def _plan(self) -> tuple[list[WorkerPlan], WorkerPlan | None]:
        """What to run; without a router if a subclass says so."""
        if self._topology.is_unified:
            return [
                plan_unified(
                    self._topology,
                    ports=self._ports,
                    commands=self._options.commands,
                    is_cpu_host=not has_accelerator(),
                    environ=os.environ,
                )
            ], None
        plans, router = plan_topology(
            self._topology,
            ports=self._ports,
            commands=self._options.commands,
            is_cpu_host=not has_accelerator(),
            environ=os.environ,
        )
        router = replace(router, env={**router.env, ADMIN_KEY_VARIABLE: self._admin_key})
        return (choose_backend(plans) if has_accelerator() else plans), router

    def wait(
        self,
        *,
        on_restored: Callable[[], None] | None = None,
        read_topology: Callable[[], Topology] | None = None,
    ) -> None:
        """Serve until a stop is requested (`StopRequestedError`) or what died is not restarted (`WorkerError`).

        `on_restored` is called each time that all are ready again, or others are. Where a reload was requested, what
        `read_topology` gives then is made of what runs; the observer is told how that went.
        """
        is_whole = True
        while True:
            timeout_s = self._until_next_step_s()
            if self._is_reload_wanted and read_topology is not None:
                self._is_reload_wanted = False
                if self._reload(read_topology):
                    is_whole, timeout_s = False, 0.0
            self._step(timeout_s=timeout_s)
            was_whole, is_whole = is_whole, all(worker.state is State.READY for worker in self._all())
            if not is_whole:
                self._observer.on_wait(self._all())
            elif not was_whole and on_restored is not None:
                on_restored()

    def _step(self, *, timeout_s: float) -> None:
        """Take one event, if one comes in time, and do what is due for those who serve."""
        if self._options.restarts is None:
            self.check()
        self._handle(self._next_event(timeout_s=timeout_s))
        self._launch_due()
        self._end_late()

    def check(self) -> None:
        """Raise `WorkerError` if a worker or the router has ended."""
        for worker in self._all():
            if worker.process is not None and worker.process.status is not None:
                raise _ended_error(worker, worker.process.status)

    def request_stop(self) -> None:
        """Ask `start` or `wait` to give up; while stopping, ask to hurry. Safe in a signal handler."""
        self._events.put(_Event("stop"))

    def request_reload(self) -> None:
        """Ask `wait` to read the topology anew, once it has started and no other reload is under way. Several requests
        until then are one. Safe in a signal handler."""
        self._events.put(_Event("reload"))

    def stop(self) -> None:
        """End everything: all are asked at once, and none is left when this returns."""
        everybody = [*self._all(), *self._arriving, *self._leaving]
        running = [worker for worker in everybody if worker.process is not None and worker.state is not State.ENDED]
        for worker in running:
            assert worker.process is not None
            self._set_state(worker, State.STOPPING)
            worker.process.stop()
        # The supervisors keep the grace; ours is theirs, plus the time of a slow machine to notice.
        deadline = time.monotonic() + self._options.grace.total_s + 10.0
        while running := [worker for worker in running if not self._has_ended(worker)]:
            if time.monotonic() >= deadline:
                for worker in running:
                    assert worker.process is not None
                    worker.process.destroy()
                deadline += 10.0
            event = self._next_event(timeout_s=0.5)
            if event.kind == "stop":
                for worker in running:
                    assert worker.process is not None
                    worker.process.kill()
            elif event.kind == "tick":
                self._observer.on_wait(running)
        if self._preloader is not None and self._preloader is not self._options.preloader:
            self._preloader.close()
        self._ports.release()

    def describe(self) -> dict[str, Any]:
        """Router and workers as plain values, for programs."""
        router = {} if self.router is None else {"router_url": self.router_url, "router": self.router.describe()}
        return {
            "url": self.url,
            "pid": os.getpid(),
            **router,
            "workers": [worker.describe() for worker in self.workers],
        }

    def _all(self) -> list[Worker]:
        return [*self.workers, *([] if self.router is None else [self.router])]

    def _bring_up(self, workers: Sequence[Worker], concurrency: int, timeout_s: float) -> None:
        while not all(worker.state is State.READY for worker in workers):
            loading = [worker for worker in workers if worker.state is State.STARTING]
            waiting = [worker for worker in workers if worker.state is State.WAITING]
            for worker in waiting[: concurrency - len(loading)]:
                self._launch(worker)
                loading.append(worker)
            for worker in loading:
                if worker.last_answer.startswith(CANNOT_HAND_OVER):
                    raise WorkerError(f"{worker.name} {worker.last_answer}{worker.where_its_log_is}")
            if late := [worker for worker in loading if worker.waited_s > timeout_s]:
                raise _late_error(late, timeout_s)
            self._handle(self._next_event(timeout_s=min(1.0, timeout_s)))
            self._observer.on_wait(workers)

    def _launch(self, worker: Worker) -> None:
        worker.launch_count += 1
        launch = worker.launch_count
        log: TextIO | None = None
        if self._options.log_dir is not None:
            worker.log_file = self._options.log_dir / f"{worker.name}.log"
            # What the last process said is why this one is started; one that it replaces still writes there.
            if launch == 1 and not worker.is_arriving:
                worker.log_file.unlink(missing_ok=True)
            log = worker.log_file.open("a", encoding="utf-8", buffering=1)

        def on_line(line: str) -> None:
            if log is not None:
                print(line, file=log)
            self._observer.on_line(worker, line)

        def on_exit(_: ExitStatus) -> None:
            if log is not None:
                log.close()
            self._events.put(_Event("ended", worker, launch))

        if worker is self.router:
            urls = tuple(worker.url for worker in (*self.workers, *self._arriving))
            self._flagged_urls = frozenset(url for word in worker.plan.command for url in urls if word.endswith(url))
        worker.started_at, worker.ready_at, worker.restart_at = time.monotonic(), None, None
        worker.last_answer, worker.late_because = "no answer yet", None
        process = worker.process = SupervisedProcess(
            worker.name,
            worker.plan.command,
            env=worker.plan.env,
            on_line=on_line,
            on_exit=on_exit,
            grace=self._options.grace,
            preloader=None if worker is self.router else self._preloader,
        )
        self._set_state(worker, State.STARTING)
        threading.Thread(
            target=self._probe, args=(worker, process, launch), name=f"{worker.name}-probe", daemon=True
        ).start()

    def _probe(self, worker: Worker, process: SupervisedProcess, launch: int) -> None:
        while not process.wait(self._options.poll_interval_s):
            answer = probe(worker.plan)
            if worker.launch_count != launch:
                return
            worker.last_answer = answer
            if answer == "ready":
                self._events.put(_Event("ready", worker, launch))
                return

    def _next_event(self, *, timeout_s: float) -> _Event:
        try:
            return self._events.get(timeout=timeout_s)
        except queue.Empty:
            return _Event("tick")

    def _handle(self, event: _Event) -> None:
        if event.kind == "stop":
            raise StopRequestedError
        if event.kind == "reload":
            self._is_reload_wanted = True
        worker = event.worker
        if worker is None or worker.process is None or event.launch != worker.launch_count:
            return
        if event.kind == "ended":
            assert worker.process.status is not None
            self._on_death(worker, worker.process.status)
        elif worker.process.status is None and worker.state is State.STARTING:
            worker.ready_at = time.monotonic()
            self._set_state(worker, State.READY)

    def _on_death(self, worker: Worker, status: ExitStatus) -> None:
        if worker.is_arriving or worker.is_leaving:
            self._set_state(worker, State.ENDED)
            return
        policy = self._options.restarts
        now = time.monotonic()
        # Whatever dies before all were ready once has something wrong that another try does not mend.
        restart = policy.decide(worker.restarted_deaths, now=now) if policy is not None and self._has_started else None
        if restart is None:
            self._set_state(worker, State.ENDED)
            raise _ended_error(worker, status, policy=policy if self._has_started else None)
        worker.restarted_deaths.append(now)
        worker.restart_at = now + restart.delay_s
        self._observer.on_restart(worker, restart, _ended_because(worker, status))
        self._set_state(worker, State.WAITING)

    def _until_next_step_s(self) -> float:
        """How long `wait` may sleep if nothing happens."""
        if all(worker.state is State.READY for worker in self._all()):
            return 60.0
        due = [worker.restart_at for worker in self._all() if worker.restart_at is not None]
        return max(0.0, min([1.0, *(at - time.monotonic() for at in due if at > time.monotonic())]))

    def _launch_due(self) -> None:
        """Start what has waited long enough, as many at a time as at the beginning."""
        loading_count = sum(worker.state is State.STARTING for worker in (*self.workers, *self._arriving))
        for worker in self._all():
            if worker.restart_at is None or worker.restart_at > time.monotonic():
                continue
            if worker is self.router or loading_count < self._start_concurrency:
                self._launch(worker)
                loading_count += worker is not self.router

    def _end_late(self) -> None:
        """End what was started again and is not ready in time; that is its next death."""
        now = time.monotonic()
        for worker in self._all():
            if worker.state is not State.STARTING or worker.started_at is None:
                continue
            began, timeout_s = worker.started_at, self._options.ready_timeout_s
            if worker is self.router:
                # It is ready when the workers are, and they may be loading themselves.
                if not all(other.state is State.READY for other in self.workers):
                    continue
                began = max([began, *(other.ready_at or began for other in self.workers)])
                timeout_s = min(timeout_s, ROUTER_READY_TIMEOUT_S)
            is_unable = worker.last_answer.startswith(CANNOT_HAND_OVER)
            if is_unable or now - began > timeout_s:
                assert worker.process is not None
                late = f"not ready within {timeout_s:g} s (last: {worker.last_answer})"
                worker.late_because = worker.last_answer if is_unable else late
                self._set_state(worker, State.STOPPING)
                worker.process.stop()

    # -- another topology while all serve

    def _reload(self, read_topology: Callable[[], Topology]) -> bool:
        """Make what the topology says now of what runs; whether anything was tried.

        What is added or changed is started first, before the router knows of it, and a start that fails leaves
        everything as it was. Then what is not wanted any more is drained and ended. Only what needs the GPU of such a
        worker is started after it.
        """
        try:
            topology = read_topology()
            change = self._plan_change(topology)
        except Exception as error:  # whatever is wrong with a file must not end those who serve
            what = str(error) if isinstance(error, PrefillShareError) else f"{type(error).__name__}: {error}"
            self._observer.on_reload(f"the topology was read anew, and nothing changed: {what}", is_refused=True)
            return False
        if not change.arriving and not change.leaving:
            self._topology = topology
            self._observer.on_reload("the topology was read anew, and asks for what runs", is_refused=False)
            return False
        self._observer.on_reload(f"the topology was read anew: {change.summary()}", is_refused=False)
        problem = self._carry_out(change)
        self._plan_router(self.workers)
        self._release_ports()
        if problem is None:
            self._topology = topology
            self._observer.on_reload(f"now as the topology says: {change.summary()}", is_refused=False)
        else:
            self._observer.on_reload(problem, is_refused=True)
        return True

    def _plan_change(self, topology: Topology) -> _Change:
        """Raises `ConfigError` for what cannot be changed, `WorkerError` where no ports are left."""
        check_reload(self._topology, topology)
        if topology.is_unified:  # and so it is the one that runs
            return _Change(topology, tuple(self.workers), arriving=(), leaving=())

        def plans(first_ports: Iterator[int]) -> list[WorkerPlan]:
            return plan_workers(
                topology,
                ports=GivenPorts(first_ports),
                commands=self._options.commands,
                is_cpu_host=not has_accelerator(),
                environ=os.environ,
            )

        wanted = [(plan.name, plan.likeness) for plan in plans(itertools.repeat(0))]
        found = match([(worker.name, worker.plan.likeness) for worker in self.workers], wanted)
        kept = [None if index is None else self.workers[index] for index in found]
        taken: list[int] = []
        try:
            for worker in kept:
                if worker is None:
                    taken.append(self._ports.take())
            free = iter(taken)
            ported = plans(iter([next(free) if worker is None else 0 for worker in kept]))
            new = [plan for plan, worker in zip(ported, kept, strict=True) if worker is None]
            if new and has_accelerator():
                new = with_backend_of([worker.plan for worker in kept if worker is not None], new)
        except BaseException:
            for first_port in taken:
                self._ports.give_back(first_port)
            raise
        names = {worker.name for worker in kept if worker is not None}
        arriving: list[Worker] = []
        for plan in new:
            arriving.append(Worker(replace(plan, name=free_name(plan.name, names)), is_arriving=True))
            names.add(arriving[-1].name)
        coming = iter(arriving)
        return _Change(
            topology,
            workers=tuple(next(coming) if worker is None else worker for worker in kept),
            arriving=tuple(arriving),
            leaving=tuple(worker for worker in self.workers if worker not in kept),
        )

    def _carry_out(self, change: _Change) -> str | None:
        """Have the workers that `change` wants; what went wrong, if something did."""
        late = [new for new in change.arriving if any(new.plan.shares_a_gpu_with(old.plan) for old in change.leaving)]
        first = [worker for worker in change.arriving if worker not in late]
        try:
            self._bring_in(first)
        except _ArrivalError as error:
            self._see_off(first)
            return f"nothing changed: {error}"
        self._see_off(change.leaving)
        try:
            self._bring_in(late)
        except _ArrivalError as error:
            self._see_off(late)
            again = [old for old in change.leaving if any(new.plan.shares_a_gpu_with(old.plan) for new in late)]
            self._put_back(again)
            return f"{', '.join(old.name for old in again)} will be as before: {error}"
        self.workers = list(change.workers)
        return None

    def _bring_in(self, workers: Sequence[Worker]) -> None:
        """Start them, and have the router send them requests. Raises `_ArrivalError` if one does not come to that."""
        options = self._options
        self._arriving.extend(workers)
        for worker in workers:
            self._observer.on_state(worker)
        while not all(worker.state is State.READY for worker in workers):
            loading = [worker for worker in (*self.workers, *workers) if worker.state is State.STARTING]
            waiting = [worker for worker in workers if worker.state is State.WAITING]
            for worker in waiting[: max(0, self._start_concurrency - len(loading))]:
                self._launch(worker)
            self._step(timeout_s=0.5)
            self._observer.on_wait([*self._all(), *workers])
            for worker in workers:
                if worker.last_answer.startswith(CANNOT_HAND_OVER):
                    raise _ArrivalError(f"{worker.name} {worker.last_answer}{worker.where_its_log_is}")
                if worker.state is State.STARTING and worker.waited_s > options.ready_timeout_s:
                    raise _ArrivalError(str(_late_error([worker], options.ready_timeout_s)))
                _check_runs(worker)
        self._plan_router([*self.workers, *workers])
        for worker in workers:
            self._admit(worker)
        for worker in workers:
            worker.is_arriving = False
            self._arriving.remove(worker)
            self.workers.append(worker)

    def _admit(self, worker: Worker) -> None:
        assert self.router is not None
        waited_since = time.monotonic()
        while (answer := self._router_admin.admit(worker.url)) != READY:
            if self.router.state is not State.READY:  # it died, and reads its flags when it comes back
                waited_since = time.monotonic()
            elif time.monotonic() - waited_since > ADMIT_TIMEOUT_S:
                raise _ArrivalError(f"the router sends {worker.name} no requests: {answer}")
            self._step(timeout_s=0.25)
            _check_runs(worker)

    def _see_off(self, workers: Sequence[Worker]) -> None:
        """No new requests for them, those under way finish, or the router ends them; then they end."""
        for worker in workers:
            worker.is_arriving, worker.is_leaving = False, True
        self._leaving.extend(workers)
        self._arriving = [worker for worker in self._arriving if worker not in workers]
        self.workers = [worker for worker in self.workers if worker not in workers]
        self._plan_router(self.workers)
        drain_deadline = self._topology.router.args.get("drain-deadline")
        drain_s = float(drain_deadline) if isinstance(drain_deadline, str) else DRAIN_DEADLINE_S
        deadline = time.monotonic() + drain_s + _DRAIN_SLACK_S
        staying = list(workers)
        while staying := [worker for worker in staying if not self._router_admin.dismiss(worker.url)]:
            if time.monotonic() > deadline:
                break  # the router said nothing all the time
            self._step(timeout_s=0.25)
        for worker in workers:
            worker.restart_at = None
            if worker.process is None or worker.process.status is not None:
                self._set_state(worker, State.ENDED)
            elif worker.state is not State.ENDED:
                self._set_state(worker, State.STOPPING)
                worker.process.stop()
        deadline = time.monotonic() + self._options.grace.total_s + 10.0
        while running := [worker for worker in workers if worker.state is not State.ENDED]:
            if time.monotonic() > deadline:
                for worker in running:
                    assert worker.process is not None
                    worker.process.destroy()
                deadline += 10.0
            self._step(timeout_s=0.5)
            self._observer.on_wait(running)
        self._leaving = [worker for worker in self._leaving if worker not in workers]

    def _put_back(self, workers: Sequence[Worker]) -> None:
        """Start them again as they were; from then on they are like any that was restarted."""
        for worker in workers:
            worker.is_leaving, worker.process, worker.restart_at = False, None, time.monotonic()
            self._set_state(worker, State.WAITING)
        self.workers.extend(workers)
        self._plan_router(self.workers)
        deadline = time.monotonic() + ADMIT_TIMEOUT_S
        for worker in workers:
            # It will be ready when it is ready; that it is a member is enough.
            while not self._router_admin.add(worker.url) and time.monotonic() < deadline:
                self._step(timeout_s=0.25)

    @property
    def _router_admin(self) -> RouterAdmin:
        return RouterAdmin(self.router_url, self._admin_key)

    def _plan_router(self, workers: Sequence[Worker]) -> None:
        """The router that runs is told through its administration; this is for the one that comes if it dies."""
        assert self.router is not None
        plan = self.router.plan
        plans = [worker.plan for worker in workers]
        command = router_command(self._topology.router, plans, port=plan.port, commands=self._options.commands)
        self.router.plan = replace(plan, command=command)

    def _release_ports(self) -> None:
        """Give back the ports of workers that are gone. What its flags say of a URL the router holds against whoever
        is there next, so those stay ours for as long as it runs."""
        in_use = {worker.plan.port for worker in self._all()}
        for first_port in self._ports.taken:
            if first_port not in in_use and f"http://{WORKER_HOST}:{first_port + Port.HTTP}" not in self._flagged_urls:
                self._ports.give_back(first_port)

    def _has_ended(self, worker: Worker) -> bool:
        assert worker.process is not None
        if worker.process.status is None:
            return False
        self._set_state(worker, State.ENDED)
        return True

    def _set_state(self, worker: Worker, state: State) -> None:
        if worker.state is not state:
            worker.state = state
            self._observer.on_state(worker)


@contextlib.contextmanager
def ready_file(path: Path | None, deployment: Deployment) -> Iterator[Callable[[], None]]:
    """Inside, `path` describes the deployment; it appears whole, and goes with it. Gives what writes it anew."""
    if path is None:
        yield lambda: None
        return

    def write() -> None:
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            draft.write_text(json.dumps(deployment.describe(), indent=2) + "\n", encoding="utf-8")
            draft.replace(path)
        except OSError as error:
            draft.unlink(missing_ok=True)
            raise ConfigError(
                f"cannot write {path}: {error.strerror}. Give --json-ready a file you may write."
            ) from error

    write()
    try:
        yield write
    finally:
        path.unlink(missing_ok=True)


def _check_runs(worker: Worker) -> None:
    """Raise `_ArrivalError` if it has ended."""
    if worker.process is not None and (status := worker.process.status) is not None:
        raise _ArrivalError(str(_ended_error(worker, status)))


def _ended_error(worker: Worker, status: ExitStatus, *, policy: RestartPolicy | None = None) -> WorkerError:
    tried = ""
    if policy is not None:
        tried = f" It was restarted {_times(policy.limit)} within {policy.window_s / 60:g} minutes; that is the limit."
    told = f"{_ended_because(worker, status)}.{tried}{worker.where_its_log_is}"
    return WorkerError(f"{worker.name} {told} Last lines:\n{quote_tail(worker)}")


def _ended_because(worker: Worker, status: ExitStatus) -> str:
    """`ended while it served: killed by SIGKILL`."""
    if worker.late_because is not None:
        return f"was ended: {worker.late_because}"
    before = "before it was ready" if worker.ready_at is None else "while it served"
    return f"ended {before}: {describe_exit(status)}"


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _late_error(late: Sequence[Worker], timeout_s: float) -> WorkerError:
    names = ", ".join(f"{worker.name} (last: {worker.last_answer})" for worker in late)
    hint = "" if late[0].plan.role is None else " Raise --ready-timeout if loading takes longer."
    return WorkerError(f"not ready within {timeout_s:g} s: {names}.{hint} Last lines:\n{quote_tail(late[0])}")


def quote_tail(worker: Worker) -> str:
    """Its last lines of output, as a message quotes them."""
    return "\n".join(f"  [{worker.name}] {line}" for line in worker.tail()) or f"  [{worker.name}] (no output)"

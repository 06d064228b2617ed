"""Thousands of handoffs between real processes at the level of the backend, with everything going wrong now and then.

What is checked, for every one of them: a handoff that decode takes for good has brought the bytes that prefill had
lent; one that failed changed nothing in pages that were given back, on either side; both sides end in time; and after
each round nothing is held.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
import torch

from sglang_prefillshare.handoff.pool import PageList
from sglang_prefillshare.host.transfer.rig import Handoff, Outcome, PoolShape, checksum_pages, fill_pages, new_room
from test.soak.tally import Tally
from test.support.handoff_pair import DecodeProcess, Pending, PrefillProcess, WorkerError, WorkerProcess

SHAPE: Final = PoolShape(layers=4, kv_heads=2, head_dim=16, page_count=2049, dtype="bfloat16")
HANDOFFS_PER_DECODE: Final = 32
MAX_PAGES: Final = 56
LEASE_TIMEOUT_S: Final = 1.0
DEADLINE_S: Final = 15.0
"""Past every time-out of the processes: what has not ended by then hangs."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A handoff, its decode process, and checksums: of the pages that will move, and of those that decode holds."""

    handoff: Handoff
    decode: DecodeProcess
    moving: int
    held: int

    @property
    def source(self) -> PageList:
        return self.handoff.source_pages[self.handoff.prefix_tokens :]

    @property
    def target(self) -> PageList:
        return self.handoff.target_pages[self.handoff.prefix_tokens :]


class Soak:
    """One prefill and two decode processes; one that was killed is replaced after its round."""

    def __init__(self, *, seed: int) -> None:
        self._rng = random.Random(seed)
        self._numbers = np.random.default_rng(seed)
        self.tally = Tally()
        self.prefill = _start_prefill(port=None)
        # The second one pauses in its copies, so that what must not happen meanwhile can.
        self.decodes = [_start_decode(copy_pause_s=pause_s) for pause_s in (0.0, 0.002)]
        for process in (self.prefill, *self.decodes):
            process.wait_ready()

    def close(self) -> None:
        for process in (*self.decodes, self.prefill):
            process.close()

    def round(self, number: int) -> None:
        """Some sixty handoffs at once, with at most one kind of fault."""
        planned = self._plan(number)
        fault = _fault_of(number)
        self.tally.handoffs += len(planned)
        self.tally.faults[fault or "none"] += 1
        receiving = {
            decode: decode.receive(
                [one.handoff for one in planned if one.decode is decode], bootstrap_addr=self.prefill.bootstrap_addr
            )
            for decode in self.decodes
        }
        sending = self.prefill.send([one.handoff for one in planned])
        dead = self._make_happen(fault, planned)
        where = f"round {number} ({fault or 'no fault'})"
        received = [
            outcome
            for decode, pending in receiving.items()
            for outcome in self._outcomes(pending, f"{where}: decode", is_dead=decode is dead)
        ]
        sent = self._outcomes(sending, f"{where}: prefill", is_dead=self.prefill is dead)
        self._judge(planned, _by_room(sent), _by_room(received), where, dead=dead, is_quiet=fault is None)
        self._check_held(where, dead=dead)
        if dead is not None:
            self._replace(dead)

    def _plan(self, number: int) -> list[Planned]:
        everything = np.arange(1, SHAPE.page_count, dtype=np.int32)
        self.prefill.fill(everything, seed=2 * number)
        sources = self._numbers.permutation(everything)
        planned: list[Planned] = []
        for decode in self.decodes:
            decode.fill(everything, seed=2 * number + 1)
            targets = self._numbers.permutation(everything)
            for _ in range(HANDOFFS_PER_DECODE):
                count = self._rng.randint(1, MAX_PAGES)
                source, sources = sources[:count], sources[count:]
                target, targets = targets[: len(source)], targets[len(source) :]
                if len(source) == 0:
                    break
                handoff = Handoff(
                    new_room(),
                    source,
                    target,
                    prefix_tokens=self._rng.choice((0, 0, self._rng.randint(0, len(source)))),
                    chunk_pages=self._rng.choice((None, self._rng.randint(1, 20))),
                )
                held, moving = target[: handoff.prefix_tokens], source[handoff.prefix_tokens :]
                planned.append(Planned(handoff, decode, self.prefill.checksum(moving), decode.checksum(held)))
        return planned

    def _make_happen(self, fault: str | None, planned: list[Planned]) -> WorkerProcess | None:
        """Bring the fault about while the handoffs run; returns the process that was killed."""
        time.sleep(self._rng.random() * 0.02)
        if fault == "aborts":
            for one in self._rng.sample(planned, max(1, len(planned) // 10)):
                self._rng.choice((one.decode, self.prefill)).abort(one.handoff.room)
                time.sleep(self._rng.random() * 0.002)
        elif fault in ("decode hangs", "prefill hangs"):
            victim = self._rng.choice(self.decodes) if fault == "decode hangs" else self.prefill
            victim.pause()
            time.sleep(1.5 * LEASE_TIMEOUT_S)
            victim.resume()
        elif fault in ("decode killed", "prefill killed"):
            victim = self._rng.choice(self.decodes) if fault == "decode killed" else self.prefill
            victim.kill()
            return victim
        return None

    def _outcomes(self, pending: Pending[list[Outcome]], who: str, *, is_dead: bool) -> list[Outcome]:
        try:
            return pending.result(DEADLINE_S)
        except TimeoutError:
            self.tally.hung.append(f"{who} did not end its handoffs within {DEADLINE_S} s")
        except WorkerError as error:
            if not is_dead:
                self.tally.wrong.append(f"{who}: {error}")
        return []

    def _judge(
        self,
        planned: list[Planned],
        sent: dict[int, Outcome],
        received: dict[int, Outcome],
        where: str,
        *,
        dead: WorkerProcess | None,
        is_quiet: bool,
    ) -> None:
        for one in planned:
            room = one.handoff.room
            got = received.get(room) if one.decode is not dead else None
            gave = sent.get(room) if self.prefill is not dead else None
            if got is not None and got.failure is None:
                self.tally.ok += 1
                self._must_be(one.decode, one.target, one.moving, f"{where}: what decode took over")
            elif got is not None and got.started_ns is not None:
                self._must_be(one.decode, one.target, _filled(len(one.target), room), f"{where}: pages given back")
            if got is not None:
                held = one.handoff.target_pages[: one.handoff.prefix_tokens]
                self._must_be(one.decode, held, one.held, f"{where}: what decode held")
            if gave is not None and gave.failure is not None and gave.started_ns is not None:
                self._must_be(self.prefill, one.source, _filled(len(one.source), room), f"{where}: prefill's pages")
            for outcome in (got, gave):
                if outcome is not None and outcome.failure is not None:
                    self.tally.count_failure(outcome.failure)
                    if is_quiet:
                        self.tally.wrong.append(f"{where}: {outcome.failure}")

    def _must_be(self, process: WorkerProcess, pages: PageList, wanted: int, what: str) -> None:
        if process.checksum(pages) != wanted:
            self.tally.wrong.append(f"{what} has other bytes than it must have")

    def _check_held(self, where: str, *, dead: WorkerProcess | None) -> None:
        deadline = time.monotonic() + DEADLINE_S
        for process in (self.prefill, *self.decodes):
            while process is not dead and any(process.held().values()):
                if time.monotonic() > deadline:
                    self.tally.leaked.append(f"{where}: {process.name} still holds {process.held()}")
                    return
                time.sleep(0.01)

    def _replace(self, dead: WorkerProcess) -> None:
        dead.close()
        if dead is self.prefill:
            self.prefill = _start_prefill(port=self.prefill.spec.bootstrap_port)
            self.prefill.wait_ready()
            return
        index = next(i for i, decode in enumerate(self.decodes) if decode is dead)
        self.decodes[index] = _start_decode(copy_pause_s=dead.spec.copy_pause_s)
        self.decodes[index].wait_ready()


def run(handoffs: int, *, seed: int, on_progress: Callable[[int], None]) -> Tally:
    """Rounds until so many handoffs were made; `on_progress` is told how many."""
    with closing(Soak(seed=seed)) as soak:
        for number in itertools.count():
            soak.round(number)
            on_progress(min(handoffs, soak.tally.handoffs))
            if soak.tally.handoffs >= handoffs or soak.tally.hung:
                return soak.tally
    raise AssertionError("unreachable")


def _start_prefill(*, port: int | None) -> PrefillProcess:
    env = {"SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": "4"}
    return PrefillProcess("prefillshare", SHAPE, port=port, env=env, lease_timeout_s=LEASE_TIMEOUT_S, reuses_pages=True)


def _start_decode(*, copy_pause_s: float) -> DecodeProcess:
    env = {"SGLANG_DISAGGREGATION_WAITING_TIMEOUT": "4"}
    return DecodeProcess("prefillshare", SHAPE, env=env, copy_pause_s=copy_pause_s, reuses_pages=True)


def _fault_of(number: int) -> str | None:
    """Every other round has aborts; now and then a process hangs or dies."""
    rare = {7: "decode hangs", 13: "prefill hangs", 19: "decode killed", 24: "prefill killed"}
    return rare.get(number % 30) or ("aborts" if number % 2 else None)


def _by_room(outcomes: list[Outcome]) -> dict[int, Outcome]:
    return {outcome.room: outcome for outcome in outcomes}


@cache
def _scratch() -> list[torch.Tensor]:
    page_bytes = SHAPE.bytes_per_page // (2 * SHAPE.layers)
    return [torch.zeros((MAX_PAGES, page_bytes), dtype=torch.uint8) for _ in range(2 * SHAPE.layers)]


def _filled(count: int, seed: int) -> int:
    """The checksum of `count` pages that were filled with `seed`."""
    pages = np.arange(count, dtype=np.int32)
    if count:
        fill_pages(_scratch(), pages, seed=seed)
    return checksum_pages(_scratch(), pages)

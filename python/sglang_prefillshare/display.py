"""What `prefillshare up` shows on stderr: who is starting, since when, and each worker's lines under its name."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Final, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sglang_prefillshare.deployment import State, Worker, quote_tail
from sglang_prefillshare.restarts import Restart

_COLOURS: Final = ("cyan", "magenta", "green", "yellow", "blue", "bright_cyan", "bright_magenta", "bright_green")
_STATE_COLOURS: Final = {State.STARTING: "yellow", State.READY: "green", State.STOPPING: "yellow", State.ENDED: "red"}
_ERROR: Final = re.compile(
    r"\b(ERROR|CRITICAL|FATAL)\b|^Traceback |^[\w.]*(Error|Exception)\b|panicked at|Segmentation fault"
)
_END_NOISE: Final = re.compile(r"nanobind|^ - leaked |^ - \.\.\. skipped")
"""What Triton's bindings say at the end of every process that imported it, dozens of lines of no use."""

_REMINDER_S: Final = 15.0


@contextlib.contextmanager
def _reader_may_be_gone() -> Iterator[None]:
    """Rich ends the program when nobody reads it any more, and a terminal may be gone. The workers serve all the same,
    and end as they should."""
    with contextlib.suppress(OSError, SystemExit):
        yield


def is_told(worker: Worker, line: str) -> bool:
    """Whether a line of a worker is of any use to a person."""
    return bool(line) and not (worker.state is State.STOPPING and _END_NOISE.search(line))


def is_error(worker: Worker, line: str) -> bool:
    """Whether it tells of an error. A server that is interrupted says so in a traceback, which is none to tell."""
    return worker.state is not State.STOPPING and _ERROR.search(line) is not None


class Display:
    """A `deployment.Observer`. On a terminal a table that keeps itself current while there is something to wait for,
    else a line per change. With `errors_only`, the workers' lines go elsewhere and only those that tell of an
    error are shown.
    """

    def __init__(self, *, errors_only: bool = False, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._errors_only = errors_only
        self._workers: dict[str, Worker] = {}
        """By URL: one that is replaced and the one that comes for it have one name."""
        self._places: dict[str, int] = {}
        self._live = Live(
            console=self._console, get_renderable=self._table, refresh_per_second=2, transient=True, auto_refresh=True
        )
        self._is_live = False
        self._reminded_at = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._set_live(False)

    def say(self, message: str) -> None:
        """One line of our own."""
        self._show(Text(message, style="bold"))

    def on_state(self, worker: Worker) -> None:
        self._workers[worker.url] = worker
        states = {known.state for known in self._workers.values()}
        self._set_live(bool(states & {State.STARTING, State.STOPPING}))
        if worker.state is State.STARTING:
            self._tell(worker, f"starting at {worker.url}")
        elif worker.state is State.READY:
            again = "" if worker.launch_count == 1 else " again"
            self._tell(worker, f"ready{again} after {worker.waited_s:.1f} s")
        elif worker.state is State.ENDED:
            self._tell(worker, "ended")
            if worker.is_leaving or worker.is_arriving:
                self._workers.pop(worker.url, None)

    def on_line(self, worker: Worker, line: str) -> None:
        if is_told(worker, line) and (is_error(worker, line) or not self._errors_only):
            # A worker may colour its lines itself: keep that on a terminal, drop it elsewhere.
            self._print(worker, Text.from_ansi(line))

    def on_restart(self, worker: Worker, restart: Restart, reason: str) -> None:
        self._tell(
            worker,
            f"{time.strftime('%H:%M:%S')} {reason}; restart {restart.number} of {restart.limit} in "
            f"{restart.delay_s:g} s.{worker.where_its_log_is} Last lines:\n{quote_tail(worker)}",
        )

    def on_reload(self, told: str, *, is_refused: bool) -> None:
        self.say(f"{time.strftime('%H:%M:%S')} {told}")

    def on_wait(self, workers: Sequence[Worker]) -> None:
        if self._is_live or time.monotonic() - self._reminded_at < _REMINDER_S:
            return
        self._reminded_at = time.monotonic()
        for worker in workers:
            if worker.state is State.STARTING:
                self._tell(worker, f"starting for {worker.waited_s:.0f} s: {worker.last_answer}")

    def _tell(self, worker: Worker, message: str) -> None:
        self._print(worker, Text(message, style="bold"))

    def _print(self, worker: Worker, text: Text) -> None:
        place = self._places.setdefault(worker.name, len(self._places))
        prefix = Text(f"[{worker.name}] ", style=_COLOURS[place % len(_COLOURS)])
        self._show(prefix + text)

    def _show(self, text: Text) -> None:
        with _reader_may_be_gone():
            self._console.print(text, soft_wrap=True)

    def _set_live(self, wanted: bool) -> None:
        wanted = wanted and self._console.is_terminal
        if wanted is not self._is_live:
            self._is_live = wanted
            with _reader_may_be_gone():
                (self._live.start if wanted else self._live.stop)()

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for heading in ("worker", "state", "seconds", "url", ""):
            table.add_column(heading, justify="right" if heading == "seconds" else "left")
        for worker in self._workers.values():
            seconds = "" if worker.started_at is None else f"{worker.waited_s:.0f}"
            answer = worker.last_answer if worker.state is State.STARTING else ""
            state = Text(worker.state, style=_STATE_COLOURS.get(worker.state, ""))
            table.add_row(worker.name, state, seconds, worker.url, Text(answer, style="dim"))
        return table

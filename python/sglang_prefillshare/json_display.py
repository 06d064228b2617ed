"""What `prefillshare up --log-format json` writes: an object for each change, and for each line of a worker."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self, TextIO

from sglang_prefillshare.deployment import Worker, quote_tail
from sglang_prefillshare.display import is_error, is_told
from sglang_prefillshare.json_logs import iso_time, line_of
from sglang_prefillshare.restarts import Restart

_WORKER_LOGGER: Final = "worker"
_OUR_LOGGER: Final = "sglang_prefillshare.up"


class JsonDisplay:
    """A `deployment.Observer` that writes what `display.Display` shows, as lines. `worker` says whose a line is.

    The router's own lines are objects already, and stay so.
    """

    def __init__(self, *, errors_only: bool = False, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._errors_only = errors_only
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def say(self, message: str) -> None:
        self._write({"level": "INFO", "logger": _OUR_LOGGER, "message": message})

    def on_state(self, worker: Worker) -> None:
        self._tell(worker, f"{worker.state} at {worker.url}", level="INFO")

    def on_line(self, worker: Worker, line: str) -> None:
        fields = _object_in(line)
        if fields is None:
            failed = is_error(worker, line)
            if not is_told(worker, line) or (self._errors_only and not failed):
                return
            fields = {"level": "ERROR" if failed else "INFO", "logger": _WORKER_LOGGER, "message": line}
        self._write({**fields, "worker": worker.name})

    def on_restart(self, worker: Worker, restart: Restart, reason: str) -> None:
        self._tell(
            worker,
            f"{reason}; restart {restart.number} of {restart.limit} in {restart.delay_s:g} s. Last lines:\n"
            f"{quote_tail(worker)}",
            level="WARNING",
        )

    def on_reload(self, told: str, *, is_refused: bool) -> None:
        self._write({"level": "ERROR" if is_refused else "INFO", "logger": _OUR_LOGGER, "message": told})

    def on_wait(self, workers: Sequence[Worker]) -> None: ...

    def _tell(self, worker: Worker, message: str, *, level: str) -> None:
        self._write({"level": level, "logger": _OUR_LOGGER, "message": message, "worker": worker.name})

    def _write(self, fields: Mapping[str, Any]) -> None:
        # The workers serve, whether or not anybody reads.
        with self._lock, contextlib.suppress(BrokenPipeError, ValueError):
            print(line_of({"time": iso_time(time.time()), **fields}), file=self._stream, flush=True)


def _object_in(line: str) -> dict[str, Any] | None:
    if not line.startswith("{"):
        return None
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "message" in found else None

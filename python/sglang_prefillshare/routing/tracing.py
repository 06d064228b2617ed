"""Where calls and legs are traced to: nowhere, unless a tracer is given.

The router's code knows these three classes only. `otel.py` has the one tracer that there is, behind an extra.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from sglang_prefillshare.routing.telemetry import CallRecord

Attributes = Mapping[str, str | int | float | bool]
Headers = list[tuple[str, str]]


class LegTrace:
    """One leg, from when it is sent off until `end`."""

    def carried(self, headers: Headers) -> Headers:
        """`headers`, with what tells the worker whose part its own work is."""
        return headers

    def end(self, end: str, attributes: Callable[[], Attributes]) -> None:
        """`end` is how it ended (`endings.LegEnd`). `attributes` is called by who wants them."""


class CallTrace:
    """One call, from its first byte until `end`."""

    def leg(self, role: str, worker: str) -> LegTrace:
        return LegTrace()

    def end(self, record: CallRecord) -> None: ...


class Tracer:
    """Traces nothing."""

    def call(self, endpoint: str, headers: Sequence[tuple[str, str]]) -> CallTrace:
        return CallTrace()

    def close(self) -> None:
        """Send what is left; may take seconds."""

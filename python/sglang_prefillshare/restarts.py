"""When a process that died is started again: a decision from times, without a clock or a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sglang_prefillshare.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Restart:
    """Start it again after `delay_s`, for the `number`-th of `limit` times within the policy's window."""

    number: int
    limit: int
    delay_s: float


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """At most `limit` restarts of one process in any `window_s`, after 1, 2, 4 … times `first_delay_s`."""

    limit: int = 3
    window_s: float = 600.0
    first_delay_s: float = 1.0

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ConfigError(f"limit is {self.limit}, wanted 1 or more. Without a policy nothing is restarted.")
        for name in ("window_s", "first_delay_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, wanted more than 0 seconds.")

    def decide(self, earlier: Sequence[float], *, now: float) -> Restart | None:
        """What to do about a death at `now`; `earlier` are the deaths that were answered with a restart.

        `None` is giving up. All times are seconds of one clock, whichever it is.
        """
        number = sum(now - self.window_s < time <= now for time in earlier) + 1
        if number > self.limit:
            return None
        return Restart(number=number, limit=self.limit, delay_s=self.first_delay_s * 2 ** (number - 1))

"""`restarts.py`: the decision alone, with times that the test makes up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_prefillshare.errors import ConfigError
from sglang_prefillshare.restarts import Restart, RestartPolicy


def granted(policy: RestartPolicy, deaths: list[float]) -> list[Restart | None]:
    """The decision on each death, as a deployment asks for it: with the deaths that were answered with a restart."""
    earlier: list[float] = []
    decisions = []
    for now in deaths:
        decision = policy.decide(earlier, now=now)
        decisions.append(decision)
        if decision is not None:
            earlier.append(now)
    return decisions


def test_three_deaths_in_ten_minutes_are_restarted_ever_later_and_the_fourth_is_not() -> None:
    decisions = granted(RestartPolicy(), [100.0, 110.0, 120.0, 699.0])
    assert decisions == [Restart(1, 3, 1.0), Restart(2, 3, 2.0), Restart(3, 3, 4.0), None]


def test_a_restart_counts_for_ten_minutes_and_no_longer() -> None:
    assert granted(RestartPolicy(), [100.0, 110.0, 120.0, 700.0]) == [
        *(Restart(1, 3, 1.0), Restart(2, 3, 2.0), Restart(3, 3, 4.0)),
        Restart(3, 3, 4.0),  # the first is ten minutes ago
    ]
    assert granted(RestartPolicy(), [100.0, 10_000.0]) == [Restart(1, 3, 1.0), Restart(1, 3, 1.0)]


@given(st.lists(st.floats(0.0, 3000.0), max_size=40).map(sorted), st.integers(1, 4), st.floats(1.0, 900.0))
def test_no_window_sees_more_restarts_than_the_limit(deaths: list[float], limit: int, window_s: float) -> None:
    decisions = granted(RestartPolicy(limit=limit, window_s=window_s), deaths)
    restarts = [time for time, decision in zip(deaths, decisions, strict=True) if decision is not None]
    for first in restarts:
        assert sum(first <= time < first + window_s * (1 - 1e-9) for time in restarts) <= limit


@pytest.mark.parametrize("change", [{"limit": 0}, {"window_s": 0.0}, {"first_delay_s": -1.0}])
def test_a_policy_that_says_nothing_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        RestartPolicy(**change)  # type: ignore[arg-type]

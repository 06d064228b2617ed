"""Arrival times."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest

from sglang_prefillshare.workloads.arrivals import poisson_arrivals


def test_gaps_have_the_rates_mean_and_spread():
    times = poisson_arrivals(20_000, rate=4.0, seed="a")
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert times[0] == 0.0 and times == sorted(times)
    assert statistics.fmean(gaps) == pytest.approx(0.25, rel=0.03)
    assert statistics.pstdev(gaps) == pytest.approx(0.25, rel=0.05)  # exponential: the spread is the mean


def test_one_seed_is_one_pattern_stretched_by_the_rate():
    slow, fast = (poisson_arrivals(30, rate=rate, seed="a") for rate in (1.0, 2.0))
    assert slow == pytest.approx([2 * time for time in fast])
    assert slow != poisson_arrivals(30, rate=1.0, seed="b")


def test_an_infinite_rate_is_all_at_once():
    assert poisson_arrivals(3, rate=math.inf, seed="a") == [0.0, 0.0, 0.0]

"""When sessions arrive: a Poisson process at a rate, all at once, or at a trace's own times. Pure and seeded."""

from __future__ import annotations

import math
import random


def poisson_arrivals(count: int, *, rate: float, seed: str) -> list[float]:
    """Seconds from the start at which `count` sessions arrive, `rate` a second on average; the first at 0.

    The same seed draws the same gaps at every rate, in its unit, so that a sweep of rates stretches one and the same
    pattern. An infinite rate has all of them arrive at once.
    """
    assert rate > 0
    if math.isinf(rate):
        return [0.0] * count
    rng = random.Random(seed)
    times = [0.0]
    for _ in range(count - 1):
        times.append(times[-1] + rng.expovariate(1.0) / rate)
    return times[:count]

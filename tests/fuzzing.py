"""Calls with random numbers that hypothesis draws, which cuts a failure down to the simplest."""

import os
import random
from collections.abc import Callable

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

TIMES = int(os.environ.get("VSSM_FUZZ", "0"))  # times as many, and other numbers each time; always the same if 0


def fuzzed(times: int) -> Callable[[Callable[[random.Random], None]], Callable[[], None]]:
    """Has a function called so many times, each with a generator of other random numbers."""
    options = settings(
        max_examples=times * max(1, TIMES),
        deadline=None,
        derandomize=not TIMES,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    numbers = given(st.randoms(use_true_random=False))
    return lambda function: options(numbers(function))

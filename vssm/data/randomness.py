"""Random numbers as a function of what they are for, instead of a state that is carried along."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from hashlib import blake2b

import numpy as np
import torch
from torch.utils.data import get_worker_info


class Purpose(IntEnum):
    """What random numbers are for; each purpose has numbers of its own."""

    ORDER = 1
    AUGMENTATION = 2
    MIXING = 3
    NETWORK = 4


def seed_for(purpose: Purpose, *key: int) -> int:
    """A seed of 32 bits, as if drawn at random for every key.

    Args:
        purpose: What it is for.
        key: Integers of at least 0, such as the run's seed and the epoch.
    """
    spelled = ",".join(map(str, (int(purpose), *key)))
    # numpy's SeedSequence takes some 60 µs between other work, which every training image would pay.
    return int.from_bytes(blake2b(spelled.encode(), digest_size=4).digest(), "little")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds Python's, numpy's and torch's CPU generator for a block, and gives them back their states after it.

    Not in the worker process of a loader, where nothing else draws from them and this would take longer than seeding.

    Args:
        seed: From 0 to 2³² − 1.
    """
    kept = get_worker_info() is None
    before = (random.getstate(), np.random.get_state(), torch.get_rng_state()) if kept else None
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach the generators of GPUs too
    try:
        yield
    finally:
        if before is not None:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(before[2])

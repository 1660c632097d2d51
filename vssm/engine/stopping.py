"""Ending a run between two steps: signals ask for it, and the loop does it when it has come to a good place."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SAME_REQUEST = 2.0  # seconds; torchrun passes on the Ctrl-C that the terminal has already sent


class Stopped(Exception):
    """A run has ended on request, with its state written.

    Args:
        state: File of the state.
        step: Steps done.
    """

    def __init__(self, state: Path, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.state = state
        self.step = step


class StopRequest:
    """Whether a run has been asked to stop."""

    def __init__(self) -> None:
        self._first: float | None = None

    def __bool__(self) -> bool:
        return self._first is not None

    def make(self, *_: object) -> None:
        """Asks for it, as a handler of signals; a second time, after two seconds, raises KeyboardInterrupt."""
        now = time.monotonic()
        if self._first is not None and now - self._first > _SAME_REQUEST:
            raise KeyboardInterrupt
        self._first = self._first or now


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turns SIGTERM and SIGINT (Ctrl-C) into a request to stop, inside of the block."""
    request = StopRequest()
    before = {each: signal.signal(each, request.make) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)

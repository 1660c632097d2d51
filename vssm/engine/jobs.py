"""Commands that run as processes of their own, a few at a time, and that a signal ends well."""

import logging
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

_LOOK_EVERY = 0.2  # seconds

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Job:
    """A command.

    Args:
        name: What to call it.
        command: Program and arguments.
        log: File to which is appended what it says.
        steps: Number of steps that it takes, for the progress bar.
        done: How many of them it has done.
    """

    name: str
    command: Sequence[str]
    log: Path
    steps: int
    done: Callable[[], int]


def run_jobs(
    jobs: Sequence[Job],
    *,
    at_once: int,
    stop: Callable[[], bool] = lambda: False,
    ended: Callable[[Job], object] = lambda job: None,
) -> dict[str, str]:
    """Runs commands, so many at once, in their order, each with its part of the cores unless OMP_NUM_THREADS is set.

    One that fails does not keep the others from running. Once ``stop`` is true, none is started any more and those that
    run get SIGTERM, at which they are expected to save what they have and to end.

    Args:
        jobs: What to run.
        at_once: Number of commands that run at the same time.
        stop: Is asked several times a second.
        ended: Called after each command that has ended with status 0.

    Returns:
        By the names of jobs that have failed, the last line that they said, or the signal that has ended them.
    """
    pool = _Pool(jobs, at_once)
    try:
        while pool.running or (pool.waiting and not stop()):
            if stop():
                pool.terminate()
            else:
                pool.start()
            time.sleep(_LOOK_EVERY)
            for job in pool.collect():
                ended(job)
    finally:
        pool.close()
    return pool.failed


class _Pool:
    """The commands of a call of `run_jobs`, and how far they are."""

    def __init__(self, jobs: Sequence[Job], at_once: int) -> None:
        self.waiting = deque(jobs)
        self.running: dict[Job, subprocess.Popen] = {}
        self.failed: dict[str, str] = {}
        self._at_once = at_once
        threads = max(1, (os.cpu_count() or 1) // at_once)
        self._environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        self._asked = False
        self._done = {job.name: job.done() for job in jobs}
        self._finished = 0
        self._total = len(jobs)
        self._bar = tqdm(
            total=sum(job.steps for job in jobs),
            initial=sum(self._done.values()),
            desc="jobs",
            disable=not sys.stderr.isatty(),
        )

    def start(self) -> None:
        """Starts commands while there is room for them."""
        while self.waiting and len(self.running) < self._at_once:
            job = self.waiting.popleft()
            job.log.parent.mkdir(parents=True, exist_ok=True)
            with job.log.open("ab") as log:
                self.running[job] = subprocess.Popen(
                    job.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=self._environment
                )

    def terminate(self) -> None:
        """Asks those that run, once, to end: a second request means at once."""
        if not self._asked:
            for process in self.running.values():
                process.terminate()
        self._asked = True

    def collect(self) -> list[Job]:
        """Takes note of progress and of commands that have ended; returns those that have not failed."""
        over = {job: process.returncode for job, process in self.running.items() if process.poll() is not None}
        for job, status in over.items():
            del self.running[job]
            self._finished += 1
            if status != 0 and not self._asked:
                self.failed[job.name] = _reason(status, job.log)
                _logger.warning("%s failed: %s (%s)", job.name, self.failed[job.name], job.log)
            elif not self._asked and self._bar.disable:
                _logger.info("%d of %d: %s", self._finished, self._total, job.name)
        self._show([*over, *self.running])
        return [job for job, status in over.items() if status == 0]

    def close(self) -> None:
        """Ends what still runs, and waits for it."""
        self.terminate()
        for process in self.running.values():
            process.wait()
        self._bar.close()

    def _show(self, changed: Sequence[Job]) -> None:
        if self._bar.disable:
            return
        self._done |= {job.name: job.done() for job in changed}
        self._bar.set_postfix_str(f"{self._finished} of {self._total} over, {len(self.running)} running", refresh=False)
        self._bar.update(sum(self._done.values()) - self._bar.n)


def _reason(status: int, log: Path) -> str:
    if status < 0:
        return f"ended by signal {-status}"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else f"exit status {status}"

"""Commands side by side: how many at once, what becomes of failures, and how they end when asked to."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from vssm.engine import jobs as jobs_module
from vssm.engine.jobs import Job, run_jobs

SAVES_WHEN_ASKED = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, lambda *_: (Path("saved").touch(), sys.exit()))
Path("ready").touch()
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs_module, "_LOOK_EVERY", 0.01)


def job(name: str, code: str) -> Job:
    return Job(name, [sys.executable, "-c", code], log=Path("logs", f"{name}.txt"), steps=1, done=lambda: 0)


def test_so_many_run_at_once():
    code = "import time; print(time.monotonic()); time.sleep(0.3); print(time.monotonic())"
    assert run_jobs([job(str(i), code) for i in range(5)], at_once=2) == {}
    spans = [tuple(map(float, Path("logs", f"{i}.txt").read_text().split())) for i in range(5)]
    together = [sum(start <= moment < end for start, end in spans) for moment, _ in spans]
    assert max(together) == 2


@pytest.mark.parametrize(("given", "expected"), [(None, "3"), ("5", "5")])
def test_cores_are_shared(monkeypatch, given, expected):
    monkeypatch.setattr(jobs_module.os, "cpu_count", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    run_jobs([job("a", "import os; print(os.environ['OMP_NUM_THREADS'])")], at_once=2)
    assert Path("logs/a.txt").read_text().strip() == expected


def test_a_failure_is_told_and_stops_no_other():
    ended = []
    works, fails = "print('fine')", "print('first'); raise SystemExit('no such thing')"
    killed = "import os; print('fine', flush=True); os.kill(os.getpid(), 9)"
    all_three = [job("a", fails), job("b", works), job("c", killed)]
    failed = run_jobs(all_three, at_once=1, ended=lambda each: ended.append(each.name))
    assert failed == {"a": "no such thing", "c": "ended by signal 9"}
    assert ended == ["b"]
    assert Path("logs/b.txt").read_text().strip() == "fine"


def test_what_runs_is_asked_to_stop_and_nothing_more_is_started():
    run_jobs(
        [job("long", SAVES_WHEN_ASKED), job("next", "print('ran')")], at_once=1, stop=lambda: Path("ready").exists()
    )
    assert Path("saved").exists()
    assert not Path("logs/next.txt").exists()


def test_nothing_is_left_running_after_an_error(monkeypatch):
    started = []

    def start(*args, **kwargs) -> subprocess.Popen:
        started.append(popen(*args, **kwargs))
        return started[-1]

    def refuse(_: Job) -> None:
        while not Path("ready").exists():
            time.sleep(0.01)
        raise ValueError("no more")

    popen = subprocess.Popen
    monkeypatch.setattr(jobs_module.subprocess, "Popen", start)
    with pytest.raises(ValueError, match="no more"):
        run_jobs([job("short", ""), job("long", SAVES_WHEN_ASKED)], at_once=2, ended=refuse)
    assert [each.poll() for each in started] == [0, 0]
    assert Path("saved").exists()

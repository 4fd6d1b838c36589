"""A Ray that does not start, as on a machine that is too busy."""

from __future__ import annotations

import subprocess

import pytest
import ray

from tasks.errors import may_pass
from tasks.workers import START_ATTEMPTS, start_local


def test_a_ray_that_does_not_start_may_later_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def init(**options: object) -> None:
        started.append(subprocess.Popen(["sleep", "600"]))
        raise RuntimeError("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(TimeoutError, match=r"Ray did not start on this machine in 3 attempts") as refusal:
        start_local(1, {})
    assert may_pass(refusal.value)
    assert [process.wait(10) for process in started] == [-9] * START_ATTEMPTS


def test_another_error_is_raised_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: object) -> None:
        raise ValueError("num_cpus is negative")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ValueError, match="num_cpus is negative"):
        start_local(-1, {})

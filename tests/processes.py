"""Looking for processes, waiting, and a Ray node, for the tests of what must not outlive a run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tasks.process import Process

RAY = str(Path(sys.executable).parent / "ray")
START_ATTEMPTS = 5


def living(entry: str, command: bytes = b"") -> list[int]:
    """Processes whose environment holds `NAME=VALUE`, and whose command line contains some bytes."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment, line = (folder / "environ").read_bytes(), (folder / "cmdline").read_bytes()
        except OSError:  # it ended meanwhile
            continue
        if entry.encode() in environment.split(b"\0") and command in line:
            found.append(int(folder.name))
    return found


def wait_until(holds: Callable[[], Any], seconds: float = 300.0) -> bool:
    """Whether it came true in time. The default suits a machine that others keep busy."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def start_ray(arguments: Sequence[str], environment: dict[str, str], log: Path, inside: Sequence[str] = ()) -> Process:
    """A Ray node that runs, started by `ray start` behind the command `inside`.

    A loaded machine exceeds the 30 s that Ray grants a node, so this may take attempts.
    """
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", **environment}
    command = [*inside, RAY, "start", "--block", "--object-store-memory=80000000", *arguments]

    def said(process: Process) -> bool:
        return any("Ray runtime started" in line for line in process.tail)

    for _ in range(START_ATTEMPTS):
        started = Process(command, quiet, log)
        wait_until(lambda: said(started) or started.wait(0) is not None, 120)  # noqa: B023
        if said(started):
            return started
        started.stop()
    raise AssertionError(f"Ray did not start; see {log}")

"""Looking for processes, and waiting, as the tests of what must not outlive a run do."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


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

"""What earlier runs found out about files and need not find out again: digests, frame ranges.

One SQLite table of keys and texts, `$XDG_CACHE_HOME/megatron-wan/memory.sqlite` (`~/.cache` by default). It may be
deleted at any time, and where it cannot be read or written everything is found out again.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

BUSY_SECONDS = 30.0  # another process writes; then this one goes on without
VARIABLES = 500  # of one SQLite statement


def recall(keys: Sequence[str]) -> dict[str, str]:
    """What is known about these keys; unknown ones are left out."""
    found: dict[str, str] = {}
    with contextlib.suppress(sqlite3.Error, OSError), _opened() as table:
        for i in range(0, len(keys), VARIABLES):
            some = keys[i : i + VARIABLES]
            marks = ",".join("?" * len(some))
            found.update(table.execute(f"SELECT key, value FROM memory WHERE key IN ({marks})", some))
    return found


def remember(values: Iterable[tuple[str, str]]) -> None:
    """Keep (key, value) pairs, in place of what was known about these keys."""
    with contextlib.suppress(sqlite3.Error, OSError), _opened() as table, table:
        table.executemany("INSERT OR REPLACE INTO memory VALUES (?, ?)", values)


@contextlib.contextmanager
def _opened() -> Iterator[sqlite3.Connection]:
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron-wan" / "memory.sqlite"
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as table:
        table.execute("PRAGMA synchronous = OFF")  # what a power cut takes is found out again
        table.execute("CREATE TABLE IF NOT EXISTS memory (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID")
        yield table

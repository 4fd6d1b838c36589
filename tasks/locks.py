"""Locks for Prefect's transactions, built on flock(2).

Prefect's own file locks outlive a killed holder and refuse keys with a slash. The kernel drops a flock together with
the process that holds it, so a killed run blocks nobody, and another host on the same file system sees it too.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import threading
import time
from pathlib import Path

import prefect.runtime.flow_run
from prefect import get_run_logger

POLL_SECONDS = 0.1
SAY_SECONDS = 5.0  # after which a run says that it waits


class FileLocks:
    """Prefect's `LockManager` protocol over one lock file per key below `folder`. Keys are paths in an output folder.

    A lock belongs to an open file, so two threads of one process exclude each other like two processes do.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held: dict[tuple[str, str], int] = {}
        self._guard = threading.Lock()

    def _path(self, key: str) -> Path:
        return self.folder / (hashlib.sha256(key.encode()).hexdigest()[:32] + ".lock")

    def _try_lock(self, key: str) -> int | None:
        """An open, locked file descriptor, or None while somebody else holds the lock."""
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._path(key), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return descriptor

    def _lock(self, key: str, timeout: float | None) -> int | None:
        started, said = time.monotonic(), False
        while (descriptor := self._try_lock(key)) is None:
            waited = time.monotonic() - started
            if timeout is not None and waited >= timeout:
                return None
            if waited >= SAY_SECONDS and not said:
                said, holder = True, self._path(key).read_text()
                get_run_logger().info("Waits for another run that works on %s: flow run %s", Path(key).parent, holder)
            time.sleep(POLL_SECONDS)
        return descriptor

    def acquire_lock(
        self, key: str, holder: str, acquire_timeout: float | None = None, hold_timeout: float | None = None
    ) -> bool:
        if self.is_lock_holder(key, holder):
            return True
        descriptor = self._lock(key, acquire_timeout)
        if descriptor is None:
            return False
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(prefect.runtime.flow_run.id).encode())  # for those who wait
        with self._guard:
            self._held[key, holder] = descriptor
        return True

    def release_lock(self, key: str, holder: str) -> None:
        with self._guard:
            descriptor = self._held.pop((key, holder), None)
        if descriptor is None:
            raise ValueError(f"{holder} holds no lock on {key}, so it cannot release it")
        os.close(descriptor)

    def is_lock_holder(self, key: str, holder: str) -> bool:
        return (key, holder) in self._held

    def is_locked(self, key: str) -> bool:
        descriptor = self._try_lock(key)
        if descriptor is not None:
            os.close(descriptor)
        return descriptor is None

    def wait_for_lock(self, key: str, timeout: float | None = None) -> bool:
        descriptor = self._lock(key, timeout)
        if descriptor is not None:
            os.close(descriptor)
        return descriptor is not None

    async def aacquire_lock(
        self, key: str, holder: str, acquire_timeout: float | None = None, hold_timeout: float | None = None
    ) -> bool:
        return await asyncio.to_thread(self.acquire_lock, key, holder, acquire_timeout, hold_timeout)

    async def await_for_lock(self, key: str, timeout: float | None = None) -> bool:
        return await asyncio.to_thread(self.wait_for_lock, key, timeout)

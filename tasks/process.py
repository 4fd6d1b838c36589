"""One supervised command on this machine: its lines, its end, and nothing left of it afterwards.

torchrun puts every rank in a session of its own, so a process group does not reach them. All that the command starts
inherits a mark in its environment; stopping asks the command first and then kills whatever still carries the mark.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

MARK = "WAN_LAUNCH_ID"
KEPT_LINES = 400
# Becomes the command, after asking the kernel for SIGTERM when the starting thread's process dies, also by SIGKILL
# (PR_SET_PDEATHSIG = 1). A program of its own, because Python code between fork and exec (preexec_fn) can wait forever
# for a lock that another thread of ours held.
TETHER = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM); "
    "os.getppid() == int(sys.argv[1]) or sys.exit('its parent has died'); os.execvp(sys.argv[2], sys.argv[2:])"
)


def marked(mark: str) -> list[int]:
    """Living processes whose environment carries the mark."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with contextlib.suppress(OSError):  # ended meanwhile, or another user's
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
    return found


class Process:
    """Start a command at once; its output goes to `log`, and to `lines()` until it is read.

    Args:
        command: program and arguments.
        environment: added to this process's own.
        log: file that gets all output.

    Raises:
        FileNotFoundError: there is no such program.
    """

    def __init__(self, command: Sequence[str], environment: dict[str, str], log: Path) -> None:
        if shutil.which(command[0]) is None:
            raise FileNotFoundError(f"program {command[0]!r} is not there; install it or put it on PATH")
        log.parent.mkdir(parents=True, exist_ok=True)
        self.mark = uuid.uuid4().hex
        self.log = log
        self.tail: collections.deque[str] = collections.deque(maxlen=KEPT_LINES)
        self._unread: collections.deque[str] = collections.deque()
        self._started: concurrent.futures.Future[subprocess.Popen[str]] = concurrent.futures.Future()
        environment = {**os.environ, **environment, MARK: self.mark}
        # The kernel ties PR_SET_PDEATHSIG to the thread that forks, so one thread starts the command and outlives it.
        self._thread = threading.Thread(target=self._run, args=(list(command), environment), daemon=True)
        self._thread.start()
        self._process = self._started.result()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _run(self, command: list[str], environment: dict[str, str]) -> None:
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", TETHER, str(os.getpid()), *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C reaches us alone, and we stop the command in order
            )
        except OSError as error:
            self._started.set_exception(error)
            return
        self._started.set_result(process)
        assert process.stdout is not None
        with self.log.open("a", encoding="utf-8") as file:
            for line in process.stdout:
                file.write(line)
                file.flush()
                self.tail.append(line.rstrip("\n"))
                self._unread.append(line.rstrip("\n"))
        process.wait()

    def lines(self) -> list[str]:
        """What the command said since the last call."""
        return [self._unread.popleft() for _ in range(len(self._unread))]

    def wait(self, seconds: float) -> int | None:
        """Exit status, or None if it still runs after `seconds`."""
        try:
            status = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        if not marked(self.mark):  # nobody is left that could still hold the pipe open
            self._thread.join(5)
        return status

    def stop(self, grace: float = 8.0) -> None:
        """SIGTERM, `grace` seconds, then SIGKILL to everything that carries the mark. Harmless after the end."""
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace)
        end = time.monotonic() + 5
        while (left := marked(self.mark)) and time.monotonic() < end:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        self._process.wait(5)
        self._thread.join(5)

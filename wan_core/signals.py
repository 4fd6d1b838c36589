"""Which processes of a rank end by SIGTERM.

torchrun sends it to the rank's whole process group, Slurm and systemd to all that they know of. The rank has yet to
save then, and to it the death of a process that reads its data or writes its checkpoint is an error.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker


@contextlib.contextmanager
def sigterm_blocked() -> Iterator[None]:
    """Processes that are started meanwhile do not end by SIGTERM, until they do as `outlive_sigterm` says."""
    resource_tracker.ensure_running()  # multiprocessing unblocks SIGTERM when it starts this one
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def outlive_sigterm() -> None:
    """From here on this process, which a rank has started, ends by the SIGTERM of that rank alone."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(rank: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank:
        pass
    os.kill(os.getpid(), signal.SIGKILL)

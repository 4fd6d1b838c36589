"""Which failures a second attempt can help."""

from __future__ import annotations

import errno
from typing import Any

# What cannot work cannot work twice: a wrong value, a missing file, a fault of the code.
FINAL = (
    ValueError, TypeError, AssertionError, LookupError, AttributeError, ImportError, NotImplementedError, MemoryError,
    FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError, ArithmeticError,
)  # fmt: skip
# Machines and networks: a lost connection, a file system that hiccups.
PASSING = (OSError, TimeoutError, EOFError)
# But a disk that is full, over its quota or read-only stays so for longer than our retries last.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class LaunchError(RuntimeError):
    """torchrun failed. `retry` says whether another attempt may succeed."""

    def __init__(self, message: str, retry: bool) -> None:
        super().__init__(message)
        self.retry = retry


def may_pass(error: BaseException) -> bool:
    """Whether the same work may succeed when it is tried again.

    A worker that Ray lost, a connection and a killed trainer may; a wrong value or a missing file never will. Errors
    that no rule names are final: a fault should be seen at once, not after minutes of retries.
    """
    if isinstance(error, LaunchError):
        return error.retry
    if type(error).__module__.startswith("ray"):  # only then is ray loaded, so this import is free
        from ray.exceptions import RayActorError, RayError, RayTaskError

        if isinstance(error, RayTaskError):
            return may_pass(error.cause)
        return isinstance(error, (RayActorError, RayError))
    full = isinstance(error, OSError) and error.errno in FULL
    return isinstance(error, PASSING) and not isinstance(error, FINAL) and not full


def may_be_one_clips_doing(error: BaseException) -> bool:
    """Whether a part failed in a way that one of its clips may cause: its worker died, or memory ran out."""
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):  # torch's and Ray's, unimported
        return True
    if type(error).__module__.startswith("ray"):
        from ray.exceptions import RayActorError

        return isinstance(error, RayActorError)
    return False


def retrying_helps(task: Any, task_run: Any, state: Any) -> bool:
    """Prefect's `retry_condition_fn`."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, BaseException) and may_pass(error)

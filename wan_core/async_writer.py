"""Megatron's process that writes checkpoints in the background, made to outlive a SIGTERM that the rank saves after.

Without it the rank would wait for a dead process when it is cancelled, and what was under way would be lost. A module
of its own, because that process imports it, and should import nothing else of ours.
"""

from __future__ import annotations

from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

from wan_core.signals import outlive_sigterm

write = PersistentAsyncCaller.async_loop


def outlive_and_write(*args: Any) -> None:
    """The main function of that process."""
    outlive_sigterm()
    write(*args)


def install() -> None:
    PersistentAsyncCaller.async_loop = staticmethod(outlive_and_write)  # type: ignore[method-assign]

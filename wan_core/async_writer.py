"""Megatron's processes that write checkpoints in the background, made to outlive a SIGTERM that the rank saves after.

Without it a cancelled rank would wait for a dead process, and lose what was under way. A module of its own, because
the writing process imports it, and should import nothing else of ours.
"""

from __future__ import annotations

from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

from wan_core.signals import outlive_sigterm, sigterm_blocked

write = PersistentAsyncCaller.async_loop


def outlive_and_write(*args: Any) -> None:
    """The main function of the writing process."""
    outlive_sigterm()
    write(*args)


def install(state: Any) -> None:
    """Make it so, in Megatron-Bridge's class `GlobalState`, too, which starts the processes."""
    start = state.initialize_async_checkpoint_worker

    def start_blocked(self: Any) -> None:
        with sigterm_blocked():  # one of them hands results over and knows no signals: it keeps SIGTERM blocked
            start(self)

    PersistentAsyncCaller.async_loop = staticmethod(outlive_and_write)  # type: ignore[method-assign]
    state.initialize_async_checkpoint_worker = start_blocked

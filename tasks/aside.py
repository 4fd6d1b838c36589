"""What is shown in Prefect's UI beside the work: a server that is slow or away neither holds it up nor ends it.

Prefect's client tries a request again for a minute before it raises, and a training cannot be watched meanwhile.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextvars import copy_context

import httpx
from prefect import get_run_logger
from prefect.exceptions import PrefectException

AWAY = (httpx.HTTPError, PrefectException)  # no answer, a wrong one, or none that knows the artifact any more
FINISH_SECONDS = 10.0


def shown_if_possible[**P](what: str) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Make a function that only shows something warn where it cannot; `what` is it in words."""

    def decorate(show: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(show)
        def attempt(*arguments: P.args, **keywords: P.kwargs) -> None:
            try:
                show(*arguments, **keywords)
            except AWAY as error:
                reason = f"{type(error).__name__}: {error}"
                get_run_logger().warning("Prefect's server did not take %s: %s", what, reason)

        return attempt

    return decorate


class Aside:
    """Requests in a thread, one at a time, within the run that makes them. Use one for each thing that is shown."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.thread = threading.Thread()

    def ask(self, request: Callable[[], None]) -> None:
        """Make it now, or not at all while the one before is under way: the next will say more."""
        if self.thread.is_alive():
            return
        within = copy_context()  # Prefect finds the run that an artifact belongs to in the context
        self.thread = threading.Thread(target=lambda: within.run(shown_if_possible(self.what)(request)), daemon=True)
        self.thread.start()

    def finish(self, request: Callable[[], None]) -> None:
        """Make the last one, after the one before; a server that is away gets a few seconds."""
        self.wait()
        self.ask(request)
        self.wait()

    def wait(self) -> None:
        if self.thread.ident is not None:
            self.thread.join(FINISH_SECONDS)

"""How long work reports its progress: to whoever watches this process, and to a Prefect progress artifact.

A terminal command sets `watcher` to its display; a run of a Prefect worker has none and shows the artifact alone.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Protocol
from uuid import UUID

from tasks.aside import Aside

ARTIFACT_SECONDS = 5.0  # between two updates of one artifact: each is a request to the server


class Watcher(Protocol):
    """What wants to know how a run proceeds; called from any thread."""

    def started(self, stage: str, path: Path) -> None: ...

    def advanced(self, stage: str, done: float, total: float, text: str) -> None: ...

    def finished(self, stage: str, path: Path, seconds: float, reused: bool) -> None: ...


class Nobody:
    """The watcher of a run that no terminal shows."""

    def started(self, stage: str, path: Path) -> None:
        pass

    def advanced(self, stage: str, done: float, total: float, text: str) -> None:
        pass

    def finished(self, stage: str, path: Path, seconds: float, reused: bool) -> None:
        pass


watcher: Watcher = Nobody()


class Progress:
    """Progress of one stage. Make and use it inside a Prefect flow or task run."""

    def __init__(self, stage: str, total: float, unit: str) -> None:
        self.stage, self.total, self.unit = stage, total, unit
        self.artifact: UUID | None = None
        self.aside = Aside(f"the progress of {stage}")
        self.started = time.monotonic()
        self.updated = 0.0
        self.first: float | None = None  # what was done when the first report came: a resumed run begins in the middle

    def report(self, done: float, text: str = "") -> None:
        """Say how much of `total` is done; speed and `text` stand beside the bar."""
        if self.first is None:
            self.first, self.started = done, time.monotonic()
        seconds = time.monotonic() - self.started
        if done > self.first and seconds > 0:
            text = ", ".join([f"{(done - self.first) / seconds:.3g} {self.unit}/s", *([text] if text else [])])
        watcher.advanced(self.stage, done, self.total, text)
        description = f"{done:g} of {self.total:g} {self.unit}" + (f", {text}" if text else "")
        percent = 100.0 * min(1.0, done / self.total) if self.total else 100.0
        if done >= self.total:
            self.aside.finish(lambda: self.show(percent, description))
        elif time.monotonic() - self.updated >= ARTIFACT_SECONDS:
            self.updated = time.monotonic()
            self.aside.ask(lambda: self.show(percent, description))

    def show(self, percent: float, description: str) -> None:
        """Make the artifact, or bring it up to date."""
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        if self.artifact is None:
            made = create_progress_artifact(progress=percent, key=f"{self.stage}-progress", description=description)
            assert isinstance(made, UUID)
            self.artifact = made
        else:
            update_progress_artifact(artifact_id=self.artifact, progress=percent, description=description)

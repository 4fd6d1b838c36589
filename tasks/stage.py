"""How a stage becomes a cached, locked, retried Prefect task.

The truth is `record.json` in the stage's folder. Prefect's result file lies hidden beside it, so deleting the folder
forgets both; losing the result file or Prefect's database loses nothing, because the stage finds its own record; and a
result whose files are gone or altered is worked out again, never trusted.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import prefect.runtime.flow_run
import prefect.runtime.task_run
from prefect import get_run_logger, task
from prefect.cache_policies import CacheKeyFnPolicy, CachePolicy
from prefect.context import TaskRunContext
from prefect.tasks import Task, exponential_backoff
from prefect.transactions import IsolationLevel

from tasks import progress
from tasks.artifacts import publish
from tasks.errors import retrying_helps
from tasks.layout import REFRESHED_BY, REPLACED, RUN_FOLDER, stage_folder
from tasks.locks import FileLocks
from wan_core.config import STAGES, PipelineConfig, Stage, check
from wan_core.records import RECORD_NAME, Record, digest, find_record

R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Target[R: Record]:
    """The output that a task is to make."""

    kind: type[R]
    folder: Path
    fingerprint: str
    refresh: bool = False  # make it again even if it is there

    @property
    def result_key(self) -> str:
        """Where Prefect keeps its result: a hidden file, one per fingerprint and folder."""
        return str(self.folder / f".prefect-{digest([self.fingerprint, str(self.folder)])[:16]}")

    def find(self) -> R | None:
        """The record of the whole output, or None."""
        return find_record(self.kind, self.folder, self.fingerprint)


@dataclass(frozen=True)
class Outcome:
    """What became of a stage in this run."""

    record: Record
    reused: bool  # its output was there already
    seconds: float  # of this run, not of the work when it was done


def _result_key(context: TaskRunContext, parameters: dict[str, Any]) -> str:
    return parameters["target"].result_key


def _run_name() -> str:
    return f"{prefect.runtime.task_run.task_name}/{prefect.runtime.task_run.parameters['target'].folder.name}"


def refreshed(folder: Path) -> bool:
    """Whether this flow run refreshed the folder already: an earlier attempt of it, for it may be started anew."""
    marker = folder / REFRESHED_BY
    return marker.is_file() and marker.read_text() == prefect.runtime.flow_run.id


def mark_refreshed(folder: Path) -> None:
    (folder / REFRESHED_BY).write_text(str(prefect.runtime.flow_run.id))


def begin_anew(folder: Path) -> None:
    """Once per flow run, take what took long to make out of the way of its successor; nobody but the user deletes it.
    Later attempts go on with what the first one did.
    """
    if refreshed(folder):
        return
    if folder.exists():
        aside = folder.with_name(f"{folder.name}{REPLACED}{time.strftime('%Y%m%d-%H%M%S')}")
        folder.rename(aside)
        get_run_logger().info("The earlier output was moved to %s", aside)
    folder.mkdir(parents=True)
    mark_refreshed(folder)


@contextlib.contextmanager
def made_again(folder: Path) -> Iterator[None]:
    """An old output is not found meanwhile, and is there again if its successor fails; a training run is put aside."""
    if folder.parent.name == RUN_FOLDER:
        begin_anew(folder)
        yield
        return
    record, hidden = folder / RECORD_NAME, folder / f".{RECORD_NAME}{REPLACED}"
    if record.exists():
        record.rename(hidden)
    try:
        yield
    except BaseException:
        if hidden.exists() and not record.exists():
            hidden.rename(record)
        raise
    mark_refreshed(folder)


def stage_task(stage: Stage, retries: int = 2) -> Callable[[Callable[..., R]], Task[..., R]]:
    """Make a function `(target, ...) -> Record` the Prefect task of a stage. `Workspace.make` calls it."""

    def decorate(work: Callable[..., R]) -> Task[..., R]:
        @functools.wraps(work)
        def attempt(target: Target[R], **arguments: Any) -> R:
            with made_again(target.folder) if target.refresh else contextlib.nullcontext():
                if found := target.find():  # Prefect's result was lost, or the workspace moved
                    return found
                record = work(target, **arguments)
            publish(record)
            return record

        return task(
            attempt,
            name=stage,
            task_run_name=_run_name,
            tags=[stage],
            retries=retries,
            retry_delay_seconds=exponential_backoff(backoff_factor=5),
            retry_jitter_factor=0.5,
            retry_condition_fn=retrying_helps,
            persist_result=True,
            result_serializer="json",
            cache_result_in_memory=False,
        )

    return decorate


@dataclass(frozen=True)
class Workspace:
    """One folder of stage outputs, the name that they carry, and the stage from which on everything is made again."""

    root: Path
    name: str
    refresh: Stage | None = None
    outcomes: list[Outcome] = field(default_factory=list)

    def __post_init__(self) -> None:
        PipelineConfig(name=self.name)  # checks it
        check(not self.root.is_file(), f"workspace={self.root} is a file; give a folder")
        check(
            self.refresh is None or self.refresh in STAGES,
            f"refresh={self.refresh} is no stage; choose one of {', '.join(STAGES)}",
        )
        object.__setattr__(self, "root", self.root.resolve())  # locks are known by path

    def refreshes(self, stage: Stage) -> bool:
        """Whether `refresh` names this stage or one before it."""
        return self.refresh is not None and STAGES.index(stage) >= STAGES.index(self.refresh)

    def folder(self, stage: Stage, fingerprint: str) -> Path:
        return stage_folder(self.root, stage) / f"{self.name}-{fingerprint[:8]}"

    def target(self, stage: Stage, kind: type[R], fingerprint: str, folder: Path | None = None) -> Target[R]:
        folder = folder or self.folder(stage, fingerprint)
        return Target(kind, folder, fingerprint, self.refreshes(stage) and not refreshed(folder))

    @cached_property
    def cache_policy(self) -> CachePolicy:
        """Key by fingerprint; a second run of the same work waits for the first and then finds its result."""
        return CacheKeyFnPolicy(cache_key_fn=_result_key).configure(
            isolation_level=IsolationLevel.SERIALIZABLE, lock_manager=FileLocks(self.root / ".locks")
        )

    @contextlib.contextmanager
    def alone(self, target: Target[Any]) -> Iterator[None]:
        """Wait until no other run works on this output, and keep others waiting."""
        locks, key, holder = FileLocks(self.root / ".locks"), f"{target.folder}/alone", f"{os.getpid()}-{id(target)}"
        locks.acquire_lock(key, holder)
        try:
            yield
        finally:
            locks.release_lock(key, holder)

    def bound(self, stage_task: Task[..., R], target: Target[R]) -> Task[..., R]:
        """The task with this workspace's storage and locks, told not to trust a result whose files are gone."""
        return stage_task.with_options(
            cache_policy=self.cache_policy,
            result_storage=self.root,
            refresh_cache=target.refresh or (Path(target.result_key).exists() and target.find() is None),
        )

    def make(self, stage_task: Task[..., R], target: Target[R], *, started: float | None = None, **arguments: Any) -> R:
        """Run a stage's task, or find its output, and note the outcome.

        Args:
            started: `time.monotonic()` of the work before the task that belongs to the stage; None if there is none.
        """
        reused = target.find() is not None and not target.refresh and started is None
        started = started or time.monotonic()
        progress.watcher.started(stage_task.name, target.folder)
        record = self.bound(stage_task, target)(target=target, **arguments)
        outcome = Outcome(record, reused, time.monotonic() - started)
        self.outcomes.append(outcome)
        progress.watcher.finished(stage_task.name, target.folder, outcome.seconds, reused)
        return record

"""Raw clips to latents and text embeddings: one task per part, each on a Ray worker that keeps its encoders."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import wait
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.tasks import exponential_backoff
from prefect.utilities.annotations import quote

from tasks import progress
from tasks.errors import may_be_one_clips_doing, retrying_helps
from tasks.progress import Progress
from tasks.stage import Target, Workspace, begin_anew, stage_task
from tasks.workers import EncodePool, ray_session
from wan_core.config import EncodeConfig, RayConfig
from wan_core.data.folder import Location
from wan_core.records import EncodeRecord, PartRecord

if TYPE_CHECKING:
    from wan_core.encode.part import Part
    from wan_core.encode.stage import EncodePlan

THREADS_PER_ACTOR = 2  # one part works, the next waits for the worker


class Clips:
    """Clips done in all parts together, counted from several threads."""

    def __init__(self, plan: EncodePlan) -> None:
        self.progress = Progress("encode", len(plan.dataset.clips), "clips")
        self.done = {"": plan.num_encoded}
        self.lock = threading.Lock()

    def forget(self, part: str) -> None:
        with self.lock:
            self.done.pop(part, None)

    def report(self, part: str, done: int) -> None:
        with self.lock:
            self.done[part] = done
            self.progress.report(sum(self.done.values()))


def retrying_part_helps(task: Any, task_run: Any, state: Any) -> bool:
    """Once more if a clip may be guilty, for a worker can die of other causes; after that the part is halved."""
    error = state.result(raise_on_failure=False)
    if isinstance(error, BaseException) and may_be_one_clips_doing(error):
        return bool(task_run.run_count <= 1)
    return retrying_helps(task, task_run, state)


# No Prefect cache here: a part that is whole is not in the plan, and encode_part itself looks again. No tags: for
# them Prefect asks the server twice per task run whether they are limited.
@task(
    name="encode-part", task_run_name="encode/part-{part.name}", cache_policy=NO_CACHE, retries=3,
    retry_delay_seconds=exponential_backoff(backoff_factor=2), retry_jitter_factor=0.5,
    retry_condition_fn=retrying_part_helps, persist_result=False,
)  # fmt: skip
def encode_part(part: Part, pool: EncodePool, clips: Clips, videos: Location, output_dir: Path) -> PartRecord:
    """One part on the next free worker."""
    record = pool.encode(part, videos, output_dir, lambda done: clips.report(part.name, done))
    clips.report(part.name, len(part.clips))
    return record


@task(
    name="quarantine-clip", task_run_name="encode/quarantine-{part.name}", cache_policy=NO_CACHE, persist_result=False
)
def quarantine_clip(
    part: Part, config: EncodeConfig, encoder: dict[str, str], output_dir: Path, error: BaseException
) -> PartRecord:
    """Give up the only clip of a part until the next run."""
    from wan_core.encode.part import quarantine_part

    what = (str(error).strip() or "no message").splitlines()[0]
    reason = f"encoding it alone failed twice with {type(error).__name__}: {what}"
    return quarantine_part(config, part, output_dir, encoder, reason)


def encode_parts(
    plan: EncodePlan, config: EncodeConfig, ray: RayConfig, videos: Location, model: Path, folder: Path
) -> None:
    """Every part that is missing, as a flow of its own. Ray runs as long as it does.

    A part that loses its workers, or for which memory does not suffice, is halved until the guilty clip stands alone
    and is quarantined: the others need not wait for whoever finds out why.
    """
    from wan_core.encode.part import halves

    # Prefect stores a flow's parameters and searches each for futures: a plan of a million clips is none.
    @flow(name="encode-parts", flow_run_name="encode/{folder.name}", validate_parameters=False, persist_result=False)
    def missing_parts(num_parts: int, folder: Path) -> None:
        with ray_session(ray):
            pool, clips, parts = EncodePool(config, ray, model), Clips(plan), plan.parts
            try:
                while parts:
                    parts = retried_parts(parts, pool, clips)
            finally:  # a cancelled run comes here by an exception, with parts at work
                pool.close()

    def retried_parts(parts: tuple[Part, ...], pool: EncodePool, clips: Clips) -> tuple[Part, ...]:
        """Halves of the parts that failed."""
        futures = [(part, encode_part.submit(part, pool, clips, videos, folder)) for part in parts]
        wait([future for _, future in futures])
        results = [(part, future.result(raise_on_failure=False)) for part, future in futures]
        failed = [(part, error) for part, error in results if isinstance(error, BaseException)]
        for part, error in failed:
            if not may_be_one_clips_doing(error):
                raise error
            clips.forget(part.name)
            if len(part.clips) == 1:
                quarantine_clip(part, config, plan.dataset.encoder, folder, error)
        return tuple(half for part, _ in failed if len(part.clips) > 1 for half in halves(part))

    runner = ThreadPoolTaskRunner(max_workers=ray.actors * THREADS_PER_ACTOR)
    missing_parts.with_options(task_runner=runner)(len(plan.parts), folder)


@stage_task("encode")
def encode_task(target: Target, config: EncodeConfig, plan: EncodePlan) -> EncodeRecord:
    from wan_core.encode import stage

    return stage.finish(config, plan, target.folder)


def encode(workspace: Workspace, config: EncodeConfig, ray: RayConfig, videos: Location, model: Path) -> EncodeRecord:
    """Latents and text embeddings of the clips below `videos`: what is missing is encoded, the rest is found."""
    from wan_core.encode import stage

    folder = workspace.folder("encode", stage.settings_fingerprint(config, model))
    dataset = stage.look(config, videos, model)
    target = workspace.target("encode", EncodeRecord, dataset.fingerprint, folder)
    if target.find() and not target.refresh:
        return workspace.make(encode_task, target, config=config, plan=None)
    started = time.monotonic()
    progress.watcher.started("encode", folder)
    with workspace.alone(target):
        if target.refresh:
            begin_anew(folder)
        plan = stage.plan(config, dataset, folder)
        if plan.parts:
            encode_parts(plan, config, ray, videos, model, folder)
        made = replace(target, refresh=False)
        return workspace.make(encode_task, made, started=started, config=config, plan=quote(plan))

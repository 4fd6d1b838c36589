"""A model's loss on held-out clips, as a task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.errors import retrying_helps
from wan_core.records import IndexRecord

if TYPE_CHECKING:
    from wan_core.validate import Validation


@task(
    name="validate", task_run_name="validate/{model.name}", tags=["validate"], cache_policy=NO_CACHE, retries=1,
    retry_delay_seconds=5, retry_condition_fn=retrying_helps, persist_result=False,
)  # fmt: skip
def validate(model: Path, dataset: IndexRecord) -> Validation:
    """The loss of a Diffusers folder on the `val` split; costs seconds to minutes, so it is not cached."""
    from wan_core import validate as stage

    return stage.run(model, dataset.path)

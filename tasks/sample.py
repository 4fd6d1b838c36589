"""Videos from prompts."""

from __future__ import annotations

from pathlib import Path

from tasks.stage import Target, Workspace, stage_task
from wan_core.config import SampleConfig
from wan_core.records import ConvertRecord, SampleRecord


@stage_task("sample")
def sample_task(target: Target, config: SampleConfig, model: Path) -> SampleRecord:
    from wan_core import sample

    return sample.run(config, model, target.folder)


def sample(workspace: Workspace, config: SampleConfig, model: ConvertRecord | Path) -> SampleRecord:
    """Videos of the config's prompts, made now or found. `model`: a stage's record or any Diffusers folder."""
    from wan_core import sample as stage

    folder = model.path if isinstance(model, ConvertRecord) else model
    target = workspace.target("sample", SampleRecord, stage.stage_fingerprint(config, folder))
    return workspace.make(sample_task, target, config=config, model=folder)

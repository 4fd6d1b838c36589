"""Megatron checkpoint to a complete Diffusers folder."""

from __future__ import annotations

from pathlib import Path

from tasks.stage import Target, Workspace, stage_task
from wan_core.config import ConvertConfig
from wan_core.records import ConvertRecord, TrainRecord


@stage_task("convert")
def convert_task(target: Target, config: ConvertConfig, trained: TrainRecord, model: Path) -> ConvertRecord:
    from wan_core.convert import stage

    return stage.run(config, trained, model, target.folder)


def convert(workspace: Workspace, config: ConvertConfig, trained: TrainRecord, model: Path) -> ConvertRecord:
    """The Diffusers folder of this checkpoint, written now or found; `model` gives all but the transformer."""
    from wan_core.convert import stage

    target = workspace.target("convert", ConvertRecord, stage.stage_fingerprint(config, trained, model))
    return workspace.make(convert_task, target, config=config, trained=trained, model=model)

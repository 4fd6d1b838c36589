"""Metrics and the report over samples, training and data."""

from __future__ import annotations

from tasks.stage import Target, Workspace, stage_task
from wan_core.config import EvaluateConfig
from wan_core.records import EncodeRecord, EvaluateRecord, SampleRecord, TrainRecord


@stage_task("evaluate")
def evaluate_task(
    target: Target, config: EvaluateConfig, sampled: SampleRecord, trained: TrainRecord, encoded: EncodeRecord
) -> EvaluateRecord:
    from wan_core import evaluate

    return evaluate.run(config, sampled, trained, encoded, target.folder)


def evaluate(
    workspace: Workspace, config: EvaluateConfig, sampled: SampleRecord, trained: TrainRecord, encoded: EncodeRecord
) -> EvaluateRecord:
    """Metrics and report, made now or found."""
    from wan_core import evaluate as stage

    fingerprint = stage.stage_fingerprint(config, sampled, trained, encoded)
    target = workspace.target("evaluate", EvaluateRecord, fingerprint)
    return workspace.make(evaluate_task, target, config=config, sampled=sampled, trained=trained, encoded=encoded)

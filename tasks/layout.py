"""Where outputs lie in a workspace."""

from __future__ import annotations

from pathlib import Path

from wan_core.config import Stage

RUN_FOLDER = "runs"  # of train; every other stage's folder has the stage's name
REPLACED = ".replaced-"  # in the name of a training run that a refresh moved aside


def stage_folder(root: Path, stage: Stage) -> Path:
    """The folder that holds all outputs of a stage."""
    return root / (RUN_FOLDER if stage == "train" else stage)

"""Where outputs lie in a workspace."""

from __future__ import annotations

from pathlib import Path

from wan_core.config import Stage
from wan_core.records import RECORD_NAME

RUN_FOLDER = "runs"  # of train; every other stage's folder has the stage's name
REPLACED = ".replaced-"  # in the name of what a refresh put aside


def stage_folder(root: Path, stage: Stage) -> Path:
    """The folder that holds all outputs of a stage."""
    return root / (RUN_FOLDER if stage == "train" else stage)


def newest(root: Path, stage: Stage, name: str) -> Path | None:
    """The newest finished output of a stage under this name."""
    found = [
        path for path in stage_folder(root, stage).glob(f"{name}-*/{RECORD_NAME}") if REPLACED not in path.parent.name
    ]
    return max(found, key=lambda path: path.stat().st_mtime).parent if found else None

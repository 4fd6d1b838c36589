"""Where outputs lie in a workspace."""

from __future__ import annotations

import re
from pathlib import Path

from wan_core.config import Stage
from wan_core.records import RECORD_NAME

RUN_FOLDER = "runs"  # of train; every other stage's folder has the stage's name
REPLACED = ".replaced-"  # in the name of what a refresh put aside
REFRESHED_BY = ".refreshed-by"  # a file in what a refresh made: id of its flow run


def stage_folder(root: Path, stage: Stage) -> Path:
    """The folder that holds all outputs of a stage."""
    return root / (RUN_FOLDER if stage == "train" else stage)


def newest(root: Path, stage: Stage, name: str) -> Path | None:
    """The newest finished output of a stage under this name, and not under one that begins like it."""
    ours = re.compile(re.escape(name) + "-[0-9a-f]{8}")
    found = [path for path in stage_folder(root, stage).glob(f"*/{RECORD_NAME}") if ours.fullmatch(path.parent.name)]
    return max(found, key=lambda path: path.stat().st_mtime).parent if found else None

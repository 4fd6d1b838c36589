"""Which model of a workspace is the good one: a small pointer file that only a better model moves."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter


@dataclass(frozen=True)
class Promoted:
    """`<workspace>/promoted/<name>.json`."""

    model: Path  # Diffusers folder: what the next night starts from, and what users sample from
    dataset: str  # fingerprint of the newest data that a night has worked on, whether or not its model was better
    loss: float  # of `model` on that data's validation split
    changed: str  # when `model` last changed, UTC


def pointer(workspace: Path, name: str) -> Path:
    return workspace / "promoted" / f"{name}.json"


def load_promoted(workspace: Path, name: str) -> Promoted | None:
    """What was promoted last, or None before the first night.

    Raises:
        ValueError: the model's folder is gone.
    """
    path = pointer(workspace, name)
    if not path.is_file():
        return None
    found = TypeAdapter(Promoted).validate_json(path.read_text(encoding="utf-8"))
    if not found.model.is_dir():
        raise ValueError(f"{path} names model={found.model}, which is gone; restore it, or delete the pointer to begin")
    return found


def save_promoted(workspace: Path, name: str, promoted: Promoted) -> None:
    """Replace the pointer in one step: a reader sees the old or the new one."""
    path = pointer(workspace, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(asdict(promoted), file, indent=1, default=str)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

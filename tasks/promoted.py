"""Which model of a workspace is the good one: a small pointer file that only a better model moves."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter


@dataclass(frozen=True)
class Promoted:
    """`<workspace>/promoted/<name>.json`. Folders in the workspace are stored relative to it."""

    model: Path  # Diffusers folder: what the next night starts from, and what users sample from
    dataset: str  # fingerprint of the newest data that a night has worked on, whether or not its model was better
    loss: float  # of `model` on that data's validation split
    changed: str  # when `model` last changed, UTC
    # What the last night decided, for a later attempt of it. Pointers from before this was kept lack them.
    flow_run: str = ""
    candidate: Path = Path()
    start_loss: float = math.nan
    candidate_loss: float = math.nan

    @property
    def better(self) -> bool:
        """Whether the last night's model became the good one."""
        return self.model == self.candidate


def decide(
    good: Promoted | None, dataset: str, flow_run: str, start: tuple[Path, float], candidate: tuple[Path, float]
) -> Promoted:
    """The candidate if its loss is lower than that of the model it started from, else that one. NaN is never lower.

    Args:
        good: what was in use, None in the first night.
        start: a model and its loss.
        candidate: a model and its loss.
    """
    better = candidate[1] < start[1]
    model, loss = candidate if better else start
    changed = good.changed if good and not better else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return Promoted(model, dataset, loss, changed, flow_run, candidate[0], start[1], candidate[1])


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
    found = replace(found, model=workspace / found.model, candidate=workspace / found.candidate)
    if not found.model.is_dir():
        raise ValueError(f"{path} names model={found.model}, which is gone; restore it, or delete the pointer to begin")
    return found


def save_promoted(workspace: Path, name: str, promoted: Promoted) -> None:
    """Replace the pointer in one step: a reader sees the old or the new one."""

    def plain(path: Path) -> str:
        return str(path.relative_to(workspace) if path.is_relative_to(workspace) else path)

    path = pointer(workspace, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(asdict(promoted), file, indent=1, default=plain)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)

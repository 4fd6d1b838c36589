"""Which checkpoints of a folder are whole, which one is the latest, and which may go. Needs no Megatron.

A checkpoint `iter_<number>/` begins with a file `saving`, which goes when all else is written and `complete.json` lists
it with sizes. Whatever kills a run while it saves, the checkpoint before stays the latest. One that others wrote has
neither file, and is taken for whole; nothing here deletes it.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import threading
from pathlib import Path
from typing import Any

SAVING_NAME, MARKER_NAME = "saving", "complete.json"
STATE_NAME = "wan_state.json"  # what Bridge does not know of: position in the data, history of the losses
TRACKER_NAMES = ("latest_train_state.pt", "latest_checkpointed_iteration.txt")  # Bridge's, and Megatron-LM's


def folder_of(save_dir: Path, iteration: int) -> Path:
    return save_dir / f"iter_{iteration:07d}"


def is_whole(folder: Path) -> bool:
    """Whether the checkpoint was saved to its end, and every file is still there at its size."""
    marker = folder / MARKER_NAME
    if (folder / SAVING_NAME).exists() or not marker.is_file():
        return not (folder / SAVING_NAME).exists() and (folder / "run_config.yaml").is_file()  # of others
    files: dict[str, int] = json.loads(marker.read_text(encoding="utf-8"))["files"]
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in files.items())


def is_sealed(save_dir: Path, iteration: int) -> bool:
    """Whether the checkpoint is one of ours."""
    return (folder_of(save_dir, iteration) / MARKER_NAME).is_file()


def whole_iterations(save_dir: Path) -> list[int]:
    """Iterations of the whole checkpoints, ascending."""
    found = [folder for folder in save_dir.glob("iter_*") if folder.name[5:].isdigit()]
    return sorted(int(folder.name[5:]) for folder in found if is_whole(folder))


def latest(save_dir: Path) -> int | None:
    """Iteration of the latest whole checkpoint."""
    return max(whole_iterations(save_dir), default=None)


def begin(folder: Path) -> None:
    """Make the folder of a new checkpoint, in place of one that it had."""
    remove(folder)
    folder.mkdir(parents=True)
    (folder / SAVING_NAME).touch()


def seal(folder: Path, state: dict[str, Any]) -> None:
    """Declare a checkpoint whole, once all of its files are written."""
    write_whole(folder / STATE_NAME, json.dumps(state))
    found = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != SAVING_NAME)
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}
    for name in files:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
    write_whole(folder / MARKER_NAME, json.dumps({"files": files}, indent=1))
    (folder / SAVING_NAME).unlink()


def read_state(folder: Path) -> dict[str, Any]:
    """What `seal` was given; empty where someone else wrote the checkpoint."""
    path = folder / STATE_NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it has its old content or its new one, whenever a reader looks or the machine stops."""
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}-{threading.get_ident()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the rename, too
    finally:
        os.close(descriptor)


def repair(save_dir: Path) -> int | None:
    """Remove what a killed run left half-written, and point Bridge's trackers at the latest whole checkpoint.

    Only one process may call this, and only while nobody writes there.

    Returns:
        The iteration from which training goes on; None: from the start.
    """
    for folder in save_dir.glob("iter_*"):
        if (folder / SAVING_NAME).exists():
            remove(folder)
    iteration = latest(save_dir)
    if iteration is None:
        for name in TRACKER_NAMES:
            (save_dir / name).unlink(missing_ok=True)
        return None
    state, text = (save_dir / name for name in TRACKER_NAMES)
    temporary = state.with_name(f".{state.name}.{os.getpid()}")
    shutil.copyfile(folder_of(save_dir, iteration) / "train_state.pt", temporary)
    temporary.rename(state)
    write_whole(text, str(iteration))
    return iteration


def expired(iterations: list[int], keep_last: int, keep_every: int) -> list[int]:
    """Which checkpoints may go: all but the last `keep_last` (0: all) and the multiples of `keep_every` (0: none)."""
    if keep_last == 0:
        return []
    return [i for i in sorted(iterations)[:-keep_last] if not keep_every or i % keep_every]


def remove(folder: Path) -> None:
    """Delete a checkpoint, if there is one; it stops being one first of all."""
    if folder.is_dir():
        (folder / SAVING_NAME).touch()
    shutil.rmtree(folder, ignore_errors=True)


def num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

"""The demo's inputs: generated clips and a small model. `python -m flows.demo FOLDER` makes them for a deployment."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path


def make_inputs(folder: Path) -> None:
    """Make `folder/videos` and `folder/model`, each whole or not at all; what exists stays."""
    if not (folder / "videos").exists():
        from wan_core.demo.videos import make_videos

        _make_whole(folder / "videos", make_videos)
    if not (folder / "model").exists():
        from wan_core.demo.model import make_model

        _make_whole(folder / "model", make_model)


def _make_whole(folder: Path, make: Callable[[Path], None]) -> None:
    print(f"making {folder}", file=sys.stderr)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        make(temporary)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    make_inputs(Path(sys.argv[1]))

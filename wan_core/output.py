"""How a stage's output folder becomes whole: written beside its place, its record last, then moved by a rename."""

from __future__ import annotations

import contextlib
import glob
import os
import platform
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wan_core.config import Stage, identity
from wan_core.records import RECORD_NAME, Record, find_record, save_record, versions


def link(source: Path, target: Path) -> None:
    """One file under two names, or a copy where the filesystem has no hard links. Outputs are never written to."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def list_files(folder: Path) -> dict[str, int]:
    """Every file below a folder except records and hidden files: relative path -> bytes."""
    found = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != RECORD_NAME)
    return {
        p.relative_to(folder).as_posix(): p.stat().st_size
        for p in found
        if not any(part.startswith(".") for part in p.relative_to(folder).parts if part != ".nv-meta")
    }


class StageOutput:
    """An output folder being written: write below `path`, then `finish(kind, ...)` returns the record."""

    def __init__(self, stage: Stage, path: Path, output_dir: Path, config: Any, wanted: str) -> None:
        self.stage, self.path, self.output_dir = stage, path, output_dir
        self.config, self.fingerprint, self.started = config, wanted, time.monotonic()
        self.record: Record | None = None

    def finish[R: Record](self, kind: type[R], **values: Any) -> R:
        """Make the stage's record; paths in `values` that lie below `path` move to the output folder."""

        def moved(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return tuple(moved(item) for item in value)
            inside = isinstance(value, Path) and value.is_relative_to(self.path)
            return self.output_dir / value.relative_to(self.path) if inside else value

        record = kind(
            stage=self.stage, path=self.output_dir, fingerprint=self.fingerprint, config=identity(self.config),
            files=list_files(self.path), seconds=round(time.monotonic() - self.started, 3), versions=versions(),
            **{name: moved(value) for name, value in values.items()},
        )  # fmt: skip
        self.record = record
        return record


@contextlib.contextmanager
def writing(stage: Stage, output_dir: Path, config: Any, wanted: str) -> Iterator[StageOutput]:
    """Write a stage's output folder whole or not at all.

    On success the temporary sibling replaces `output_dir` by a rename; on an error it is removed. Of two runs that
    write the same output at once, the first to end wins, and the other's copy is thrown away.

    Raises:
        OSError: the folder cannot be written; names it.
    """
    _sweep(output_dir)
    temporary = output_dir.with_name(f".{output_dir.name}.{platform.node()}.{os.getpid()}-{threading.get_ident()}")
    temporary.mkdir(parents=True)
    output = StageOutput(stage, temporary, output_dir, config, wanted)
    try:
        yield output
        assert output.record is not None, f"{stage} left its output without finish()"
        save_record(output.record, temporary)
        for name in output.record.files:
            with (temporary / name).open("rb") as file:
                os.fsync(file.fileno())
        _replace(temporary, output_dir, output.record)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(temporary: Path, output_dir: Path, record: Record) -> None:
    if find_record(type(record), output_dir, record.fingerprint):
        return  # another run was faster
    if output_dir.exists():  # rename cannot replace a folder that is not empty
        shutil.rmtree(output_dir)
    try:
        temporary.rename(output_dir)
    except OSError:
        if not find_record(type(record), output_dir, record.fingerprint):  # nor did another run come in between
            raise


def _sweep(output_dir: Path) -> None:
    """Remove what killed runs of this output left behind on this machine."""
    prefix = f".{output_dir.name}.{platform.node()}."
    for left in output_dir.parent.glob(f"{glob.escape(prefix)}*"):
        pid = left.name.removeprefix(prefix).partition("-")[0]
        if not Path("/proc", pid).exists():
            shutil.rmtree(left, ignore_errors=True)

"""What a stage returns, and finds again: the record of its output folder.

`record.json` comes into a folder last (`wan_core.output`): one that exists means that the output is whole. Finding it
checks that every file is still there at its size.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from wan_core.config import Stage, identity

RECORD_NAME = "record.json"
# Bumped by hand when a stage's meaning changes, so that old outputs are not taken for new ones.
CODE_VERSIONS: dict[Stage, int] = {
    "encode": 3, "shard": 2, "index": 2, "train": 1, "convert": 1, "sample": 1, "evaluate": 1,
}  # fmt: skip
VERSIONED_PACKAGES = ("torch", "diffusers", "transformers", "megatron-core", "megatron-bridge", "megatron-energon")


def digest(value: Any) -> str:
    """sha256 (hex) of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(stage: Stage, config: Any, **inputs: Any) -> str:
    """A stage's identity: its code version, the identity fields of its config, and its inputs' fingerprints."""
    return digest({"stage": stage, "code": CODE_VERSIONS[stage], "config": identity(config), "inputs": inputs})


@dataclass(frozen=True, kw_only=True)
class Record:
    """Common part of every stage's record."""

    stage: Stage
    path: Path  # the output folder
    fingerprint: str
    config: dict[str, Any]
    files: dict[str, int] = field(default_factory=dict)  # path relative to the folder -> bytes
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return sum(self.files.values())


@dataclass(frozen=True, kw_only=True)
class PartRecord(Record):
    """One encoded part: `part.tar`, and what could not be encoded in `quarantine.jsonl`."""

    num_clips: int
    num_quarantined: int
    vae_error: float | None = (
        None  # |latents - float32's| / |float32's| at the start of the first clip; None in float32
    )


@dataclass(frozen=True, kw_only=True)
class EncodeRecord(Record):
    """All parts of one folder of clips. `path` holds `parts/`, `quarantine.jsonl` and `empty_text.pt`."""

    parts: tuple[Path, ...]  # folders of PartRecords
    num_clips: int
    num_quarantined: int
    encoder: dict[str, str]  # names and weight digests of VAE and text encoder
    vae_error: float = 0.0  # the largest of the parts; 0 in float32


@dataclass(frozen=True, kw_only=True)
class ShardRecord(Record):
    """WebDataset shards named `<split>-<number>.tar`."""

    num_samples: dict[str, int]  # split -> samples
    shards: dict[str, int]  # shard name -> samples
    encoder: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class IndexRecord(Record):
    """Shards with Energon metadata: `path` is what `dataset.path` of a training run takes."""

    num_samples: dict[str, int]
    encoder: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class TrainRecord(Record):
    """A finished training run. `path` is the run folder, checkpoints lie in `checkpoints/`."""

    iteration: int
    num_samples: int  # samples consumed
    final_loss: float
    metrics: Path  # metrics.jsonl: one line per logged step


@dataclass(frozen=True, kw_only=True)
class ConvertRecord(Record):
    """A complete Diffusers folder."""

    iteration: int
    num_tensors: int


@dataclass(frozen=True, kw_only=True)
class SampleRecord(Record):
    """Videos from prompts, `<number>.mp4`, and `contact_sheet.png`."""

    videos: tuple[Path, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class EvaluateRecord(Record):
    """`metrics.json` and `report.html`."""

    metrics: dict[str, float]
    report: Path


def versions() -> dict[str, str]:
    """Versions of Python and of the packages whose arithmetic enters a result."""
    return {"python": platform.python_version(), **{name: version(name) for name in VERSIONED_PACKAGES}}


def save_record(record: Record, folder: Path) -> None:
    """Write `record.json` atomically; paths inside the record's folder are stored relative to it."""

    def plain(value: Any) -> str:
        assert isinstance(value, Path), f"{type(value).__name__} has no place in a record"
        return str(value.relative_to(record.path)) if value.is_relative_to(record.path) else str(value)

    temporary = folder / f".{RECORD_NAME}.{os.getpid()}"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(asdict(record), file, indent=1, ensure_ascii=False, default=plain)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(folder / RECORD_NAME)


def load_record[R: Record](kind: type[R], folder: Path) -> R:
    """Read a folder's record, wherever the folder was moved to.

    Raises:
        FileNotFoundError: the folder has no record, so its output is not whole.
    """
    values = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))

    def absolute(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return tuple(absolute(item) for item in value)
        return folder / value if isinstance(value, Path) else value

    record: R = _adapter(kind).validate_python({**values, "path": "."})  # type: ignore[arg-type] # a class has a hash
    return replace(record, **{name: absolute(value) for name, value in vars(record).items()})


@functools.cache  # a dataset of a million clips has 16,000 records, and making an adapter takes 4 ms
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def find_record[R: Record](kind: type[R], folder: Path, wanted: str | None) -> R | None:
    """The record of a whole output with this fingerprint (None: any), or None: absent, another, or a file is gone or
    altered."""
    if not (folder / RECORD_NAME).is_file():
        return None
    record = load_record(kind, folder)
    if wanted is not None and record.fingerprint != wanted:
        return None
    try:
        whole = all(os.stat(f"{folder}/{name}").st_size == size for name, size in record.files.items())
    except OSError:
        return None
    return record if whole else None

"""Finds the captioned clips of a folder. What has no usable caption is set aside with a reason, never dropped."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from wan_core.digests import cached_file_digest
from wan_core.records import digest

VIDEO_SUFFIXES = (".mp4", ".mov", ".webm", ".mkv")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
UNREAD_SUFFIXES = (".avi", ".m4v", ".wmv", ".flv", ".mpg", ".mpeg", ".ts", ".gif")  # named, so that nobody misses them
META_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
META_NAMES = tuple(stem + suffix for stem in ("meta", "metadata") for suffix in META_SUFFIXES)
CAPTION_KEYS = ("caption", "vila_caption", "text")  # vila_caption: the meta.json of NVIDIA's WAN examples


@dataclass(frozen=True)
class Clip:
    """A captioned range of frames of a file."""

    path: Path  # relative to the scanned folder
    digest: str  # sha256 of the file's bytes
    caption: str
    start_frame: int = 0
    end_frame: int | None = None  # inclusive; None: to the end

    @property
    def key(self) -> str:
        """Stable name of the sample: bytes, caption and range decide it; the file's name and place do not."""
        return digest([self.digest, self.caption, self.start_frame, self.end_frame])[:20]


@dataclass(frozen=True)
class Quarantined:
    """Something that could not be used, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Scan:
    clips: tuple[Clip, ...]  # in path order, keys are unique
    quarantined: tuple[Quarantined, ...]


@dataclass(frozen=True)
class _Row:
    """One caption for one file, before the file is looked at."""

    path: Path  # relative
    caption: str
    start_frame: int = 0
    end_frame: int | None = None


def scan(videos: Path, mode: Literal["video", "frames"] = "video") -> Scan:
    """Every clip below a folder. Mode `frames` takes images too; hidden files are skipped.

    Captions come from one `meta.json` (.jsonl, .csv, .parquet; or `metadata.*`) in the folder itself, with the fields
    file_name, caption and optionally start_frame, end_frame (inclusive); a file that it does not list has its caption
    in a .txt, .json or .jsonl of the same name beside it.

    Raises:
        ValueError: the folder does not exist, holds no clip, or its meta file cannot be read.
    """
    if not videos.is_dir():
        raise ValueError(f"video folder {videos} does not exist; give the folder that holds the clips")
    quarantined: list[Quarantined] = []
    suffixes = VIDEO_SUFFIXES + (IMAGE_SUFFIXES if mode == "frames" else ())
    rows = list(_meta_rows(videos, suffixes, quarantined))
    listed = {row.path for row in rows} | {bad.path for bad in quarantined}
    for path in _visible_files(videos):
        if path in listed:
            continue
        if path.suffix.lower() in UNREAD_SUFFIXES:
            quarantined.append(Quarantined(path, _unread(path, suffixes)))
        elif path.suffix.lower() in suffixes:
            found = _sidecar(videos, path)
            (rows if isinstance(found, _Row) else quarantined).append(found)  # type: ignore[arg-type]
    if not rows and not quarantined:
        raise ValueError(f"video folder {videos} holds no {', '.join(suffixes)} file; add clips, or check the path")
    return _identified(videos, rows, quarantined)


def _identified(videos: Path, rows: list[_Row], quarantined: list[Quarantined]) -> Scan:
    """Digest the files; the second of two clips equal in bytes, caption and range is set aside."""
    paths = sorted({row.path for row in rows})
    with ThreadPoolExecutor() as pool:  # sha256 releases the GIL
        digests = dict(zip(paths, pool.map(lambda path: cached_file_digest(videos / path), paths), strict=True))
    clips: dict[str, Clip] = {}
    for row in sorted(rows, key=lambda row: (row.path, row.start_frame)):
        clip = Clip(row.path, digests[row.path], row.caption, row.start_frame, row.end_frame)
        first = clips.setdefault(clip.key, clip)
        if first is not clip:
            quarantined.append(Quarantined(row.path, f"duplicate: same bytes, caption and frames as {first.path}"))
    ordered = sorted(clips.values(), key=lambda clip: (clip.path, clip.start_frame, clip.key))
    return Scan(tuple(ordered), tuple(sorted(quarantined, key=lambda bad: (bad.path, bad.reason))))


def _visible_files(videos: Path) -> Iterator[Path]:
    for path in sorted(videos.rglob("*")):
        relative = path.relative_to(videos)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            yield relative


def _unread(path: Path, suffixes: tuple[str, ...]) -> str:
    return f"{path.suffix or 'no suffix'} is not one of {', '.join(suffixes)}; convert it"


def _sidecar(videos: Path, path: Path) -> _Row | Quarantined:
    for suffix in (".txt", ".json", ".jsonl"):
        sidecar = (videos / path).with_suffix(suffix)
        if not sidecar.is_file():
            continue
        try:
            text = sidecar.read_text(encoding="utf-8-sig").strip()
            fields = {"caption": text} if suffix == ".txt" else _first_value(text, suffix)
            return _row(path, fields)
        except ValueError as error:  # JSON and UTF-8 errors are ValueErrors too
            return Quarantined(path, f"caption file {sidecar.name}: {error}")
    return Quarantined(path, "no caption: no .txt, .json or .jsonl beside it, and no meta file lists it")


def _first_value(text: str, suffix: str) -> dict[str, Any]:
    value = json.loads(text.split("\n", 1)[0] if suffix == ".jsonl" else text)
    if isinstance(value, str):
        return {"caption": value}
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not an object with a caption")
    return value


def _meta_rows(videos: Path, suffixes: tuple[str, ...], quarantined: list[Quarantined]) -> Iterator[_Row]:
    found = [videos / name for name in META_NAMES if (videos / name).is_file()]
    if len(found) > 1:
        raise ValueError(f"video folder {videos} holds {' and '.join(p.name for p in found)}; keep one of them")
    for number, fields in enumerate(_read_table(found[0]) if found else (), start=1):
        name = fields.get("file_name") if isinstance(fields, dict) else None
        if not isinstance(name, str) or not name:
            raise ValueError(f"{found[0]}, row {number} has no file_name; each row needs file_name and caption")
        path = Path(name)
        if path.is_absolute() or ".." in path.parts:
            quarantined.append(Quarantined(path, f"{found[0].name} names a file outside the folder"))
        elif not (videos / path).is_file():
            quarantined.append(Quarantined(path, f"{found[0].name} lists it, but the file does not exist"))
        elif path.suffix.lower() not in suffixes:
            quarantined.append(Quarantined(path, _unread(path, suffixes)))
        else:
            try:
                yield _row(path, fields)
            except ValueError as error:
                quarantined.append(Quarantined(path, f"{found[0].name}, row {number}: {error}"))


def _read_table(path: Path) -> list[Any]:
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet  # here: half a second that other formats need not pay

            return pyarrow.parquet.read_table(path).to_pylist()
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            return list(csv.DictReader(text.splitlines(keepends=True)))
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        rows = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}; repair it") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a {type(rows).__name__}, not a list of rows with file_name and caption")
    return rows


def _row(path: Path, fields: dict[str, Any]) -> _Row:
    """Raises ValueError: no caption, or a range that is none."""
    caption = next((fields[key] for key in CAPTION_KEYS if fields.get(key)), "")
    if not isinstance(caption, str):
        raise ValueError(f"caption {caption!r} is not text")
    if not caption.strip():
        raise ValueError("no caption")
    start, end = (_frame_number(fields, name) for name in ("start_frame", "end_frame"))
    if end is not None and end < (start or 0):
        raise ValueError(f"end_frame={end} is before start_frame={start or 0}")
    return _Row(path, caption.strip(), start or 0, end)


def _frame_number(fields: dict[str, Any], name: str) -> int | None:
    value = fields.get(name)
    if value is None or value == "" or value != value:  # csv leaves empty text, parquet NaN
        return None
    number = int(value)
    if number != float(value) or number < 0:
        raise ValueError(f"{name}={value!r} is not a frame number")
    return number

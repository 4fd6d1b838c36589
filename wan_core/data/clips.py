"""Finds the captioned clips of a folder. What has no usable caption is set aside with a reason, never dropped."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal

from wan_core.data.captions import Row, read_sidecar, read_table, row_of
from wan_core.data.folder import File, Folder, Location, open_folder

VIDEO_SUFFIXES = (".mp4", ".mov", ".webm", ".mkv")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
UNREAD_SUFFIXES = (".avi", ".m4v", ".wmv", ".flv", ".mpg", ".mpeg", ".ts", ".gif")  # named, so that nobody misses them
SIDECAR_SUFFIXES = (".txt", ".json", ".jsonl")
META_NAMES = tuple(stem + suffix for stem in ("meta", "metadata") for suffix in (".json", ".jsonl", ".csv", ".parquet"))


@dataclass(frozen=True, slots=True)
class Clip:
    """A captioned range of frames of a file."""

    path: str  # relative to the scanned folder, with /
    digest: str  # of the file's content, see Folder.digests
    caption: str
    start_frame: int = 0
    end_frame: int | None = None  # inclusive; None: to the end
    key: str = field(init=False)  # stable name of the sample: content, caption and range decide it, the name does not

    def __post_init__(self) -> None:
        text = f"{self.digest} {self.start_frame} {self.end_frame} {self.caption}"
        object.__setattr__(self, "key", hashlib.sha256(text.encode()).hexdigest()[:20])


@dataclass(frozen=True, slots=True)
class Quarantined:
    """Something that could not be used, and why."""

    path: str
    reason: str


# Of which row or file a reason is: a table's rows would otherwise be as many kinds of reasons.
PLACE = re.compile(r"(meta(data)?\.\w+|caption file .*?\.(txt|jsonl?))(, row \d+)?: ", re.DOTALL)


def kinds(reasons: Iterable[str]) -> list[tuple[str, int]]:
    """Reasons without places and details, each with its count, the most common first."""
    bare = (reason[found.end() :] if (found := PLACE.match(reason)) else reason for reason in reasons)
    return Counter(reason.partition(":")[0] for reason in bare).most_common()


@dataclass(frozen=True)
class Scan:
    clips: tuple[Clip, ...]  # in path order, keys are unique
    quarantined: tuple[Quarantined, ...]


def scan(videos: Location, mode: Literal["video", "frames"] = "video") -> Scan:
    """Every clip below a folder. Mode `frames` takes images too; hidden files are skipped.

    Captions come from one `meta.json` (.jsonl, .csv, .parquet; or `metadata.*`) in the folder itself, with the fields
    file_name, caption and optionally start_frame, end_frame (inclusive); a file that it does not list has its caption
    in a .txt, .json or .jsonl (a row per line) of the same name beside it. Where two of these differ, it is set aside.

    Raises:
        ValueError: the folder does not exist, holds no clip, or its meta file cannot be read.
    """
    suffixes = VIDEO_SUFFIXES + (IMAGE_SUFFIXES if mode == "frames" else ())
    folder = open_folder(videos)
    quarantined: list[Quarantined] = []
    media, sidecars, tables = _listed(folder, suffixes, quarantined)
    if len(tables) > 1:
        raise ValueError(f"video folder {videos} holds {' and '.join(sorted(tables))}; keep one of them")
    rows: list[Row] = []
    for table in tables:
        rows += _table_rows(folder, table, media, suffixes, quarantined)
    named = {row.file.name for row in rows} | {bad.path for bad in quarantined}
    rows += _sidecar_rows(folder, [file for name, file in media.items() if name not in named], sidecars, quarantined)
    if not rows and not quarantined:
        raise ValueError(f"video folder {videos} holds no {', '.join(suffixes)} file; add clips, or check the path")
    del media, sidecars, named
    return _identified(folder, rows, quarantined)


def _listed(
    folder: Folder, suffixes: tuple[str, ...], quarantined: list[Quarantined]
) -> tuple[dict[str, File], set[str], list[str]]:
    """Clips by name, names of what may be captions, names of meta files."""
    media, sidecars, tables = dict[str, File](), set[str](), list[str]()
    for file in folder.files():
        name = file.name
        suffix = _suffix(name)
        if suffix in suffixes or suffix in UNREAD_SUFFIXES:
            if not _is_text(name):
                quarantined.append(Quarantined(_shown(name), "file name is not UTF-8; rename it"))
            elif suffix in suffixes:
                media[name] = file
            else:
                quarantined.append(Quarantined(name, _unread(name, suffixes)))
        elif name in META_NAMES:
            tables.append(name)
        elif suffix in SIDECAR_SUFFIXES:
            sidecars.add(name)
    for name, reason in folder.problems():
        if _suffix(name) in (*suffixes, "") or name.endswith("/"):
            quarantined.append(Quarantined(_shown(name), reason))
    return media, sidecars, tables


def _table_rows(
    folder: Folder, table: str, media: dict[str, File], suffixes: tuple[str, ...], quarantined: list[Quarantined]
) -> Iterator[Row]:
    unusable = {bad.path for bad in quarantined}  # and listed with a reason already
    for number, fields in read_table(folder, table):
        where = f"{table}, row {number}"
        name = fields.get("file_name") if isinstance(fields, dict) else None
        if isinstance(fields, ValueError):
            quarantined.append(Quarantined(where, str(fields)))
        elif not isinstance(name, str) or not name:
            quarantined.append(Quarantined(where, "it has no file_name; each row needs file_name and caption"))
        elif name in unusable:
            continue
        elif (file := media.get(name) or media.get(_plain(name))) is None:
            quarantined.append(Quarantined(_shown(name), f"{where}: {_why_not(name, suffixes)}"))
        else:
            try:
                yield row_of(file, fields)
            except ValueError as error:
                quarantined.append(Quarantined(name, f"{where}: {error}"))


def _why_not(name: str, suffixes: tuple[str, ...]) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        return "it names a file outside the folder"
    if _suffix(name) not in suffixes:
        return _unread(name, suffixes)
    return "it lists a file that does not exist"


def _sidecar_rows(
    folder: Folder, files: list[File], sidecars: set[str], quarantined: list[Quarantined]
) -> Iterator[Row]:
    """Captions of files that no table lists."""
    found: list[tuple[File, list[str]]] = []
    for file in files:
        stem = file.name[: -len(_suffix(file.name))]
        names = [stem + suffix for suffix in SIDECAR_SUFFIXES if stem + suffix in sidecars]
        if names:
            found.append((file, names))
        else:
            reason = "no caption: no .txt, .json or .jsonl beside it, and no meta file lists it"
            quarantined.append(Quarantined(file.name, reason))
    contents = folder.read([name for _, names in found for name in names])
    for file, names in found:
        read = {name.rpartition("/")[2]: _sidecar(file, name, next(contents)) for name in names}
        (first, (own, faults)), *others = read.items()
        other = next((name for name, (theirs, _) in others if own and theirs and theirs != own), None)
        if other is None:
            quarantined += [Quarantined(file.name, fault) for fault in faults]
            yield from own
        else:
            quarantined.append(Quarantined(file.name, f"two captions: {first} and {other} differ; keep one"))


def _sidecar(file: File, name: str, content: bytes | OSError) -> tuple[list[Row], list[str]]:
    """What a caption file says of a file, and why not more."""
    where = f"caption file {name.rpartition('/')[2]}"
    if isinstance(content, OSError):
        return [], [f"{where}: it cannot be read: {content.strerror or content}"]
    rows, faults = list[Row](), list[str]()
    values = read_sidecar(name, content)
    for number, fields in enumerate(values, start=1):
        try:
            if isinstance(fields, ValueError):
                raise fields
            rows.append(row_of(file, fields))
        except ValueError as error:
            faults.append(f"{where}{f', row {number}' if len(values) > 1 else ''}: {error}")
    return rows, faults


def _identified(folder: Folder, rows: list[Row], quarantined: list[Quarantined]) -> Scan:
    """Look at the files' content; the second of two clips equal in content, caption and range is set aside."""
    rows.sort(key=lambda row: (row.file.name, row.start_frame))
    files = list(dict.fromkeys(row.file for row in rows))
    digests = dict(zip(files, folder.digests(files), strict=True))
    clips: dict[str, Clip] = {}
    for row in rows:
        value = digests[row.file]
        if isinstance(value, OSError):
            quarantined.append(Quarantined(row.file.name, f"cannot be read: {value.strerror or value}"))
            continue
        clip = Clip(row.file.name, value, row.caption, row.start_frame, row.end_frame)
        first = clips.setdefault(clip.key, clip)
        if first is not clip:
            quarantined.append(Quarantined(clip.path, f"duplicate: same bytes, caption and frames as {first.path}"))
    return Scan(in_order(clips.values()), tuple(sorted(quarantined, key=lambda bad: (bad.path, bad.reason))))


def in_order(clips: Iterable[Clip]) -> tuple[Clip, ...]:
    """By path, then by place in the file."""
    return tuple(sorted(clips, key=lambda clip: (clip.path, clip.start_frame, clip.key)))


def _suffix(name: str) -> str:
    stem, dot, suffix = name.rpartition(".")
    return f".{suffix.lower()}" if dot and stem and "/" not in suffix else ""


def _unread(name: str, suffixes: tuple[str, ...]) -> str:
    return f"{_suffix(name) or 'no suffix'} is not one of {', '.join(suffixes)}; convert it"


def _plain(name: str) -> str:
    """`./a//b.mp4` as the listing has it; what leads outside stays as it is and is not found."""
    return PurePosixPath(name).as_posix()


def _is_text(name: str) -> bool:
    return name.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in name)


def _shown(name: str) -> str:
    """A name that can be written as UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()

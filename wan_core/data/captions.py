"""What sidecar files and meta tables say about clips. A row that cannot be used never harms its neighbours."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from wan_core.data.folder import File, Folder

# vila_caption: the meta.json of NVIDIA's WAN examples
FIELDS = ("file_name", "caption", "vila_caption", "text", "start_frame", "end_frame")
MAX_CHARACTERS = 20_000  # of a caption; the text encoder sees 512 tokens, and tokenising megabytes takes minutes


@dataclass(frozen=True, slots=True)
class Row:
    """One caption for one file."""

    file: File
    caption: str
    start_frame: int = 0
    end_frame: int | None = None


def read_sidecar(name: str, content: bytes) -> list[dict[str, Any] | ValueError]:
    """The fields of what a .txt, .json or .jsonl beside a clip says, a .jsonl once per line; a `ValueError` in place of
    what is not UTF-8, not JSON, or neither an object nor a text."""
    if name.endswith(".jsonl"):
        return [_fields(value) for value in _jsonl(content)] or [ValueError("no caption")]
    try:
        text = content.decode("utf-8-sig").strip()
        return [{"caption": text} if name.endswith(".txt") else _fields(_parsed(text))]
    except ValueError as error:
        return [error]


def _fields(value: Any) -> dict[str, Any] | ValueError:
    if isinstance(value, str):
        return {"caption": value}
    if isinstance(value, dict | ValueError):
        return value
    return ValueError(f"it holds a {type(value).__name__}, not an object with a caption")


def _parsed(text: str | bytes) -> Any:
    """JSON; whatever is wrong with it is a `ValueError`."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def row_of(file: File, fields: dict[str, Any]) -> Row:
    """A file's caption and range.

    Raises:
        ValueError: no caption, one that cannot be used, or a range that is none.
    """
    caption = fields.get("caption") or fields.get("vila_caption") or fields.get("text") or ""
    if not isinstance(caption, str):
        raise ValueError(f"caption of type {type(caption).__name__} is not text")
    caption = caption.strip()
    if not caption:
        raise ValueError("no caption")
    if len(caption) > MAX_CHARACTERS:
        raise ValueError(f"caption of {len(caption)} characters, at most {MAX_CHARACTERS} are taken; shorten it")
    if not caption.isascii() and any("\ud800" <= letter <= "\udfff" for letter in caption):
        raise ValueError("caption holds half of a surrogate pair, which is not Unicode text")
    start, end = _frame_number(fields, "start_frame"), _frame_number(fields, "end_frame")
    if end is not None and end < (start or 0):
        raise ValueError(f"end_frame={end} is before start_frame={start or 0}")
    return Row(file, caption, start or 0, end)


def _frame_number(fields: dict[str, Any], name: str) -> int | None:
    value = fields.get(name)
    if type(value) is int and value >= 0:
        return value
    if value is None or value == "" or value != value:  # csv leaves empty text, parquet NaN
        return None
    try:
        number = float(value)
        if number == int(number) and number >= 0:
            return int(number)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{name}={value!r} is not a frame number")


def read_table(folder: Folder, name: str) -> Iterator[tuple[int, Any]]:
    """(number, fields) of each row of a meta file; a `ValueError` in place of the fields of a damaged row.

    Rows are made one after another: a million of them as objects would be gigabytes.

    Raises:
        ValueError: the file as a whole cannot be read.
    """
    (content,) = folder.read([name])
    if isinstance(content, OSError):
        raise ValueError(f"{name} cannot be read: {content}; repair it") from content
    rows = {"parquet": _parquet, "csv": _csv, "jsonl": _jsonl, "json": _json}[name.rpartition(".")[2]]
    try:
        yield from enumerate(rows(content), start=1)
    except (ValueError, csv.Error, RecursionError) as error:
        raise ValueError(f"{name} cannot be read: {error}; repair it") from error


def _parquet(content: bytes) -> Iterator[Any]:
    import pyarrow.parquet  # here: half a second that other formats need not pay

    table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content))
    _check_columns(table.schema_arrow.names)
    columns = [name for name in FIELDS if name in table.schema_arrow.names]
    for batch in table.iter_batches(batch_size=10_000, columns=columns):
        yield from batch.to_pylist()


def _csv(content: bytes) -> Iterator[Any]:
    csv.field_size_limit(1 << 30)  # 128 KiB by default, an error for the whole file
    reader = csv.DictReader(io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig", newline=""), strict=True)
    _check_columns(reader.fieldnames or [])
    yield from reader


def _check_columns(names: Any) -> None:
    if "file_name" not in names:
        raise ValueError(f"it has the columns {', '.join(names) or '(none)'}; each row needs file_name and caption")


def _jsonl(content: bytes) -> Iterator[Any]:
    start = 3 if content.startswith(b"\xef\xbb\xbf") else 0
    while start < len(content):
        end = content.find(b"\n", start)
        line = content[start : end if end >= 0 else len(content)]
        start = end + 1 if end >= 0 else len(content)
        if line.strip():
            try:
                yield _parsed(line)
            except ValueError as error:  # UnicodeDecodeError too
                yield ValueError(f"it is not JSON: {error}")


def _json(content: bytes) -> Iterator[Any]:
    """The elements of one array, decoded one at a time."""
    text = content.decode("utf-8-sig")
    del content
    decoder, blank = json.JSONDecoder(), " \t\r\n"

    def skipped(position: int) -> int:
        while position < len(text) and text[position] in blank:
            position += 1
        return position

    position = skipped(0)
    if text[position : position + 1] != "[":
        raise ValueError(f"it holds a {type(_parsed(text)).__name__}, not a list of rows with file_name and caption")
    position = skipped(position + 1)
    mark = text[position : position + 1]
    if mark == "]":
        position += 1
    while mark != "]":
        value, position = decoder.raw_decode(text, position)
        yield value
        position = skipped(position)
        mark = text[position : position + 1]
        if mark not in (",", "]"):
            raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        position = skipped(position + 1)
    if skipped(position) < len(text):
        raise json.JSONDecodeError("Extra data", text, position)

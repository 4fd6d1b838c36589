"""samples.parquet: a row per sample of a dataset, for people, for the dataset card and for any table tool."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan_core.config import PATCH_SIZE
from wan_core.data.parts import StoredSample

if TYPE_CHECKING:  # imported where it is used: half a second
    import pyarrow

CATALOGUE_NAME = "samples.parquet"


@dataclass(frozen=True)
class Row:
    key: str
    digest: str  # sha256 of the source file
    start_frame: int
    end_frame: int | None
    caption: str
    frames: int  # of the encoded clip
    fps: float
    height: int
    width: int
    num_tokens: int
    text_length: int  # positions of the caption's embedding

    @classmethod
    def of(cls, key: str, sample: StoredSample) -> Row:
        info, (frames, height, width) = sample.info, sample.latents.shape[-3:]
        num_tokens = (frames // PATCH_SIZE[0]) * (height // PATCH_SIZE[1]) * (width // PATCH_SIZE[2])
        own = {f.name: info[f.name] for f in fields(cls) if f.name in info}
        return cls(key=key, num_tokens=num_tokens, text_length=sample.text_embeds.shape[0], **own)


class Catalogue:
    """The file being written: one row group per shard, so that memory holds one shard's rows."""

    def __init__(self, writer: Any, earlier: Any) -> None:
        self.writer, self.earlier = writer, earlier

    @classmethod
    @contextlib.contextmanager
    def writing(cls, folder: Path, earlier: Path | None = None) -> Iterator[Catalogue]:
        """Write the catalogue of a folder, some of it perhaps from an earlier folder's."""
        import pyarrow.parquet

        with contextlib.ExitStack() as stack:
            old = earlier and stack.enter_context(pyarrow.parquet.ParquetFile(earlier / CATALOGUE_NAME))
            new = pyarrow.parquet.ParquetWriter(folder / CATALOGUE_NAME, _schema(), compression="zstd")
            yield cls(stack.enter_context(new), old)

    def add(self, split: str, shard: str, rows: Sequence[Row]) -> None:
        """The rows of a shard, in its order."""
        import pyarrow

        values = [{**asdict(row), "split": split, "shard": shard} for row in rows]
        self.writer.write_table(pyarrow.Table.from_pylist(values, _schema()), row_group_size=len(values))

    def copy(self, number: int) -> None:
        """The rows of the earlier catalogue's shard of this number."""
        table = self.earlier.read_row_group(number)
        self.writer.write_table(table, row_group_size=len(table))


def _schema() -> pyarrow.Schema:
    import pyarrow

    text, small, number = pyarrow.string(), pyarrow.int32(), pyarrow.int64()
    return pyarrow.schema({
        "key": text, "split": text, "shard": text, "digest": text, "start_frame": number, "end_frame": number,
        "caption": text, "frames": small, "fps": pyarrow.float64(), "height": small, "width": small,
        "num_tokens": number, "text_length": small,
    })  # fmt: skip

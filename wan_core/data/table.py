"""Where every sample of an indexed dataset lies, from Energon's index, and how long it is, from the catalogue.

Both together let the loader plan packs without opening a shard, and read any sample with one call.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from megatron.energon.flavors.webdataset.config import INDEX_SQLITE_FILENAME

from wan_core.config import check
from wan_core.data.catalogue import CATALOGUE_NAME
from wan_core.data.index import META_FOLDER
from wan_core.data.samples import read_members


@dataclass(frozen=True)
class SampleTable:
    """The samples of one split, in the order of the shards."""

    folder: Path
    keys: np.ndarray  # [n] str
    shards: np.ndarray  # [n] str, file names
    offsets: np.ndarray  # [n] int64, of the sample's first tar header
    sizes: np.ndarray  # [n] int64, bytes from there to the sample's end
    num_tokens: np.ndarray  # [n] int64, length in the transformer's sequence

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def read(cls, folder: Path, split: str) -> SampleTable:
        """Read one split's rows.

        Raises:
            ValueError: the folder is not the output of the index stage, or the split is empty.
        """
        index, catalogue = folder / META_FOLDER / INDEX_SQLITE_FILENAME, folder / CATALOGUE_NAME
        for path in (index, catalogue):
            check(
                path.is_file(),
                f"dataset.path={folder} is not indexed ({path.name} is missing); run the index stage on its shards, "
                "and give the folder that it wrote",
            )
        rows = pq.read_table(catalogue, columns=["key", "shard", "num_tokens"], filters=[("split", "=", split)])
        check(
            rows.num_rows > 0,
            f"dataset.path={folder} has no {split} samples; add clips"
            + (", raise shard.val_share, or set validation.eval_interval=0" if split == "val" else ""),
        )
        with contextlib.closing(sqlite3.connect(f"file:{index}?mode=ro&immutable=1", uri=True)) as database:
            found = database.execute("SELECT sample_key, byte_offset, byte_size FROM samples")
            ranges = {key: (offset, size) for key, offset, size in found}
        keys, shards, num_tokens = (rows.column(name).to_numpy() for name in rows.column_names)
        try:
            places = np.array([ranges[key] for key in keys], dtype=np.int64)
        except KeyError as error:
            raise ValueError(f"{folder}: the index lacks sample {error}; run shard and index again") from None
        return cls(folder, keys, shards, places[:, 0], places[:, 1], num_tokens)

    def load(self, index: int) -> dict[str, Any]:
        """The decoded members of one sample, by extension.

        Raises:
            ValueError: the shard is gone or shorter than when it was indexed, or a member is damaged.
        """
        path, offset, size = self.folder / str(self.shards[index]), int(self.offsets[index]), int(self.sizes[index])
        check(path.is_file(), f"{path} is gone; run shard and index again")
        with path.open("rb", buffering=0) as shard:
            raw = os.pread(shard.fileno(), size, offset)
        check(len(raw) == size, f"{path} ends inside sample {self.keys[index]}; run shard and index again")
        return read_members(str(self.keys[index]), raw)

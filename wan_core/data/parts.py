"""The samples of an encoded dataset where encode left them: found by offset, looked at once, copied as they are."""

from __future__ import annotations

import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wan_core.config import check
from wan_core.data.samples import decode_member, members_of
from wan_core.records import EncodeRecord

BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class StoredSamples:
    """All samples as columns: a million take 0.2 GB, as objects they would take two.

    A sample is one run of bytes in its part, tar headers and padding included, so that copying it needs no tar code.
    """

    keys: list[str]
    digests: list[str]  # of the source files, in hex
    parts: list[Path]  # folders
    part: np.ndarray  # int32 [n], index into parts
    offset: np.ndarray  # int64 [n], of the first header in part.tar
    num_bytes: np.ndarray  # int64 [n]
    kinds: tuple[str, ...]  # extensions of each sample's members, which lie one behind the other

    @classmethod
    def of(cls, encoded: EncodeRecord) -> StoredSamples:
        """Look the samples up in the parts' member lists.

        Raises:
            ValueError: a part lacks a sample, or its members are not those that encode writes.
        """
        keys, digests, rows, kinds = [], [], [], members_of(encoded.encoder)
        numbers = {folder.name: number for number, folder in enumerate(encoded.parts)}
        with (encoded.path / "clips.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                keys.append(row["key"])
                digests.append(row["digest"])
                rows.append(numbers[row["part"]])
        part = np.array(rows, dtype=np.int32)
        spans = np.zeros((2, len(keys)), dtype=np.int64)
        by_part = np.argsort(part, kind="stable")
        edges = np.searchsorted(part[by_part], np.arange(len(encoded.parts) + 1))
        for number, folder in enumerate(encoded.parts):
            members = json.loads((folder / "members.json").read_text())
            for row in by_part[edges[number] : edges[number + 1]]:
                spans[:, row] = _span(folder, keys[row], members, kinds)
        return cls(keys, digests, list(encoded.parts), part, spans[0], spans[1], kinds)

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, row: int) -> StoredSample:
        """One sample's bytes, looked at.

        Raises:
            ValueError: the part is damaged, or holds values that are not finite.
        """
        folder, key = self.parts[self.part[row]], self.keys[row]
        with (folder / "part.tar").open("rb", buffering=0) as tar:
            raw = os.pread(tar.fileno(), int(self.num_bytes[row]), int(self.offset[row]))
        try:
            check(len(raw) == self.num_bytes[row], "the file ends too early")
            return _parsed(key, raw, self.kinds)
        except ValueError as error:
            raise ValueError(
                f"{folder / 'part.tar'} is damaged at sample {key}: {error}; delete {folder} and run encode again, "
                "which then encodes the clips of this part alone"
            ) from error


@dataclass(frozen=True)
class StoredSample:
    raw: bytes  # as in a tar: per member a header block, and the content padded to blocks
    info: dict[str, Any]  # the fields of ClipInfo
    latents: Tensor  # [16, T, H, W]
    text_embeds: Tensor  # [n, text_dim]


def _span(
    folder: Path, key: str, members: dict[str, tuple[int, int]], kinds: tuple[str, ...]
) -> tuple[int, int]:  # fmt: skip
    """Offset and bytes of a sample's run."""
    found = [members.get(f"{key}.{kind}") for kind in kinds]
    check(None not in found, f"{folder / 'members.json'} lacks members of sample {key}; delete {folder}, encode again")
    begin = end = found[0][0] - BLOCK  # type: ignore[index]
    for offset, size in found:  # type: ignore[misc]
        check(offset == end + BLOCK, f"members of sample {key} are scattered in {folder}; delete it, encode again")
        end = offset + -(-size // BLOCK) * BLOCK
    return begin, end - begin


def _parsed(key: str, raw: bytes, kinds: tuple[str, ...]) -> StoredSample:
    values, offset = {}, 0
    for kind in kinds:
        try:
            header = tarfile.TarInfo.frombuf(raw[offset : offset + BLOCK], "utf-8", "strict")
        except tarfile.HeaderError as error:
            raise ValueError(f"header of .{kind}: {error}") from error
        check(header.name == f"{key}.{kind}", f"{header.name} lies where {key}.{kind} should")
        offset += BLOCK
        values[kind] = decode_member(header.name, raw[offset : offset + header.size])
        offset += -(-header.size // BLOCK) * BLOCK
    check(offset == len(raw), f"its members have {offset} bytes instead of {len(raw)}")
    for kind, value in values.items():
        check(kind == "json" or is_finite(value), f".{kind}'s values are not finite")
    return StoredSample(raw, values["json"], values["pth"], values["pickle"])


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is infinite or NaN: both show in the extremes, at memory speed."""
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())

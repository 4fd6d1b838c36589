"""The shard sample format: three tar members per sample, written byte for byte alike, read without running code.

    <key>.json              side-info (`ClipInfo`)
    <key>.pickle            text embeddings, a pickled tensor
    <key>.pth               latents, as torch.save writes them
    <key>.image_embeds.pth  two more for image-to-video: CLIP's embeddings of the first frame,
    <key>.image_latents.pth and the latents of a video that is this frame, then grey

Plain `pickle.loads` and `torch.load` read them too, so any WebDataset reader does.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import struct
import tarfile
import zipfile
import zlib
from collections import OrderedDict
from dataclasses import asdict, dataclass
from typing import Any

import torch
from megatron.energon.flavors.webdataset import SampleDecoder
from torch import Tensor

from wan_core.config import IMAGE_LENGTH, TEXT_LENGTH
from wan_core.first_frame import FirstFrame

MEMBERS = ("json", "pickle", "pth")  # of each sample, in this order
IMAGE_MEMBERS = ("image_embeds.pth", "image_latents.pth")


@dataclass(frozen=True)
class ClipInfo:
    """Where a sample comes from and how it was made: all of it follows from the clip's bytes and the settings."""

    caption: str
    digest: str  # sha256 of the source file
    start_frame: int
    end_frame: int | None
    frames: int  # after resampling to fps
    fps: float
    height: int  # pixels
    width: int
    mode: str
    center_crop: bool
    tiled: bool
    vae_dtype: str
    text_dtype: str
    encoder: dict[str, str]


@dataclass(frozen=True)
class Sample:
    key: str
    latents: Tensor  # [16, T, H, W], normalised
    text_embeds: Tensor  # [n <= TEXT_LENGTH, text_dim]
    info: ClipInfo
    first_frame: FirstFrame | None = None  # for image-to-video

    def __post_init__(self) -> None:
        assert self.latents.ndim == 4, f"latents {tuple(self.latents.shape)} are not [C, T, H, W]"
        n = self.text_embeds.shape[0]
        assert self.text_embeds.ndim == 2 and 1 <= n <= TEXT_LENGTH, f"text_embeds {tuple(self.text_embeds.shape)}"
        if frame := self.first_frame:
            assert frame.latents.shape == self.latents.shape, f"first frame's latents {tuple(frame.latents.shape)}"
            assert frame.embeds.ndim == 2 and len(frame.embeds) == IMAGE_LENGTH, f"{tuple(frame.embeds.shape)}"
        # WebDataset ends a key at its first dot.
        assert self.key and "." not in self.key and "/" not in self.key, f"key {self.key!r}"


def write_sample(tar: tarfile.TarFile, sample: Sample) -> None:
    """Append a sample's members; equal samples give equal bytes."""
    info = json.dumps(asdict(sample.info), ensure_ascii=False, sort_keys=True)
    write_member(tar, f"{sample.key}.json", info.encode())
    write_member(tar, f"{sample.key}.pickle", _pickled(sample.text_embeds))
    write_member(tar, f"{sample.key}.pth", saved(sample.latents))
    if frame := sample.first_frame:
        for kind, tensor in zip(IMAGE_MEMBERS, (frame.embeds, frame.latents), strict=True):
            write_member(tar, f"{sample.key}.{kind}", saved(tensor))


def write_member(tar: tarfile.TarFile, name: str, raw: bytes) -> None:
    """Append a file without time or owner."""
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = len(raw), 0o644, 0
    tar.addfile(member, io.BytesIO(raw))


def saved(tensor: Tensor) -> bytes:
    """torch.save of a tensor on the CPU, of its own elements only (a slice would drag its whole storage along)."""
    buffer = io.BytesIO()
    torch.save(tensor.detach().cpu().contiguous().clone(), buffer)
    return buffer.getvalue()


def _pickled(tensor: Tensor) -> bytes:
    """The pickle of `torch.storage._load_from_bytes(saved(tensor))`, put together by hand.

    A tensor's own pickle holds addresses in memory, and megatron-core, once imported, puts a function of its own in
    torch's place: `pickle.dumps` would give other bytes in every process.
    """
    body = saved(tensor)
    call = b"c" + b"torch.storage\n_load_from_bytes\n" + pickle.BINBYTES + struct.pack("<I", len(body)) + body
    return pickle.PROTO + b"\x04" + call + pickle.TUPLE1 + pickle.REDUCE + pickle.STOP


def _load_tensor(raw: bytes) -> Any:
    if raw.startswith(b"PK"):  # torch's present format; the legacy one holds no checksums
        _check_crc(raw)
    return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)


def _check_crc(raw: bytes) -> None:
    """Compare the checksums that torch.save wrote, as torch.load does not; 2.4 GB/s, zipfile's own test 0.6.

    Raises:
        ValueError: bytes were altered since they were written.
    """
    view = memoryview(raw)
    for entry in zipfile.ZipFile(io.BytesIO(raw)).infolist():
        start = entry.header_offset + 30 + sum(struct.unpack_from("<HH", view, entry.header_offset + 26))
        if zlib.crc32(view[start : start + entry.compress_size]) != entry.CRC:
            raise ValueError(f"checksum of {entry.filename} differs, its bytes were altered")


# What pickling a tensor writes. Left out above all: BUILD, which sets attributes of whatever lies on the stack.
# fmt: off
TENSOR_OPCODES = {
    "PROTO", "FRAME", "GLOBAL", "STACK_GLOBAL", "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BININT", "BININT1", "BININT2", "LONG1", "NONE", "NEWTRUE", "NEWFALSE", "MARK", "EMPTY_TUPLE",
    "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "REDUCE", "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET",
    "STOP",
}
# fmt: on


def _unpickle_tensor(raw: bytes) -> Any:
    for opcode, _, _ in pickletools.genops(raw):
        if opcode.name not in TENSOR_OPCODES:
            raise pickle.UnpicklingError(f"opcode {opcode.name} is not part of a pickled tensor")
    return _TensorUnpickler(io.BytesIO(raw)).load()


class _TensorUnpickler(pickle.Unpickler):
    """Knows the callables that a pickled tensor needs, and nothing else."""

    ALLOWED = {  # noqa: RUF012
        ("torch.storage", "_load_from_bytes"): _load_tensor,  # torch's own unpickles whatever it is given
        ("megatron.core.safe_globals", "safe_load_from_bytes"): _load_tensor,  # what megatron-core puts in its place
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
        ("collections", "OrderedDict"): OrderedDict,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not part of a tensor")
        return self.ALLOWED[module, name]


def decode_member(name: str, raw: bytes) -> Any:
    """A member's content: a tensor for .pth and .pickle, JSON values for .json.

    Raises:
        ValueError: another type, damaged bytes, or anything but a tensor inside; nothing of it is executed.
    """
    kind = name.rsplit(".", 1)[-1].lower()
    if kind not in ("pth", "pickle", "json"):
        raise ValueError(f"shard member {name!r} is not .pth, .pickle or .json; write shards with `wan shard`")
    try:
        if kind == "json":
            return json.loads(raw)
        value = _load_tensor(raw) if kind == "pth" else _unpickle_tensor(raw)
    except Exception as error:  # unpickling damaged bytes raises nearly anything
        reason = (str(error) or type(error).__name__).split("\n", 1)[0]
        raise ValueError(f"shard member {name!r} is refused: {reason}; encode its source again") from error
    if not isinstance(value, Tensor):
        raise ValueError(f"shard member {name!r} holds a {type(value).__name__}, not a tensor; encode its source again")
    return value


def members_of(encoder: dict[str, str]) -> tuple[str, ...]:
    """The extensions of a sample's members, in order, in a dataset that was made with these encoders."""
    return (*MEMBERS, *(IMAGE_MEMBERS if "image_encoder" in encoder else ()))


def first_frame_of(members: dict[str, Any]) -> FirstFrame | None:
    """The first frame among a sample's decoded members, if it has one."""
    embeds, latents = (members.get(kind) for kind in IMAGE_MEMBERS)
    return None if embeds is None or latents is None else FirstFrame(latents, embeds)


def read_members(key: str, raw: bytes) -> dict[str, Any]:
    """The decoded members of a sample, by extension, from its bytes in a shard.

    Raises:
        ValueError: they are not those of this sample.
    """
    members: dict[str, Any] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as tar:
            for member in tar:
                name, _, extension = member.name.partition(".")
                if name != key:
                    raise ValueError(f"found {member.name!r} in place of sample {key!r}; run shard and index again")
                content = tar.extractfile(member)
                assert content is not None, member.name
                members[extension] = decode_member(member.name, content.read())
    except tarfile.TarError as error:
        raise ValueError(f"sample {key!r} is not a tar's: {error}; run shard and index again") from error
    return members


class SafeDecoder(SampleDecoder):
    """Energon's hook for decoding samples; its default would run what a shard's pickles say."""

    def __init__(self) -> None:
        self._config = {"decoder": "wan-tensors-1"}

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        key, decoded = sample.get("__key__", ""), dict(sample)
        for name, value in sample.items():
            if isinstance(value, bytes) and not name.startswith("__"):
                decoded[name] = decode_member(f"{key}.{name}", value)
        return decoded

"""An indexed dataset of tiny random clips of several sizes, made in a second."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from unittest import mock

import torch

from wan_core import records
from wan_core.config import IMAGE_LENGTH, EncodeConfig, IndexConfig, ShardConfig
from wan_core.data import index, shards
from wan_core.data.samples import ClipInfo, Sample, saved, write_sample
from wan_core.first_frame import FirstFrame
from wan_core.output import StageOutput
from wan_core.records import EncodeRecord

TEXT_DIM = 16
SIZES = ((1, 48, 32), (5, 32, 32), (9, 32, 48), (5, 48, 48))  # frames, height, width in pixels


def info(number: int, digest: str, encoder: dict[str, str]) -> ClipInfo:
    frames, height, width = SIZES[number % len(SIZES)]
    return ClipInfo(
        caption=f"clip {number}", digest=digest, start_frame=0, end_frame=None, frames=frames, fps=16.0, height=height,
        width=width, mode="video", center_crop=True, tiled=False, vae_dtype="float32", text_dtype="bfloat16",
        encoder=encoder,
    )  # fmt: skip


def make_dataset(
    folder: Path, num_clips: int, val_share: float = 0.25, text_dim: int = TEXT_DIM, image_dim: int = 0,
    encoder: dict[str, str] | None = None,
) -> Path:  # fmt: skip
    """Encoded parts, shards and index below `folder`; returns what `dataset.path` takes.

    Args:
        image_dim: above 0: with first frames, for image-to-video.
    """
    encoder = encoder or {"vae": "v"}
    part = folder / "encode" / "parts" / "part0"
    part.mkdir(parents=True)
    lines = []
    with tarfile.open(part / "part.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(num_clips):
            generator = torch.Generator().manual_seed(number)
            clip = info(number, records.digest(number), encoder)
            grid = (clip.frames - 1) // 4 + 1, clip.height // 8, clip.width // 8
            latents = torch.randn(16, *grid, generator=generator)
            text = torch.randn(3 + number % 4, text_dim, generator=generator)
            frame = None
            if image_dim:
                embeds = torch.randn(IMAGE_LENGTH, image_dim, generator=generator)
                frame = FirstFrame(torch.randn(16, *grid, generator=generator), embeds)
            write_sample(tar, Sample(f"clip{number:04d}", latents, text, clip, frame))
            lines.append({"key": f"clip{number:04d}", "digest": clip.digest, "part": part.name})
    with tarfile.open(part / "part.tar") as tar:
        members = {member.name: [member.offset_data, member.size] for member in tar}
    (part / "members.json").write_text(json.dumps(members))
    (folder / "encode" / "clips.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "encode" / "empty_text.pt").write_bytes(saved(torch.zeros(1, text_dim)))
    (folder / "encode" / "negative_text.pt").write_bytes(saved(torch.ones(2, text_dim)))
    (folder / "encode" / "quarantine.jsonl").touch()
    encoded = StageOutput("encode", folder / "encode", folder / "encode", EncodeConfig(), "0" * 64).finish(
        EncodeRecord, parts=(part,), num_clips=num_clips, num_quarantined=0, encoder=encoder
    )
    sharded = shards.run(ShardConfig(val_share=val_share, max_samples=9), encoded, folder / "shard")
    with mock.patch.object(index.card, "write"):  # its pictures take most of the time, and tests/data looks at them
        return index.run(IndexConfig(workers=1), sharded, folder / "index").path

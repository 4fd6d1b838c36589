"""encode, one part: clips to a tar of latents and text embeddings, decoded in threads ahead of the encoder."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import starmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan_core import records
from wan_core.config import STORED_TEXTS, VAE_TEMPORAL_STRIDE, EncodeConfig
from wan_core.data.clips import Clip
from wan_core.data.folder import ChangedError, Folder, Location, open_folder
from wan_core.data.samples import ClipInfo, Sample, saved, write_sample
from wan_core.digests import encoder_identity, sees_images
from wan_core.encode.buckets import largest_shapes
from wan_core.encode.decode import ClipError, unread, unreadable
from wan_core.encode.feed import ahead, batched, fetching, one_behind, pinned, singly_if_too_large
from wan_core.encode.image import ImageEncoder, load_image_encoder
from wan_core.encode.text import TextEncoder, fault, load_text_encoder
from wan_core.encode.vae import Shape, Vae, load_vae, shape_of
from wan_core.encode.video import read_clip
from wan_core.first_frame import FirstFrame
from wan_core.output import StageOutput, writing
from wan_core.records import PartRecord

ERROR_FRAMES = 4 * VAE_TEMPORAL_STRIDE + 1  # that a part's error is measured on: the reference is slow


@dataclass(frozen=True)
class Part:
    """Clips that one worker encodes into one tar."""

    name: str
    clips: tuple[Clip, ...]


@dataclass(frozen=True)
class Encoders:
    """What a worker loads once."""

    vae: Vae
    text: TextEncoder
    image: ImageEncoder | None  # an image-to-video model's
    identity: dict[str, str]


def part_of(clips: Sequence[Clip]) -> Part:
    """A part is named by its clips, whatever their order."""
    return Part(records.digest(sorted(clip.key for clip in clips))[:12], tuple(clips))


def halves(part: Part) -> tuple[Part, Part]:
    """To find the clip that a part fails by."""
    middle = len(part.clips) // 2
    return part_of(part.clips[:middle]), part_of(part.clips[middle:])


def load_encoders(config: EncodeConfig, model: Path, device: torch.device | str) -> Encoders:
    """Load a model's encoders onto a device: once per worker process.

    Raises:
        ValueError: `vae_dtype` cannot encode one of the sizes.
    """
    vae = load_vae(model, config.vae_dtype, device)
    for frames, size in largest_shapes(config):
        vae.check_shape((frames, size.height, size.width))
    text = load_text_encoder(model, getattr(torch, config.text_dtype), device)
    image = load_image_encoder(model, device) if sees_images(model) else None
    return Encoders(vae, text, image, encoder_identity(model))


def part_fingerprint(config: EncodeConfig, encoder: dict[str, str], keys: Sequence[str]) -> str:
    return records.fingerprint("encode", config, encoder=encoder, part=sorted(keys))


def encode_part(
    config: EncodeConfig,
    part: Part,
    videos: Location,
    output_dir: Path,
    encoders: Encoders,
    progress: Callable[[int], None] = lambda done: None,
) -> PartRecord:
    """Encode the clips of one part into `output_dir/parts/<name>`, or return the record of a part that is whole.

    Args:
        progress: called after each clip with the number of clips done.
    """
    folder = output_dir / "parts" / part.name
    wanted = part_fingerprint(config, encoders.identity, [clip.key for clip in part.clips])
    if found := _found(folder, wanted):
        return found
    quarantined: list[tuple[Clip, ClipError]] = []
    with writing("encode", folder, config, wanted) as output:
        texts = encoders.text.encode(["", config.negative_prompt])  # before the long work
        for name, text in zip(STORED_TEXTS, texts, strict=True):
            (output.path / name).write_bytes(saved(text))
        made = _PartEncoder(config, open_folder(videos), encoders, part.clips)
        with tarfile.open(output.path / "part.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for done, (clip, sample) in enumerate(made.samples(), start=1):
                if isinstance(sample, ClipError):
                    quarantined.append((clip, sample))
                else:
                    write_sample(tar, sample)
                progress(done)
        return _finish(output, quarantined, len(part.clips) - len(quarantined), made.error)


def quarantine_part(
    config: EncodeConfig, part: Part, output_dir: Path, encoder: dict[str, str], reason: str
) -> PartRecord:
    """A part that holds nothing but why its clips could not be encoded; the next run tries them again."""
    wanted = part_fingerprint(config, encoder, [clip.key for clip in part.clips])
    folder = output_dir / "parts" / part.name
    if found := _found(folder, wanted):
        return found
    with writing("encode", folder, config, wanted) as output:
        tarfile.open(output.path / "part.tar", "w", format=tarfile.USTAR_FORMAT).close()
        return _finish(output, [(clip, ClipError(reason, retry=True)) for clip in part.clips], 0, None)


def _found(folder: Path, wanted: str) -> PartRecord | None:
    """The record of a part that is whole. One that holds nothing but clips to be tried again is taken away."""
    found = records.find_record(PartRecord, folder, wanted)
    if found and not found.num_clips and all(row.get("retry") for row in read_quarantine(folder)):
        shutil.rmtree(folder)
        return None
    return found


def read_quarantine(folder: Path) -> list[dict[str, Any]]:
    """Rows of a part's quarantine.jsonl: key, path, reason, and `retry` where the next run tries the clip again."""
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()]


def quarantine_row(path: str, fault: ClipError) -> dict[str, Any]:
    return {"path": path, "reason": str(fault)} | ({"retry": True} if fault.retry else {})


def _finish(
    output: StageOutput, quarantined: list[tuple[Clip, ClipError]], num_clips: int, error: float | None
) -> PartRecord:
    with tarfile.open(output.path / "part.tar") as tar:
        members = {member.name: [member.offset_data, member.size] for member in tar}
    (output.path / "members.json").write_text(json.dumps(members))
    rows = [{"key": clip.key} | quarantine_row(clip.path, fault) for clip, fault in quarantined]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (output.path / "quarantine.jsonl").write_text(lines, encoding="utf-8")
    return output.finish(PartRecord, num_clips=num_clips, num_quarantined=len(rows), vae_error=error)


type Job = tuple[Clip, Tensor | ClipError]  # uint8 [T, H, W, 3], or why not
type Encoded = tuple[Clip, Sample | ClipError]


class _PartEncoder:
    """Samples of a part's clips; those of one shape share forwards. `error` is known once the first sample is."""

    def __init__(self, config: EncodeConfig, videos: Folder, encoders: Encoders, clips: Sequence[Clip]) -> None:
        self.config, self.videos, self.encoders, self.clips = config, videos, encoders, clips
        self.error: float | None = None
        # On the CPU before the first clip: later, a copy would wait for the clip that the GPU works on.
        self.text = {text: embeds.cpu() for text, embeds in encoders.text.embed([c.caption for c in clips]).items()}

    def samples(self) -> Iterator[Encoded]:
        """Each clip once, in the order in which their batches fill."""
        frames = ahead(partial(_read, self.config, self.videos), self.clips, self.config.decode_threads)
        jobs = starmap(self._checked, zip(self.clips, frames, strict=True))
        batches = batched(jobs, _shape, self.encoders.vae.batch_size)
        for finished in one_behind(partial(singly_if_too_large, self._launch), batches):
            yield from finished

    def _checked(self, clip: Clip, frames: Tensor | ClipError) -> Job:
        reason = fault(self.text[clip.caption])
        return clip, ClipError(f"text embedding is {reason}") if reason and isinstance(frames, Tensor) else frames

    def _launch(self, batch: Sequence[Job]) -> Callable[[], list[Encoded]]:
        clip, frames = batch[0]
        if isinstance(frames, ClipError):
            return partial(_itself, [(clip, frames)])
        videos, shape = [frames for _, frames in batch if isinstance(frames, Tensor)], shape_of(frames)
        video = self.encoders.vae.stacked(videos)
        latents = fetching(self.encoders.vae.encode(video))
        if self.error is None and self.config.vae_dtype != "float32":
            self.error = self.encoders.vae.error(video[:1, :, :ERROR_FRAMES])
        first_frames, clips = [self._first_frame(frames) for frames in videos], [clip for clip, _ in batch]
        return lambda: [
            (clip, self._sample(clip, shape, values, first_frame()))
            for clip, values, first_frame in zip(clips, latents(), first_frames, strict=True)
        ]

    def _first_frame(self, frames: Tensor) -> Callable[[], FirstFrame | None]:
        if self.encoders.image is None:
            return partial(_itself, None)
        latents = fetching(self.encoders.vae.encode_first_frame(frames[0], len(frames)))
        embeds = fetching(self.encoders.image.encode(frames[0].numpy()))
        return lambda: FirstFrame(latents(), embeds())

    def _sample(self, clip: Clip, shape: Shape, values: Tensor, frame: FirstFrame | None) -> Sample | ClipError:
        """From latents [16, t, h, w] of a clip of `shape` [T, H, W]."""
        if not values.isfinite().all():
            return ClipError("latents are not finite")
        if frame and not (frame.latents.isfinite().all() and frame.embeds.isfinite().all()):
            return ClipError("latents or embeddings of the first frame are not finite")
        config = self.config
        info = ClipInfo(
            caption=clip.caption, digest=clip.digest, start_frame=clip.start_frame, end_frame=clip.end_frame,
            frames=shape[0], fps=config.fps, height=shape[1], width=shape[2], mode=config.mode,
            center_crop=config.center_crop, tiled=False, vae_dtype=config.vae_dtype, text_dtype=config.text_dtype,
            encoder=self.encoders.identity,
        )  # fmt: skip
        return Sample(clip.key, values, self.text[clip.caption], info, frame)


def _shape(job: Job) -> Shape | None:
    """Jobs of one shape share forwards; None is of a clip that cannot be used."""
    return None if isinstance(job[1], ClipError) else shape_of(job[1])


def _itself(value: Any) -> Any:
    return value


def _read(config: EncodeConfig, videos: Folder, clip: Clip) -> Tensor | ClipError:
    """uint8 [T, H, W, 3], or why not."""
    try:
        with videos.local(clip.path, clip.digest) as path:
            try:
                return pinned(read_clip(path, clip, config))
            except ClipError as error:
                # FFmpeg and PIL report a disk that fails, or a file that is locked away, as they do a damaged one.
                return (unreadable(path) if isinstance(error.__cause__, OSError) else None) or error
            except OSError as error:
                return unread(error)
    except (FileNotFoundError, PermissionError, ChangedError) as error:  # lost connections are the part's to retry
        return unread(error)

"""encode: a folder of captioned clips to parts of latents and text embeddings.

    <output_dir>/parts/<name>/part.tar           samples (data/samples.py)
                              members.json       member -> [offset, bytes] in part.tar
                              quarantine.jsonl   clips that could not be encoded
                              empty_text.pt      embedding of the empty caption
                              record.json
                 clips.jsonl                     the clips of this dataset, and in which part each lies
                 quarantine.jsonl                what is not in the dataset, and why
                 empty_text.pt
                 record.json                     EncodeRecord, written last

The folder is named by the settings alone (`settings_fingerprint`) and outlives changes of the clips: parts are
immutable, a clip that lies in one is never encoded again, and the record says which clips make up the dataset.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wan_core import records
from wan_core.config import EncodeConfig, check
from wan_core.data.clips import Clip, Quarantined, scan
from wan_core.data.folder import ChangedError, Folder, Location, open_folder
from wan_core.data.samples import ClipInfo, Sample, saved, write_sample
from wan_core.digests import encoder_identity
from wan_core.encode.decode import ClipError
from wan_core.encode.ranges import cut
from wan_core.encode.text import TextEncoder, load_text_encoder
from wan_core.encode.vae import Vae, load_vae
from wan_core.encode.video import read_clip
from wan_core.records import EncodeRecord, PartRecord


@dataclass(frozen=True)
class Part:
    """Clips that one worker encodes into one tar."""

    name: str
    clips: tuple[Clip, ...]


@dataclass(frozen=True)
class Dataset:
    """The clips of a folder, before any of them is encoded."""

    fingerprint: str  # of settings, encoders and clips
    encoder: dict[str, str]
    clips: tuple[Clip, ...]
    quarantined: tuple[Quarantined, ...]


@dataclass(frozen=True)
class EncodePlan:
    """What is to be done, and what is there already."""

    dataset: Dataset
    parts: tuple[Part, ...]  # still to be encoded
    num_encoded: int  # clips that lie in parts already, quarantined ones included


@dataclass(frozen=True)
class Encoders:
    """What a worker loads once."""

    vae: Vae
    text: TextEncoder
    identity: dict[str, str]


def settings_fingerprint(config: EncodeConfig, model: Path) -> str:
    """Names the stage's folder: settings and encoders, but not the clips."""
    return records.fingerprint("encode", config, encoder=encoder_identity(model))


def look(config: EncodeConfig, videos: Location, model: Path) -> Dataset:
    """Find the clips of a folder or URL.

    Raises:
        ValueError: there is no clip, or the model folder lacks an encoder.
    """
    encoder = encoder_identity(model)
    scanned = cut(config, open_folder(videos), scan(videos, config.mode))
    keys = sorted(clip.key for clip in scanned.clips)
    wanted = records.fingerprint("encode", config, encoder=encoder, clips=keys)
    return Dataset(wanted, encoder, scanned.clips, scanned.quarantined)


def plan(config: EncodeConfig, dataset: Dataset, output_dir: Path) -> EncodePlan:
    """Look at the parts that exist, and group the clips that are missing into new parts."""
    known = {key for part in _whole_parts(config, dataset.encoder, output_dir) for key in part.keys}
    missing = [clip for clip in dataset.clips if clip.key not in known]
    size = config.clips_per_part
    groups = [tuple(missing[i : i + size]) for i in range(0, len(missing), size)]
    parts = tuple(Part(records.digest(sorted(clip.key for clip in group))[:12], group) for group in groups)
    return EncodePlan(dataset, parts, num_encoded=len(dataset.clips) - len(missing))


def load_encoders(config: EncodeConfig, model: Path, device: torch.device | str) -> Encoders:
    """Load both encoders onto a device: once per worker process."""
    vae = load_vae(model, config.vae_dtype, device)
    text = load_text_encoder(model, getattr(torch, config.text_dtype), device)
    return Encoders(vae, text, encoder_identity(model))


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
    wanted = _part_fingerprint(config, encoders.identity, [clip.key for clip in part.clips])
    if found := records.find_record(PartRecord, folder, wanted):
        return found
    folder_of_clips = open_folder(videos)
    quarantined: list[dict[str, Any]] = []
    with records.writing("encode", folder, config, wanted) as output:
        with tarfile.open(output.path / "part.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            pixels = _ahead(lambda clip: _read(config, folder_of_clips, clip), part.clips)
            for done, (clip, frames) in enumerate(zip(part.clips, pixels, strict=True), start=1):
                try:
                    write_sample(tar, _encode_clip(config, clip, frames, encoders))
                except ClipError as error:
                    quarantined.append({"key": clip.key, "path": clip.path, "reason": str(error)})
                progress(done)
        with tarfile.open(output.path / "part.tar") as tar:
            members = {member.name: [member.offset_data, member.size] for member in tar}
        (output.path / "members.json").write_text(json.dumps(members))
        _write_lines(output.path / "quarantine.jsonl", quarantined)
        (output.path / "empty_text.pt").write_bytes(saved(encoders.text.encode([""])[0]))
        return output.finish(PartRecord, num_clips=len(part.clips) - len(quarantined), num_quarantined=len(quarantined))


def finish(config: EncodeConfig, plan: EncodePlan, output_dir: Path) -> EncodeRecord:
    """Gather the parts, once all of `plan.parts` are encoded, into the dataset's record.

    Raises:
        ValueError: more than `max_quarantine_share` of the clips is quarantined, or none is left.
    """
    started = time.monotonic()
    dataset = plan.dataset
    parts = _whole_parts(config, dataset.encoder, output_dir)
    encoded = {key: part.record.path.name for part in parts for key in part.encoded}
    reasons = {key: reason for part in parts for key, reason in part.quarantined.items()}
    bad = [{"path": row.path, "reason": row.reason} for row in dataset.quarantined]
    for clip in dataset.clips:
        if clip.key in encoded:
            continue
        if clip.key not in reasons:
            raise ValueError(f"clip {clip.path} lies in no part of {output_dir}; run encode_part for each planned part")
        bad.append({"path": clip.path, "reason": reasons[clip.key]})
    (output_dir / records.RECORD_NAME).unlink(missing_ok=True)  # from here on the old dataset is not whole
    _write_lines(output_dir / "quarantine.jsonl", bad)
    kept = [clip for clip in dataset.clips if clip.key in encoded]
    _check_quarantine(config, len(kept), bad, output_dir)
    rows = (
        {"key": clip.key, "path": clip.path, "digest": clip.digest, "caption": clip.caption, "part": encoded[clip.key]}
        for clip in kept
    )
    _write_lines(output_dir / "clips.jsonl", rows)
    used = sorted({encoded[clip.key] for clip in kept})
    shutil.copyfile(output_dir / "parts" / used[0] / "empty_text.pt", output_dir / "empty_text.pt")
    output = records.StageOutput("encode", output_dir, output_dir, config, dataset.fingerprint)
    record = output.finish(
        EncodeRecord, parts=tuple(output_dir / "parts" / name for name in used), num_clips=len(kept),
        num_quarantined=len(bad), encoder=dataset.encoder,
    )  # fmt: skip
    seconds = time.monotonic() - started + sum(part.record.seconds for part in parts)
    unused = tuple(f"parts/{part.record.path.name}/" for part in parts if part.record.path.name not in used)
    files = {name: size for name, size in record.files.items() if not (unused and name.startswith(unused))}
    record = replace(record, files=files, seconds=round(seconds, 3))
    records.save_record(record, output_dir)
    return record


def run(
    config: EncodeConfig, videos: Location, model: Path, output_dir: Path, device: torch.device | str = "cpu"
) -> EncodeRecord:
    """The whole stage in this process; clips that existing parts hold are not encoded again."""
    from tqdm import tqdm

    dataset = look(config, videos, model)
    if found := records.find_record(EncodeRecord, output_dir, dataset.fingerprint):
        return found
    with _alone(output_dir):
        planned = plan(config, dataset, output_dir)
        with tqdm(total=len(dataset.clips), initial=planned.num_encoded, desc="encode", unit="clip") as bar:
            encoders = load_encoders(config, model, device) if planned.parts else None
            for part in planned.parts:
                assert encoders is not None
                encode_part(config, part, videos, output_dir, encoders, progress=lambda done: bar.update())
        return finish(config, planned, output_dir)


@contextlib.contextmanager
def _alone(output_dir: Path) -> Iterator[None]:
    """Keep other runs away from a folder."""
    check(not output_dir.is_file(), f"output_dir={output_dir} is a file; give a folder")
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            sentence = f"output_dir={output_dir}: another run is writing to it; wait for it to end, or give another"
            raise ValueError(sentence) from error
        yield


def _read(config: EncodeConfig, videos: Folder, clip: Clip) -> np.ndarray | ClipError:
    try:
        with videos.local(clip.path, clip.digest) as path:
            return read_clip(path, clip, config)
    except ClipError as error:
        return error  # raised again where the clip's turn comes
    except (FileNotFoundError, PermissionError, ChangedError) as error:
        return ClipError(f"cannot be read: {error.strerror or error}")


def _ahead(function: Callable[[Clip], Any], clips: Sequence[Clip]) -> Iterator[Any]:
    """`map` with one result computed ahead in a thread: decoding overlaps encoding, and two clips are in memory."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = [pool.submit(function, clip) for clip in clips[:1]]
        for i in range(len(clips)):
            result = waiting.pop().result()
            waiting = [pool.submit(function, clip) for clip in clips[i + 1 : i + 2]]
            yield result


def _encode_clip(config: EncodeConfig, clip: Clip, frames: np.ndarray | ClipError, encoders: Encoders) -> Sample:
    """One clip per forward: in a batch the last bits would depend on its neighbours, and so on how parts are cut."""
    if isinstance(frames, ClipError):
        raise frames
    text_embeds = encoders.text.encode([clip.caption])[0]
    latents = encoders.vae.encode(to_video(frames))[0]  # [16, T, H, W]
    if not latents.isfinite().all():
        raise ClipError("latents are not finite")
    num_frames, height, width = frames.shape[:3]
    info = ClipInfo(
        caption=clip.caption, digest=clip.digest, start_frame=clip.start_frame, end_frame=clip.end_frame,
        frames=num_frames, fps=config.fps, height=height, width=width, mode=config.mode,
        center_crop=config.center_crop, tiled=False, vae_dtype=config.vae_dtype, text_dtype=config.text_dtype,
        encoder=encoders.identity,
    )  # fmt: skip
    return Sample(clip.key, latents, text_embeds, info)


def to_video(frames: np.ndarray) -> Tensor:
    """uint8 [T, H, W, 3] to float32 [1, 3, T, H, W] in [-1, 1]."""
    return torch.tensor(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


@dataclass(frozen=True)
class _WholePart:
    record: PartRecord
    encoded: frozenset[str]  # keys
    quarantined: dict[str, str]  # key -> reason

    @property
    def keys(self) -> list[str]:
        return [*self.encoded, *self.quarantined]


def _whole_parts(config: EncodeConfig, encoder: dict[str, str], output_dir: Path) -> list[_WholePart]:
    """The parts below a folder that were made with these settings and are unaltered."""
    parts = []
    for folder in sorted((output_dir / "parts").glob("[!.]*")):
        record = records.find_record(PartRecord, folder, None)
        if record is None:
            continue
        rows = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()]
        members = json.loads((folder / "members.json").read_text())
        encoded = frozenset(name.partition(".")[0] for name in members)
        quarantined = {row["key"]: row["reason"] for row in rows}
        if record.fingerprint == _part_fingerprint(config, encoder, [*encoded, *quarantined]):
            parts.append(_WholePart(record, encoded, quarantined))
    return parts


def _part_fingerprint(config: EncodeConfig, encoder: dict[str, str], keys: Sequence[str]) -> str:
    return records.fingerprint("encode", config, encoder=encoder, part=sorted(keys))


def _check_quarantine(config: EncodeConfig, num_clips: int, bad: list[dict[str, Any]], output_dir: Path) -> None:
    share = len(bad) / (num_clips + len(bad))
    if num_clips and share <= config.max_quarantine_share:
        return
    common = Counter(row["reason"].partition(":")[0] for row in bad).most_common(3)
    top = "; ".join(f"{count} x {reason}" for reason, count in common)
    raise ValueError(
        f"{len(bad)} of {num_clips + len(bad)} clips are quarantined ({top}), more than "
        f"max_quarantine_share={config.max_quarantine_share}; {output_dir / 'quarantine.jsonl'} lists them: "
        "repair them, or raise max_quarantine_share"
    )


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Replace a .jsonl file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)

"""encode through Prefect and a real local Ray, with one worker killed on the way."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from prefect import flow

from flows import stages
from tasks.encode import encode, encode_part
from tasks.stage import Workspace
from tasks.workers import EncodePool, EncodeWorker, WorkersLostError, check_some_node_suffices, ray_session
from tests.data.test_shards import make_encoded
from tests.processes import living
from wan_core.config import EncodeConfig, IndexConfig, RayConfig, ShardConfig, Size
from wan_core.data import shards
from wan_core.digests import encoder_identity
from wan_core.encode.part import Part
from wan_core.encode.video import write_video
from wan_core.records import EncodeRecord, IndexRecord, PartRecord, find_record, load_record

MARK = "ENCODE_TEST_MARK"
CONFIG = EncodeConfig(
    sizes=(Size(32, 32),), max_frames=9, vae_dtype="float32", text_dtype="float32", clips_per_part=2,
    max_quarantine_share=0.3,
)  # fmt: skip


def make_clips(folder: Path, names: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        frames = np.random.default_rng(i).integers(0, 255, (9, 32, 32, 3), dtype=np.uint8)
        write_video(folder / f"{name}.mp4", frames, 16)
        (folder / f"{name}.txt").write_text(f"clip {name}")
    return folder


@flow
def encoded(root: Path, videos: Path, model: Path) -> Workspace:
    run = Workspace(root, "t")
    encode(run, CONFIG, RayConfig(), videos, model)
    return run


def kill_first_worker(mark: str, killed: list[int]) -> None:
    while not killed:
        for pid in living(f"{MARK}={mark}", b"ray::EncodeWorker")[:1]:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_api")
def test_a_killed_worker_is_a_retry_and_a_second_run_needs_no_ray(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = make_clips(tmp_path / "videos", ["0", "1", "2", "3"])
    monkeypatch.setenv(MARK, tmp_path.name)
    killed: list[int] = []
    threading.Thread(target=kill_first_worker, args=(tmp_path.name, killed), daemon=True).start()
    outcome = encoded(tmp_path / "work", videos, tiny_model).outcomes[0]
    assert killed and not outcome.reused
    assert isinstance(outcome.record, EncodeRecord)
    assert outcome.record.num_clips == 4 and len(outcome.record.parts) == 2

    monkeypatch.setattr("tasks.encode.ray_session", None)  # were Ray needed, calling None would fail
    assert encoded(tmp_path / "work", videos, tiny_model).outcomes[0].reused


def poisoned(record: EncodeRecord) -> dict[str, str]:
    rows = [json.loads(line) for line in (record.path / "quarantine.jsonl").read_text().splitlines()]
    return {row["path"]: row["reason"] for row in rows}


def without_memory_for(name: str) -> type:
    """A worker that has no memory for one clip."""

    class Worker(EncodeWorker):
        def encode(self, part: Part, videos: Path, output_dir: Path) -> PartRecord:
            import torch

            if any(name in str(clip.path) for clip in part.clips):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 90.00 GiB")
            return super().encode(part, videos, output_dir)

    return Worker


def killed_by(name: str) -> type:
    """A worker that is killed when it has encoded the clips before this one, as Ray's memory monitor would."""

    class Worker(EncodeWorker):
        def encode(self, part: Part, videos: Path, output_dir: Path) -> PartRecord:
            self.clips = part.clips
            if name in str(part.clips[0].path):
                os.kill(os.getpid(), signal.SIGKILL)
            return super().encode(part, videos, output_dir)

        def _count(self, done: int) -> None:
            if done < len(self.clips) and name in str(self.clips[done].path):
                os.kill(os.getpid(), signal.SIGKILL)
            super()._count(done)

    return Worker


@pytest.mark.usefixtures("prefect_api")
@pytest.mark.parametrize(
    ("worker", "reason"),
    [
        (without_memory_for, "failed twice with OutOfMemoryError: CUDA out of memory"),
        pytest.param(killed_by, "failed twice with Actor", marks=pytest.mark.slow),
    ],
)
def test_the_clip_that_breaks_its_part_is_quarantined_and_the_rest_completes(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, worker: Callable[[str], type], reason: str
) -> None:
    videos = make_clips(tmp_path / "videos", ["a", "b", "poison", "z"])
    monkeypatch.setattr("tasks.workers.EncodeWorker", worker("poison"))
    monkeypatch.setattr(encode_part, "retry_delay_seconds", [0.0, 0.0, 0.0])
    record = encoded(tmp_path / "work", videos, tiny_model).outcomes[0].record
    assert isinstance(record, EncodeRecord) and (record.num_clips, record.num_quarantined) == (3, 1)
    found = poisoned(record)
    assert found.keys() == {"poison.mp4"} and reason in found["poison.mp4"]
    members = [name for part in record.parts for name in json.loads((part / "members.json").read_text())]
    assert len(members) == 3 * 3  # .json, .pickle and .pth of each
    assert not list((record.path / "parts").glob(".*"))

    monkeypatch.setattr("tasks.workers.EncodeWorker", EncodeWorker)  # a larger machine
    again = encoded(tmp_path / "work", videos, tiny_model).outcomes[0]
    assert not again.reused and isinstance(again.record, EncodeRecord)
    assert (again.record.num_clips, again.record.num_quarantined) == (4, 0)
    assert set(record.parts) < set(again.record.parts) and record.fingerprint != again.record.fingerprint
    assert encoded(tmp_path / "work", videos, tiny_model).outcomes[0].reused


def test_workers_that_no_node_can_hold_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.workers.NODE_SECONDS", 0.1)
    with ray_session(RayConfig()):
        check_some_node_suffices(RayConfig(actors=50))
        for asked, words in (
            (RayConfig(gpus_per_actor=1000.0), "ray.gpus_per_actor=1000 and .* any node of this machine has .*lower"),
            (RayConfig("ray://head:10001", cpus_per_actor=1e6), "ray.cpus_per_actor=1e.06 .* any node of ray://head"),
        ):
            with pytest.raises(ValueError, match=words):
                EncodePool(CONFIG, asked, tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_api")
def test_workers_that_cannot_load_their_encoders_fail_the_stage(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Worker(EncodeWorker):
        def __init__(self, *settings: object) -> None:
            raise RuntimeError("no such device")

    monkeypatch.setattr("tasks.workers.EncodeWorker", Worker)
    with pytest.raises(WorkersLostError, match="no such device"):
        encoded(tmp_path / "work", make_clips(tmp_path / "videos", ["a", "b", "c"]), tiny_model)


@pytest.mark.usefixtures("prefect_api")
def test_index_takes_a_model_for_the_cards_pictures(tmp_path: Path, tiny_model: Path) -> None:
    """A second run of the flow adds them; the dataset stays what it was."""
    encoded = replace(make_encoded(tmp_path / "encode", 12), encoder=encoder_identity(tiny_model))
    sharded, found = shards.run(ShardConfig(val_share=0), encoded, tmp_path / "shard"), []
    for model in (None, tiny_model, tiny_model, None):
        (outcome,) = stages.index(IndexConfig(), "t", tmp_path / "work", sharded=sharded.path, model=model)
        found.append((outcome.reused, (outcome.record.path / "contact_sheet.png").is_file()))
    assert found == [(False, False), (True, True), (True, True), (True, True)]
    record = load_record(IndexRecord, outcome.record.path)
    assert "contact_sheet.png" in record.files and find_record(IndexRecord, record.path, outcome.record.fingerprint)

"""encode through Prefect and a real local Ray, with one worker killed on the way."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from prefect import flow

from tasks.encode import encode
from tasks.stage import Workspace
from wan_core.config import EncodeConfig, RayConfig, Size
from wan_core.encode.video import write_video
from wan_core.records import EncodeRecord

MARK = "ENCODE_TEST_MARK"
CONFIG = EncodeConfig(
    sizes=(Size(32, 32),), max_frames=9, vae_dtype="float32", text_dtype="float32", clips_per_part=2
)  # fmt: skip


@flow
def encoded(root: Path, videos: Path, model: Path) -> Workspace:
    run = Workspace(root, "t")
    encode(run, CONFIG, RayConfig(), videos, model)
    return run


def workers(mark: str) -> list[int]:
    """Ray's encode workers that inherited the mark from this process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            ours = f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0")
            if ours and b"ray::EncodeWorker" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def kill_first_worker(mark: str, killed: list[int]) -> None:
    while not killed:
        for pid in workers(mark)[:1]:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_api")
def test_a_killed_worker_is_a_retry_and_a_second_run_needs_no_ray(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for i in range(4):
        frames = np.random.default_rng(i).integers(0, 255, (9, 32, 32, 3), dtype=np.uint8)
        write_video(videos / f"{i}.mp4", frames, 16)
        (videos / f"{i}.txt").write_text(f"clip {i}")
    monkeypatch.setenv(MARK, tmp_path.name)
    killed: list[int] = []
    threading.Thread(target=kill_first_worker, args=(tmp_path.name, killed), daemon=True).start()
    outcome = encoded(tmp_path / "work", videos, tiny_model).outcomes[0]
    assert killed and not outcome.reused
    assert isinstance(outcome.record, EncodeRecord)
    assert outcome.record.num_clips == 4 and len(outcome.record.parts) == 2

    monkeypatch.setattr("tasks.encode.ray_session", None)  # were Ray needed, calling None would fail
    assert encoded(tmp_path / "work", videos, tiny_model).outcomes[0].reused

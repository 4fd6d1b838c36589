"""Three nights: the first trains, the second finds nothing new, the third goes on from what is in use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from prefect.states import State

from flows.nightly_finetune import nightly_finetune
from tasks.promoted import Promoted, load_promoted
from tests.flows.test_deployments import CONFIG, FRAMES, SIDE
from wan_core.encode.video import write_video

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_api")]


def add_clips(folder: Path, numbers: range) -> None:
    folder.mkdir(exist_ok=True)
    for i in numbers:
        frames = np.random.default_rng(i).integers(0, 255, (FRAMES, SIDE, SIDE, 3), dtype=np.uint8)
        write_video(folder / f"{i}.mp4", frames, 16)
        (folder / f"{i}.txt").write_text("a red circle moving left")


def night(folder: Path, model: Path) -> tuple[str, Promoted]:
    """The state in which a night ended, and what is in use afterwards."""
    state: State = nightly_finetune(
        config=CONFIG, videos=str(folder / "videos"), model=model, workspace=folder / "work", return_state=True
    )
    promoted = load_promoted(folder / "work", "t")
    assert promoted is not None, state
    return state.name or "", promoted


def test_three_nights(tiny_model: Path, tmp_path: Path) -> None:
    add_clips(tmp_path / "videos", range(6))
    name, first = night(tmp_path, tiny_model)
    assert name in ("Promoted", "NotPromoted")
    assert (first.model == tiny_model) == (name == "NotPromoted")

    runs = sorted((tmp_path / "work" / "runs").iterdir())
    assert night(tmp_path, tiny_model) == ("Skipped", first)
    assert sorted((tmp_path / "work" / "runs").iterdir()) == runs

    add_clips(tmp_path / "videos", range(6, 8))
    name, third = night(tmp_path, tiny_model)
    assert name in ("Promoted", "NotPromoted") and third.dataset != first.dataset
    if name == "NotPromoted":
        assert third.model == first.model and third.changed == first.changed
    else:
        assert third.model != first.model

"""Nights whose stages are real; only the losses that decide are given, because both outcomes are to be seen."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prefect.states import State

import tasks.sample
from flows.nightly_finetune import nightly_finetune
from tasks.promoted import Promoted, decide, load_promoted, pointer, save_promoted
from tests.flows.test_deployments import CONFIG, FRAMES, SIDE
from wan_core.encode.video import write_video
from wan_core.records import IndexRecord, SampleRecord
from wan_core.training_run import IDENTITY_NAME, model_identity
from wan_core.validate import Validation

START, CANDIDATE = Path("/start"), Path("/candidate")


def add_clips(folder: Path, numbers: range) -> None:
    folder.mkdir(exist_ok=True)
    for i in numbers:
        frames = np.random.default_rng(i).integers(0, 255, (FRAMES, SIDE, SIDE, 3), dtype=np.uint8)
        write_video(folder / f"{i}.mp4", frames, 16)
        (folder / f"{i}.txt").write_text("a red circle moving left")


class Nights:
    """Nights in one workspace, the models that they compared, and how often they sampled."""

    def __init__(self, folder: Path, model: Path, losses: Iterator[float], patch: pytest.MonkeyPatch) -> None:
        self.folder, self.model, self.losses = folder, model, losses
        self.compared: list[Path] = []
        self.samplings = 0
        patch.setattr("flows.nightly_finetune.validate", self.validate)
        patch.setattr("flows.nightly_finetune.sample", self.sample)

    def validate(self, model: Path, dataset: IndexRecord) -> Validation:
        self.compared.append(model)
        loss = next(self.losses)
        return Validation(loss, (loss,), (0.5,), num_clips=1)

    def sample(self, *arguments: Any) -> SampleRecord:
        self.samplings += 1
        if self.samplings == 1:
            raise OSError("the disk hiccups")
        return tasks.sample.sample(*arguments)

    def next(self, attempts: int = 1) -> tuple[str, Promoted]:
        """The state in which a night ended, and what is in use afterwards."""
        state: State = nightly_finetune.with_options(retries=attempts - 1)(
            config=CONFIG, videos=str(self.folder / "videos"), model=self.model, workspace=self.folder / "work",
            return_state=True,
        )  # fmt: skip
        promoted = load_promoted(self.folder / "work", "t")
        assert promoted is not None, state
        return state.name or "", promoted

    def started_from(self) -> str:
        """Identity of the model that the newest training started from."""
        newest = max((self.folder / "work" / "runs").glob(f"*/{IDENTITY_NAME}"), key=lambda path: path.stat().st_mtime)
        return str(json.loads(newest.read_text())["model"])


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_api")
def test_three_nights(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one's model is better, and its samples take two attempts; the second finds nothing new; the third goes
    on from the first one's model and does not beat it.
    """
    nights = Nights(tmp_path, tiny_model, iter([0.5, 0.4, 0.4, 0.4]), monkeypatch)
    add_clips(tmp_path / "videos", range(6))
    name, first = nights.next(attempts=2)
    assert (name, nights.samplings) == ("Promoted", 2)
    assert nights.compared == [tiny_model, first.model] and first.loss == 0.4
    assert nights.started_from() == model_identity(tiny_model, "finetune")
    assert len(list((tmp_path / "work" / "sample").glob("t-*/record.json"))) == 1

    assert nights.next() == ("Skipped", first)
    assert len(nights.compared) == 2 and nights.samplings == 2

    add_clips(tmp_path / "videos", range(6, 8))
    name, third = nights.next()
    assert name == "NotPromoted" and nights.compared[2:] == [first.model, third.candidate]
    assert nights.started_from() == model_identity(first.model, "finetune")
    assert (third.model, third.changed) == (first.model, first.changed)
    assert third.dataset != first.dataset and third.candidate != third.model


@pytest.mark.parametrize(
    ("before", "after", "better"),
    [(0.5, 0.4, True), (0.5, 0.5, False), (0.4, 0.5, False), (0.4, math.nan, False), (math.nan, 0.4, False)],
)
def test_only_a_lower_loss_moves_the_pointer(before: float, after: float, better: bool) -> None:
    good = Promoted(START, "yesterday's", 0.45, "2026-01-01T00:00:00Z")
    decided = decide(good, "today's", "run", (START, before), (CANDIDATE, after))
    assert decided.better == better and decided.model == (CANDIDATE if better else START)
    np.testing.assert_equal(decided.loss, after if better else before)
    assert (decided.changed != good.changed) == better and decided.dataset == "today's"


def test_a_pointer_moves_with_its_workspace(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    (old / "convert" / "t-1").mkdir(parents=True)
    save_promoted(old, "t", decide(None, "d", "run", (START, 0.5), (old / "convert" / "t-1", 0.4)))
    shutil.move(old, new)
    found = load_promoted(new, "t")
    assert found is not None and found.better and found.model == new / "convert" / "t-1"


def test_a_pointer_of_before_names_its_model_by_an_absolute_path(tmp_path: Path) -> None:
    model = tmp_path / "elsewhere"
    model.mkdir()
    path = pointer(tmp_path / "work", "t")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"model": str(model), "dataset": "d", "loss": 0.5, "changed": "2026-01-01T00:00:00Z"}))
    found = load_promoted(tmp_path / "work", "t")
    assert found is not None and (found.model, found.flow_run) == (model, "")
    shutil.rmtree(model)
    with pytest.raises(ValueError, match="which is gone; restore it, or delete the pointer"):
        load_promoted(tmp_path / "work", "t")

"""What a run has beside its steps is the same in every layout as on one rank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.parallel.compare import module_errors
from tests.parallel.features import RESUMED, RUNS
from wan_core.convert.checkpoint import EMA, iteration_dir, read_tensors, tensor_names
from wan_core.training_run import read_lines

pytestmark = pytest.mark.slow
SPREAD = [run for run in RUNS if run[0] != "unclipped" and run[1] not in ("one", *RESUMED)]


def folder(runs: Path, features: str, layout: str) -> Path:
    return runs / "features" / f"{features}-{layout}"


def numbers(run: Path) -> list[tuple[float, ...]]:
    """What each step's line says, but for the time it took."""
    names = ("loss", "grad_norm", "learning_rate", "consumed_samples")
    return [tuple(line[name] for name in names) for line in read_lines(run / "metrics.jsonl")]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Weights, and their averages if there are any."""
    path = iteration_dir(run / "checkpoints", 4)
    names = [name for name in tensor_names(path) if name.startswith(EMA) or not name.startswith("optimizer.")]
    return read_tensors(path, names)


@pytest.mark.parametrize(("features", "layout"), SPREAD)
def test_steps_and_samples_are_those_of_one_rank(runs: Path, features: str, layout: str) -> None:
    found, expected = (numbers(folder(runs, features, name)) for name in (layout, "one"))
    assert len(expected) == 4
    for mine, other in zip(found, expected, strict=True):
        assert mine == pytest.approx(other, rel=1e-5)
    if features == "adapted":
        assert [consumed for *_, consumed in found] == [6, 12, 18, 24]


@pytest.mark.parametrize("layout", [layout for features, layout in SPREAD if features == "full"])
def test_averages_validation_and_samples_are_those_of_one_rank(runs: Path, layout: str) -> None:
    run, one = folder(runs, "full", layout), folder(runs, "full", "one")
    found, expected = tensors(run), tensors(one)
    assert sum(name.startswith(EMA) for name in found) * 2 == len(found) > 40
    assert max(error for error, _ in module_errors(found, expected).values()) <= 1e-4
    lines, others = (list(read_lines(path / "validation.jsonl")) for path in (run, one))
    assert [line["iteration"] for line in lines] == [2, 4] and lines[0]["loss"] != lines[1]["loss"]
    for line, other in zip(lines, others, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert line["losses"] == pytest.approx(other["losses"], rel=1e-5)
    for number in range(3):
        frames, same = (video(path / "samples" / "iter_0000004" / f"{number:03d}.gif") for path in (run, one))
        assert frames.shape == (5, 32, 48, 3) and frames.std() > 5
        assert np.abs(frames - same).mean() < 1  # of 255, and GIF's palette may put two shades together


@pytest.mark.parametrize("layout", [layout for features, layout in SPREAD if features == "adapted"])
def test_adapters_are_those_of_one_rank(runs: Path, layout: str) -> None:
    found, expected = (tensors(folder(runs, "adapted", name)) for name in (layout, "one"))
    assert len(found) == 42 and all(".adapter." in name for name in found)
    # B starts at zero, so Adam's first steps make much of gradients that are almost nothing but rounding.
    assert max(error for error, _ in module_errors(found, expected).values()) <= 5e-3


def test_steps_of_so_many_tokens_have_no_more(runs: Path) -> None:
    before = 0.0
    for line in read_lines(folder(runs, "counted", "dp2") / "metrics.jsonl"):
        assert 0 < line["consumed_samples"] - before <= 50 / 4  # of 4 tokens at least
        before = line["consumed_samples"]


@pytest.mark.parametrize("layout", RESUMED)
def test_steps_that_count_tokens_go_on_over_other_ranks(runs: Path, layout: str) -> None:
    found, expected = (numbers(folder(runs, "counted", name)) for name in (layout, "one"))
    assert len(found) == 2
    for (*mine, _), (*other, _) in zip(found, expected[2:], strict=True):  # samples are counted from the first line on
        assert mine == pytest.approx(other, rel=1e-5)


def test_fsdp_without_clipping_trains_the_same(runs: Path) -> None:
    """Bridge asks it for no gradient norm then; the one that is logged, and judged, is measured all the same."""
    run, one = folder(runs, "unclipped", "fsdp"), folder(runs, "unclipped", "one")
    lines, others = (list(read_lines(path / "metrics.jsonl")) for path in (run, one))
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in others], rel=1e-5)
    assert lines[-1]["skipped_steps"] == 0 and len(lines) == 4
    assert [line["grad_norm"] for line in lines] == pytest.approx([line["grad_norm"] for line in others], rel=1e-5)
    assert max(error for error, _ in module_errors(tensors(run), tensors(one)).values()) <= 1e-4


def video(path: Path) -> np.ndarray:
    with Image.open(path) as animation:
        frames = []
        for index in range(animation.n_frames):
            animation.seek(index)
            frames.append(np.asarray(animation.convert("RGB"), dtype=np.float32))
    return np.stack(frames)

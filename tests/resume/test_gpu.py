"""The same kills on a GPU, with NCCL, bf16, Transformer Engine, and saves in the background."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.resume.test_resume import codes, log, losses, run, saved, taken
from wan_core import checkpoints
from wan_core.training_run import read_lines

pytestmark = pytest.mark.gpu


def test_a_killed_run_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    """Within the noise of bf16: kernels that add in any order are used."""
    run(tmp_path, "whole", "killed", "async", "async-stopped", "poisoned")
    whole = tmp_path / "whole"
    assert codes(whole) == [[0]], log(whole, 0)[-3000:]
    expected = {name: tensor for name, tensor in saved(whole, 9).items() if tensor.is_floating_point()}
    for name, attempts in (("killed", 5), ("async", 3)):
        folder = tmp_path / name
        assert codes(folder) == [[-9]] * (attempts - 1) + [[0]], log(folder, attempts - 1)[-3000:]
        assert taken(folder) == taken(whole)
        assert {i: loss for i, (loss, *_) in losses(folder).items()} == pytest.approx(
            {i: loss for i, (loss, *_) in losses(whole).items()}, rel=1e-3
        )
        found = saved(folder, 9)
        for key, tensor in expected.items():
            error = (found[key].float() - tensor.float()).norm() / tensor.float().norm().clamp(min=1e-8)
            assert error < 0.02, key
        assert checkpoints.whole_iterations(folder / "run" / "checkpoints") == [3, 6, 9]
    stopped = tmp_path / "async-stopped"  # in its first save, for which a process is just being started
    assert codes(stopped) == [[75], [0]], log(stopped, 0)[-3000:]
    assert re.search(r"interrupted, saved at iteration [3-8]; the same command", log(stopped, 0))
    assert taken(stopped) == taken(whole)
    assert {3, 6, 9} <= set(checkpoints.whole_iterations(stopped / "run" / "checkpoints"))
    poisoned = tmp_path / "poisoned"
    assert codes(poisoned) == [[0]], log(poisoned, 0)[-3000:]
    assert [line["action"] for line in read_lines(poisoned / "run" / "bad_steps.jsonl")] == ["skip", "skip", "rollback"]
    assert all(torch.isfinite(t.float()).all() for t in saved(poisoned, 9).values())

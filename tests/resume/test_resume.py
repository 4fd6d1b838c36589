"""Trainings that are really killed: what they leave behind equals what an unbroken one leaves, to the bit."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import load as load_checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from wan_core import checkpoints
from wan_core.training_run import read_lines

ROOT = Path(__file__).parents[2]


def run(out: Path, *names: str) -> Path:
    """Train these scenarios; all of them share one process that imports Megatron."""
    command = [sys.executable, "-m", "tests.resume.trainer", str(out), *names]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = ("killed", "sharded", "ranks", "full", "worker", "stopped", "whole", "poisoned")  # the longest first
    return run(tmp_path_factory.mktemp("resume"), *names)


def codes(folder: Path) -> list[list[int]]:
    return json.loads((folder / "codes.json").read_text())


def log(folder: Path, attempt: int) -> str:
    return (folder / f"log{attempt}.txt").read_text()


def saved(folder: Path, iteration: int) -> dict[str, Tensor]:
    """Every tensor of a checkpoint: weights, optimizer moments and step counts, random states are apart."""
    path = checkpoints.folder_of(folder / "run" / "checkpoints", iteration)
    entries = FileSystemReader(path).read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load_checkpoint(tensors, storage_reader=FileSystemReader(path), no_dist=True)
    return tensors


def losses(folder: Path) -> dict[int, tuple[float, float, float]]:
    lines = read_lines(folder / "run" / "metrics.jsonl")
    return {line["iteration"]: (line["loss"], line["grad_norm"], line["learning_rate"]) for line in lines}


def taken(folder: Path) -> dict[int, list[Any]]:
    """Per step the packs that trained it: those of the last attempt that took it, whichever rank did."""
    found: dict[int, dict[int, list[Any]]] = {}
    for line in read_lines(folder / "taken.jsonl"):
        found.setdefault(line["step"], {}).setdefault(line["attempt"], []).append(line["pack"])
    return {step: sorted(attempts[max(attempts)]) for step, attempts in found.items()}


def test_a_killed_run_ends_as_an_unbroken_one(runs: Path) -> None:
    """Killed in a step, when a save begins and before it ends: same losses, weights, moments, data and validation."""
    whole, killed = runs / "whole", runs / "killed"
    assert codes(whole) == [[0]]
    assert codes(killed) == [[-9], [-9], [-9], [-9], [0]], log(killed, len(codes(killed)) - 1)[-3000:]
    assert losses(killed) == losses(whole) and len(losses(whole)) == 9
    assert taken(killed) == taken(whole)
    for iteration in (3, 6, 9):
        expected, found = saved(whole, iteration), saved(killed, iteration)
        assert expected.keys() == found.keys() and len(expected) > 30
        assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
        folders = [checkpoints.folder_of(folder / "run" / "checkpoints", iteration) for folder in (whole, killed)]
        assert checkpoints.read_state(folders[0]) == checkpoints.read_state(folders[1])
    last = [list(read_lines(folder / "run" / "validation.jsonl"))[-1] for folder in (whole, killed)]
    assert last[0]["losses"] == last[1]["losses"] and last[0]["iteration"] == 9


def test_the_optimizer_keeps_each_weight_under_its_own_name(runs: Path) -> None:
    """Also those behind the first of several gradient buckets, which have padding between them."""
    tensors, prefix = saved(runs / "whole", 9), "optimizer.state.param."
    names = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
    assert len(names) > 30
    assert [n for n in names if not torch.equal(tensors[n], tensors[prefix + n].to(tensors[n].dtype))] == []


def test_a_half_written_checkpoint_is_never_loaded(runs: Path) -> None:
    """The third and the fourth attempt were killed while they saved iteration 6, so the one after went on from 3."""
    killed = runs / "killed"
    starts = [first_step(killed, attempt) for attempt in range(5)]
    assert starts == [0, 0, 3, 3, 3]


def first_step(folder: Path, attempt: int) -> int:
    return min(line["step"] for line in read_lines(folder / "taken.jsonl") if line["attempt"] == attempt)


def test_sigterm_saves_and_other_ranks_go_on_with_the_very_next_pack(runs: Path) -> None:
    whole, ranks = runs / "whole", runs / "ranks"
    assert codes(ranks) == [[75, 75], [0]], log(ranks, 0)[-3000:]
    stopped = first_step(ranks, 1)
    assert f"interrupted, saved at iteration {stopped}; the same command goes on from there" in log(ranks, 0)
    assert 4 <= stopped < 9
    assert taken(ranks) == taken(whole)
    found, expected = losses(ranks), losses(whole)
    assert found.keys() == expected.keys()
    for iteration in expected:
        assert found[iteration] == pytest.approx(expected[iteration], rel=1e-4)


def test_validation_is_the_same_in_every_layout(runs: Path) -> None:
    whole, ranks = (list(read_lines(runs / name / "run" / "validation.jsonl")) for name in ("whole", "ranks"))
    assert [line["iteration"] for line in whole] == [3, 6, 9]
    assert ranks[0]["iteration"] == 3 and ranks[0]["loss"] == pytest.approx(whole[0]["loss"], rel=1e-5)
    assert ranks[0]["losses"] == pytest.approx(whole[0]["losses"], rel=1e-5)
    assert whole[0]["losses"].keys() == {"0.2", "0.8"} and whole[0]["losses"]["0.2"] != whole[0]["losses"]["0.8"]
    assert whole[-1]["loss"] == pytest.approx(sum(whole[-1]["losses"].values()) / 2, rel=1e-5)


def test_bad_steps_are_skipped_and_then_rolled_back(runs: Path) -> None:
    """Step 2 is NaN, alone; 5 and 6 are spikes in a row, after which the run is at iteration 3, the data is not."""
    poisoned, whole = runs / "poisoned", runs / "whole"
    assert codes(poisoned) == [[0]], log(poisoned, 0)[-3000:]
    bad = list(read_lines(poisoned / "run" / "bad_steps.jsonl"))
    assert [(line["iteration"], line["action"]) for line in bad] == [(2, "skip"), (5, "skip"), (6, "rollback")]
    assert bad[0]["reason"] == "loss nan" and all(line["samples"] for line in bad)
    assert re.fullmatch(r"gradient norm \S+ is \S+ times its median \S+", bad[1]["reason"])  # its loss is inconspicuous
    assert re.fullmatch(r"loss \S+ is \S+ times its median \S+", bad[2]["reason"])
    assert "rolled back to iteration 3 (1 of 3)" in log(poisoned, 0)
    assert list(read_lines(poisoned / "run" / "metrics.jsonl"))[-1]["skipped_steps"] == 3
    packs = [line["pack"] for line in read_lines(poisoned / "taken.jsonl")]
    others = [line["pack"] for line in read_lines(whole / "taken.jsonl")]
    assert packs[: len(others)] == others and len(packs) == len(others) + 3 * 4  # steps 4 to 6 were taken twice
    assert all(tensor.isfinite().all() for tensor in saved(poisoned, 9).values() if tensor.is_floating_point())
    rates = [line["learning_rate"] for line in read_lines(poisoned / "run" / "metrics.jsonl") if line["iteration"] == 4]
    assert len(rates) == 2 and rates[0] == rates[1] == losses(whole)[3][2] < losses(poisoned)[3][2]
    assert losses(poisoned)[1] == losses(whole)[1] and losses(poisoned)[9] != losses(whole)[9]


def test_two_ranks_of_fsdp_decide_as_one_rank_does(runs: Path) -> None:
    """The same steps are skipped and rolled back, and what is learned in between is the same, also after a kill."""
    sharded, poisoned = runs / "sharded", runs / "poisoned"
    killed, ended = codes(sharded)
    assert -9 in killed and 0 not in killed and ended == [0, 0], log(sharded, 1)[-3000:]  # gloo aborts without a peer
    assert first_step(sharded, 1) == 6
    found, expected = (list(read_lines(folder / "run" / "bad_steps.jsonl")) for folder in (sharded, poisoned))
    for mine, other in zip(found, expected, strict=True):
        assert all(mine[name] == other[name] for name in ("iteration", "action", "samples"))
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4, nan_ok=True)
    assert losses(sharded).keys() == losses(poisoned).keys()
    for iteration, line in losses(poisoned).items():
        assert losses(sharded)[iteration] == pytest.approx(line, rel=1e-4, nan_ok=True)


def test_a_run_that_may_not_skip_stops(runs: Path) -> None:
    stopped = runs / "stopped"
    assert codes(stopped) == [[1], [1]]
    sentence = r"FloatingPointError: 1 bad steps in a row up to iteration 4 \(loss \S+ is \S+ times its median \S+\)"
    assert re.search(sentence, log(stopped, 0))
    assert checkpoints.latest(stopped / "run" / "checkpoints") == 3


def test_a_full_disk_leaves_the_checkpoint_before(runs: Path) -> None:
    full = runs / "full"
    assert codes(full) == [[1], [0]], log(full, 0)[-3000:]
    assert "could not be written" in log(full, 0) and "checkpoint 3 is whole" in log(full, 0)
    assert first_step(full, 1) == 3
    folder = full / "run" / "checkpoints"
    assert checkpoints.whole_iterations(folder) == [3, 6, 9] and len(list(folder.glob("iter_*"))) == 3


def test_a_checkpoint_of_another_architecture_is_refused(runs: Path) -> None:
    stopped = runs / "stopped"  # by its first attempt, with another model
    assert "is of another architecture: hidden_size=32, here 64" in log(stopped, 1)
    assert "Traceback" not in log(stopped, 1)
    assert checkpoints.latest(stopped / "run" / "checkpoints") == 3


def test_a_dead_data_worker_ends_the_run_which_goes_on(runs: Path) -> None:
    whole, worker = runs / "whole", runs / "worker"
    assert codes(worker) == [[1], [0]], log(worker, 0)[-3000:]
    assert "a process that reads training data died" in log(worker, 0)
    assert first_step(worker, 1) == 3 and losses(worker) == losses(whole)

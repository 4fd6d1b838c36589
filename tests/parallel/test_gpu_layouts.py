"""Every layout on two or four GPUs, in bfloat16 over NCCL: against one, and between layouts and checkpoint formats."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.parallel.compare import compare, module_errors, read_run
from tests.parallel.layouts import BASES, FSDP, I2V, LAYOUTS, LOADED, PAIRED, RECOMPUTED, SAVED, SELECTIVE, Layout
from wan_core.architecture import Architecture
from wan_core.convert.checkpoint import iteration_dir, read_weights
from wan_core.convert.mapping import stays_float32, to_diffusers

ROOT = Path(__file__).parents[2]
GPUS = min(4, torch.cuda.device_count())


def runnable(*names: str) -> tuple[str, ...]:
    """Those that need no more GPUs than there are, nor a checkpoint of one that does."""
    return tuple(
        name for name in names
        if Layout.of(name).ranks <= GPUS and Layout.of(Layout.of(name).load or "one").ranks <= GPUS
    )  # fmt: skip


SHARDED = runnable(
    *FSDP, "cp2-fsdp", "tp2-save", "dp2-save", "dp2-fsdp-save", "cp2-fsdp-save",
    "dp2-load:dp2-fsdp-save", *(name for name in (*PAIRED, *LOADED) if "fsdp" in name),
)  # fmt: skip
PLAIN = runnable(
    *LAYOUTS, *SELECTIVE, *RECOMPUTED, *I2V,
    *(name for name in (*PAIRED, *SAVED, *LOADED) if "fsdp" not in name),
)  # fmt: skip

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")]


def run_layouts(out: Path, names: tuple[str, ...], environment: dict[str, str]) -> Path:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(GPUS), "-m"]
    done = subprocess.run(
        [*command, "tests.parallel.layouts", "--layouts", ",".join(names), "--out", str(out)], cwd=ROOT,
        env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    return out


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_layouts(tmp_path_factory.mktemp("plain"), (*BASES, *PLAIN), dict(os.environ))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_DEVICE_MAX_CONNECTIONS"}
    return run_layouts(tmp_path_factory.mktemp("sharded"), ("one-long", "one-i2v-long", *SHARDED), environment)


def equals_one_gpu(runs: Path, name: str) -> None:
    layout = Layout.of(name)
    run = read_run(runs / layout.folder)
    errors = compare(run, read_run(runs / layout.base))
    assert len(run.losses) >= 10
    assert errors.loss <= 1e-2
    assert errors.whole_cosine >= 0.999
    assert errors.cosine >= 0.999, errors.gradient_of  # of the module that is farthest off
    assert not run.differing


@pytest.mark.parametrize("name", PLAIN)
def test_a_layout_equals_one_gpu(plain: Path, name: str) -> None:
    equals_one_gpu(plain, name)


@pytest.mark.parametrize("name", SHARDED)
def test_fsdp_equals_one_gpu(sharded: Path, name: str) -> None:
    equals_one_gpu(sharded, name)


def test_export_gives_the_trained_bytes(sharded: Path) -> None:
    trained = read_run(sharded / "dp2-fsdp-save").weights
    read = read_weights(iteration_dir(sharded / "dp2-fsdp-save" / "checkpoints"))
    assert {name for name, weight in read.items() if weight.dtype == torch.float32} == set(filter(stays_float32, read))
    architecture = Architecture.from_diffusers(sharded / "model")
    expected = to_diffusers({name: weight.to(read[name].dtype) for name, weight in trained.items()}, architecture)
    exported = to_diffusers(read, architecture)
    assert all(torch.equal(exported[key], expected[key]) for key in expected)


def test_optimizer_state_crosses_formats(sharded: Path) -> None:
    """Going on from the same checkpoint as FSDP or not: Adam's moments and steps make the next ten steps alike."""
    same, crossed = (read_run(sharded / f"{layout}-load_dp2-fsdp-save") for layout in ("dp2-fsdp", "dp2"))
    errors = module_errors(crossed.weights, same.weights)
    assert max(error for error, _ in errors.values()) <= 1e-2

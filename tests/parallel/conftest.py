"""One process runs all layouts: importing Megatron is what takes time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parallel.layouts import NAMES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the results of all layouts."""
    out = tmp_path_factory.mktemp("layouts")
    command = [sys.executable, "-m", "tests.parallel.layouts", "--fork", "4", "--layouts", ",".join(NAMES)]
    with (out / "log.txt").open("w") as log:
        result = subprocess.run(
            [*command, "--features", "--out", str(out)], cwd=ROOT, stdout=log, stderr=log, timeout=1200,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    assert result.returncode == 0, (out / "log.txt").read_text()[-8000:]
    return out

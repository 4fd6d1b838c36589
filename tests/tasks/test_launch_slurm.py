"""launcher=slurm: torchrun is real, Slurm's programs are stand-ins that start what they are given on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tasks.errors import LaunchError
from tasks.launch import launch
from tests.tasks.test_launch import program
from wan_core.config import LaunchConfig

SCONTROL = """#!/bin/sh
[ "$*" = "show hostnames node[1-2]" ] && printf 'localhost\\nlocalhost\\n'
"""
SRUN = """#!/usr/bin/env python3
# One process per node with Slurm's variables, its lines labelled; the first that fails ends the others.
import json, os, pathlib, subprocess, sys, threading, time
options, command = sys.argv[1:sys.argv.index("bash")], sys.argv[sys.argv.index("bash"):]
pathlib.Path(os.environ["SAW"]).write_text(json.dumps(options))
def label(task, node):
    for line in task.stdout:
        print(f"{node}: {line}", end="", flush=True)
tasks = [
    subprocess.Popen(command, text=True,
                     env={**os.environ, "SLURM_NODEID": str(node), "SLURMD_NODENAME": "localhost"},
                     stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for node in range(int(options[options.index("--nodes") + 1]))
]
readers = [threading.Thread(target=label, args=(task, node)) for node, task in enumerate(tasks)]
for reader in readers:
    reader.start()
while None in (ended := [task.poll() for task in tasks]) and not any(ended):
    time.sleep(0.1)
for task in tasks:
    task.terminate()
for reader in readers:
    reader.join()
sys.exit(max(128 - status if status < 0 else status for status in (task.wait() for task in tasks)))
"""


@pytest.fixture
def allocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job of two nodes; srun's options land in `srun.json`."""
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[1-2]")
    monkeypatch.setenv("SAW", str(tmp_path / "srun.json"))
    return tmp_path


def test_every_node_has_its_ranks(allocation: Path) -> None:
    name = program(allocation, "print('rank', rank, 'of', os.environ['WORLD_SIZE'], 'on', os.environ['GROUP_RANK'])")
    lines: list[str] = []
    config = LaunchConfig(launcher="slurm", nodes=2, processes_per_node=2)
    launch(config, [name], allocation / "logs", on_line=lines.append)
    assert [line for line in lines if line.startswith("rank")] == ["rank 0 of 4 on 0"]
    said = {path.read_text().strip() for path in (allocation / "logs").rglob("stdout.log")}
    assert said == {f"rank {rank} of 4 on {rank // 2}" for rank in range(4)}
    options = json.loads((allocation / "srun.json").read_text())
    assert options[options.index("--ntasks-per-node") + 1] == "1" and "--gpus-per-node" not in options


def test_a_rank_of_another_node_fails(allocation: Path) -> None:
    body = """
        if rank == 1:
            print("[rank1]: OSError: node two has no such file", file=sys.stderr)
            sys.exit(1)
        time.sleep(60)
    """
    config = LaunchConfig(launcher="slurm", nodes=2)
    with pytest.raises(LaunchError, match=r"rank 1 on node \d ended with exit code 1") as caught:
        launch(config, [program(allocation, body)], allocation / "logs")
    assert "OSError: node two has no such file" in str(caught.value) and caught.value.retry


def test_a_killed_torchrun_is_retried(allocation: Path) -> None:
    """srun says so by its status alone."""
    name = program(allocation, "if rank == 0: os.kill(os.getppid(), 9)\ntime.sleep(60)")
    with pytest.raises(LaunchError, match="torchrun on node 0 ended with 137") as caught:
        launch(LaunchConfig(launcher="slurm", nodes=2), [name], allocation / "logs")
    assert caught.value.retry


def test_an_allocation_that_is_too_small_is_refused(allocation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"launch\.nodes=3 exceeds the allocation's 2"):
        launch(LaunchConfig(launcher="slurm", nodes=3), ["never"], allocation / "logs")
    monkeypatch.delenv("SLURM_JOB_NODELIST")
    with pytest.raises(ValueError, match="runs inside an allocation, and there is none here; use salloc or sbatch"):
        launch(LaunchConfig(launcher="slurm"), ["never"], allocation / "logs")

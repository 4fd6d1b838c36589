"""A run that is cancelled in the UI, which sets its state to Cancelling: nothing that it started may outlive it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from prefect.client.orchestration import get_client
from prefect.states import Cancelling

from tasks.process import Process
from wan_core.encode.video import write_video

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
MARK = "CANCEL_TEST_MARK"
LIMIT_SECONDS = 30.0


def ours(mark: str, command: bytes = b"") -> list[int]:
    """Living processes that inherited the mark, and whose command line contains some bytes."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            marked = f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0")
            if marked and command in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def wait_until(holds: Callable[[], Any], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


FLOWS = """
import sys, time
from pathlib import Path
from prefect import flow, task
sys.path.insert(0, {root!r})
from tasks.encode import encode
from tasks.launch import launch
from tasks.stage import Workspace
from wan_core.config import EncodeConfig, LaunchConfig, RayConfig, Size


@flow
def training(folder: str):
    @task
    def train():
        launch(LaunchConfig(processes_per_node=2, stop_seconds=5), ["cancel_rank"], Path(folder) / "logs")
    train()


@flow
def encoding(folder: str, model: str):
    config = EncodeConfig(sizes=(Size(256, 256),), max_frames=81, vae_dtype="float32", text_dtype="float32",
                          clips_per_part=2)
    encode(Workspace(Path(folder) / "work", "t"), config, RayConfig(actors=1), Path(folder) / "videos", Path(model))
"""


@pytest.fixture(scope="module")
def worker(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with two flows, deployed, and a worker that runs them."""
    folder = tmp_path_factory.mktemp("cancel")
    (folder / "cancel_flows.py").write_text(FLOWS.format(root=str(ROOT)))
    (folder / "cancel_rank.py").write_text(
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)  # a rank that does not listen\n"
        f"open({str(folder / 'rank')!r}, 'w').close()\ntime.sleep(600)\n"
    )
    environment = {MARK: folder.name, "PYTHONPATH": f"{folder}:{ROOT}", "PREFECT_WORKER_QUERY_SECONDS": "2"}
    command = [sys.executable, "-m", "prefect"]
    with get_client(sync_client=True) as client:
        from prefect.client.schemas.actions import WorkPoolCreate

        client.create_work_pool(WorkPoolCreate(name="cancel", type="process"))
    process = Process([*command, "worker", "start", "--pool", "cancel"], environment, folder / "worker.log")
    yield folder
    process.stop()


def started(folder: Path, name: str, **parameters: str) -> UUID:
    """Deploy a flow of the file and start a run of it."""
    import cancel_flows
    from prefect.client.schemas.objects import FlowRun

    flow = getattr(cancel_flows, name)
    with get_client(sync_client=True) as client:
        deployment = client.create_deployment(
            client.create_flow(flow), name="t", work_pool_name="cancel", path=str(folder),
            entrypoint=f"cancel_flows.py:{name}", enforce_parameter_schema=False,
            pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": str(folder)}}],
        )  # fmt: skip
        run: FlowRun = client.create_flow_run_from_deployment(deployment, parameters=parameters)
        return run.id


def cancel(run: UUID) -> float:
    """Cancel it as the UI does; returns the seconds until its state said so."""
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run, Cancelling())
        begun = time.monotonic()
        assert wait_until(lambda: client.read_flow_run(run).state.is_cancelled(), 60), client.read_flow_run(run).state
        return time.monotonic() - begun


def test_cancel_ends_torchrun(worker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(worker)
    run = started(worker, "training", folder=str(worker))
    assert wait_until((worker / "rank").exists, 300), (worker / "worker.log").read_text()
    ranks = ours(worker.name, b"cancel_rank")
    assert len(ranks) >= 3  # torchrun and its ranks
    assert cancel(run) < LIMIT_SECONDS
    assert wait_until(lambda: not ours(worker.name, b"cancel_rank"), LIMIT_SECONDS)


def test_cancel_ends_ray(worker: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(worker)
    (worker / "videos").mkdir()
    for i in range(6):
        frames = np.random.default_rng(i).integers(0, 255, (81, 256, 256, 3), dtype=np.uint8)
        write_video(worker / "videos" / f"{i}.mp4", frames, 16)
        (worker / "videos" / f"{i}.txt").write_text(f"clip {i}")
    run = started(worker, "encoding", folder=str(worker), model=str(tiny_model))
    assert wait_until(lambda: ours(worker.name, b"ray::EncodeWorker.encode"), 300), os.listdir(worker)
    assert cancel(run) < LIMIT_SECONDS
    assert wait_until(lambda: not ours(worker.name, b"ray"), LIMIT_SECONDS)
    assert not list((worker / "work").glob("encode/*/record.json"))

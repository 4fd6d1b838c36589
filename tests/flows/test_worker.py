"""Runs that a worker started: cancelled in the UI, which sets their state to Cancelling, or left alone by a worker that
ends. Nothing that they started may outlive them, and nothing that is done is lost.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import State
from prefect.states import Cancelling

from tasks.launch import free_port
from tasks.process import Process
from tests.processes import living, start_ray, wait_until
from wan_core.encode.video import write_video

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
MARK, NODES_MARK = "WORKER_TEST_MARK", "WORKER_TEST_NODES"
LIMIT_SECONDS = 30.0


FLOWS = """
import sys, time
from pathlib import Path
from prefect import flow, task
sys.path.insert(0, {root!r})
from tasks.encode import encode
from tasks.launch import launch
from tasks.stage import Workspace
from tasks.workers import ray_session
from wan_core.config import EncodeConfig, LaunchConfig, RayConfig, Size


@flow
def training(folder: str, rank: str):
    @task
    def train():
        launch(LaunchConfig(processes_per_node=2), [rank], Path(folder) / "logs")
    train()


@flow
def on_nodes(folder: str, rank: str, address: str):
    @task
    def train():
        config = LaunchConfig(launcher="ray", nodes=2, processes_per_node=2, placement_seconds=30)
        with ray_session(RayConfig(address)):
            launch(config, [rank], Path(folder) / "logs")
    train()


@flow
def encoding(folder: str, model: str):
    config = EncodeConfig(sizes=(Size(256, 256),), max_frames=81, vae_dtype="float32", text_dtype="float32",
                          clips_per_part=2)
    encode(Workspace(Path(folder) / "work", "t"), config, RayConfig(actors=1), Path(folder) / "videos", Path(model))
"""


class Worker:
    """A pool of its own, whose worker runs the flows of a file; ranks are modules beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pool = folder, f"pool-{folder.name}"
        (folder / "worker_flows.py").write_text(FLOWS.format(root=str(ROOT)))
        with get_client(sync_client=True) as client:
            client.create_work_pool(WorkPoolCreate(name=self.pool, type="process"))
        self.start()

    def start(self) -> None:
        environment = {
            MARK: self.folder.name,
            "PYTHONPATH": f"{self.folder}:{ROOT}",
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "RAY_AUTH_MODE": "disabled",  # as at `ray_nodes`; a local Ray of an earlier test leaves "token"
        }
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", self.pool]
        self.process = Process(command, environment, self.folder / "worker.log")

    def add_rank(self, name: str, body: str) -> None:
        """A module that touches the file `name` when it begins."""
        head = f"import os, signal, time\nopen({str(self.folder / name)!r}, 'w').close()\n"
        (self.folder / f"{name}.py").write_text(head + body)

    def run(self, flow: str, **parameters: str) -> UUID:
        """Deploy a flow of the file and start a run of it."""
        import worker_flows

        with get_client(sync_client=True) as client:
            deployment = client.create_deployment(
                client.create_flow(getattr(worker_flows, flow)), name="t", work_pool_name=self.pool,
                path=str(self.folder), entrypoint=f"worker_flows.py:{flow}", enforce_parameter_schema=False,
                pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": str(self.folder)}}],
            )  # fmt: skip
            given = {"folder": str(self.folder), **parameters}
            return client.create_flow_run_from_deployment(deployment, parameters=given).id

    def started(self, command: bytes = b"") -> list[int]:
        """Living processes below the worker, whose command line contains some bytes."""
        return [pid for pid in living(f"{MARK}={self.folder.name}", command) if pid != self.process.pid]

    def log(self) -> str:
        return (self.folder / "worker.log").read_text()


@pytest.fixture(scope="module")
def worker(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("worker")
        patch.syspath_prepend(folder)
        worker = Worker(folder)
        yield worker
        worker.process.stop()


def state(run: UUID) -> State:
    with get_client(sync_client=True) as client:
        found = client.read_flow_run(run).state
    assert found is not None
    return found


def cancel(run: UUID, worker: Worker, working: Callable[[], list[int]]) -> None:
    """Cancel it as the UI does. What is `working` must be gone in time; the bookkeeping may take longer."""
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run, Cancelling())
    assert wait_until(lambda: not working(), LIMIT_SECONDS)
    assert wait_until(lambda: state(run).is_cancelled()), state(run)
    assert wait_until(lambda: not worker.started(), LIMIT_SECONDS)


def test_cancel_ends_torchrun(worker: Worker) -> None:
    worker.add_rank("deaf", "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)\n")
    run = worker.run("training", rank="deaf")
    assert wait_until((worker.folder / "deaf").exists), worker.log()
    assert len(worker.started(b"deaf")) >= 3  # torchrun and its ranks
    cancel(run, worker, lambda: worker.started(b"deaf"))


@contextlib.contextmanager
def ray_nodes(count: int, folder: Path) -> Iterator[str]:
    """Address of a Ray cluster of nodes with a core each, on this machine; its processes have `NODES_MARK`."""
    address = f"127.0.0.1:{free_port()}"
    environment = {NODES_MARK: folder.name, "PYTHONPATH": f"{folder}:{ROOT}"}
    head = ["--head", f"--port={address.rpartition(':')[2]}", "--include-dashboard=false"]
    with contextlib.ExitStack() as nodes:
        for i, role in enumerate([head, *[[f"--address={address}"]] * (count - 1)]):
            own = ["--num-cpus=1", "--node-ip-address=127.0.0.1", *role]
            nodes.callback(start_ray(own, environment, folder / f"ray{i}.log").stop)
        yield address


def test_cancel_ends_torchrun_on_other_nodes_and_frees_them(worker: Worker) -> None:
    worker.add_rank("deaf_on_nodes", "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)\n")
    worker.add_rank("brief", "")
    with ray_nodes(2, worker.folder) as address:
        run = worker.run("on_nodes", rank="deaf_on_nodes", address=address)

        def ranks() -> list[int]:
            return living(f"{NODES_MARK}={worker.folder.name}", b"deaf_on_nodes")

        assert wait_until(lambda: len(ranks()) >= 6), worker.log()  # two torchruns with two ranks each
        cancel(run, worker, ranks)
        after = worker.run("on_nodes", rank="brief", address=address)  # finds no core if one is still reserved
        assert wait_until(lambda: state(after).is_final()) and state(after).is_completed(), worker.log()


def test_cancel_ends_ray(worker: Worker, tiny_model: Path) -> None:
    videos = worker.folder / "videos"
    videos.mkdir()
    for i in range(6):
        frames = np.random.default_rng(i).integers(0, 255, (81, 256, 256, 3), dtype=np.uint8)
        write_video(videos / f"{i}.mp4", frames, 16)
        (videos / f"{i}.txt").write_text(f"clip {i}")
    run = worker.run("encoding", model=str(tiny_model))
    assert wait_until(lambda: worker.started(b"ray::EncodeWorker.encode")), os.listdir(worker.folder)
    cancel(run, worker, lambda: worker.started(b"ray"))
    assert not list((worker.folder / "work").glob("encode/*/record.json"))


def test_a_run_outlives_its_killed_worker_and_the_next_worker_takes_the_next_run(worker: Worker) -> None:
    go = worker.folder / "go"
    worker.add_rank("patient", f"while not os.path.exists({str(go)!r}): time.sleep(0.1)\n")
    first = worker.run("training", rank="patient")
    assert wait_until((worker.folder / "patient").exists), worker.log()
    os.kill(worker.process.pid, signal.SIGKILL)
    assert worker.process.wait(30) is not None
    second = worker.run("training", rank="patient")
    worker.start()
    go.touch()
    assert wait_until(lambda: state(first).is_completed()), state(first)
    assert wait_until(lambda: state(second).is_completed()), state(second)


def test_a_stopped_worker_leaves_nothing_running(worker: Worker) -> None:
    """SIGTERM, as systemd and Kubernetes send it. Prefect's worker then kills its runs, which cannot say so any more:
    `automations.yaml` does, and torchrun is told by the kernel.
    """
    worker.add_rank("steady", "time.sleep(600)\n")
    worker.run("training", rank="steady")
    assert wait_until((worker.folder / "steady").exists), worker.log()
    os.kill(worker.process.pid, signal.SIGTERM)
    assert worker.process.wait(60) is not None, worker.log()
    assert wait_until(lambda: not worker.started(), LIMIT_SECONDS)
    worker.start()  # for whoever comes next

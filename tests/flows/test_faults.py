"""What a team's server lives through: a database crashes, the server restarts, a disk fills; the work goes on.

PostgreSQL is Debian's (`apt-get install postgresql`), behind a real `prefect server start`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tasks.process import Process
from tests.processes import wait_until
from wan_core.records import IndexRecord, load_record

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))

WITHIN = 40  # seconds; a heartbeat every 30 is Prefect's least
PREFECTS_BUFFER = 60  # seconds that Prefect keeps what a trigger counted and nobody looked at, unless told otherwise

# Three stages of a few seconds each, in a process of its own as a worker starts it.
FLOW = """
import sys, time
from pathlib import Path
from prefect import flow
from prefect.states import Completed
from tasks.stage import Target, Workspace, stage_task
from wan_core.config import IndexConfig, ShardConfig
from wan_core.output import writing
from wan_core.records import IndexRecord, ShardRecord, fingerprint

def work(stage, kind, target, config, **values):
    with writing(stage, target.folder, config, target.fingerprint) as output:
        for second in range(int(sys.argv[2])):
            print("working", stage, second, flush=True)
            time.sleep(1)
        (output.path / "data").write_bytes(bytes(int(sys.argv[3])))
        (output.path / "card.md").write_text("# t\\n")  # index shows it
        return output.finish(kind, encoder={}, **values)

@stage_task("shard")
def shard(target: Target, config: ShardConfig) -> ShardRecord:
    return work("shard", ShardRecord, target, config, num_samples={"train": 1}, shards={"data": 1})

@stage_task("index")
def index(target: Target, config: IndexConfig, sharded: ShardRecord) -> IndexRecord:
    return work("index", IndexRecord, target, config, num_samples={"train": 1})

@flow(name="faults")
def faults(root: Path):
    run = Workspace(root, "t")
    target = run.target("shard", ShardRecord, fingerprint("shard", ShardConfig()))
    sharded = run.make(shard, target, config=ShardConfig())
    target = run.target("index", IndexRecord, fingerprint("index", IndexConfig(), shard=sharded.fingerprint))
    run.make(index, target, config=IndexConfig(), sharded=sharded)
    return Completed(name="Promoted")

if __name__ == "__main__":
    faults(Path(sys.argv[1]))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Postgres:
    """A cluster in a folder of its own, run by Debian's user `postgres`, who may not enter pytest's folders."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="wan-postgres-"))
        shutil.chown(self.folder, "postgres", "postgres")
        self.port = free_port()
        self.url = f"postgresql+asyncpg://postgres@127.0.0.1:{self.port}/postgres"
        data, binaries = str(self.folder / "data"), str(BINARIES[-1])
        user = ["runuser", "-u", "postgres", "--"]
        subprocess.run([*user, f"{binaries}/initdb", "-D", data, "-A", "trust"], check=True, capture_output=True)
        self.command = [*user, f"{binaries}/postgres", "-D", data, "-p", str(self.port), "-k", str(self.folder)]
        self.ready = [f"{binaries}/pg_isready", "-h", "127.0.0.1", "-p", str(self.port)]
        self.start()

    def start(self) -> None:
        self.process = Process(self.command, {}, self.folder / "log")
        assert wait_until(lambda: subprocess.run(self.ready, capture_output=True).returncode == 0)

    def crash(self) -> None:
        """SIGKILL to every process of it."""
        self.process.stop(grace=0)


class Server:
    """`prefect server start` on a database, its home in a folder."""

    def __init__(self, folder: Path, database: str | None) -> None:
        self.port, self.folder = free_port(), folder
        self.url = f"http://127.0.0.1:{self.port}/api"
        compose = yaml.safe_load((ROOT / "infra" / "compose.yaml").read_text())
        buffer = "PREFECT_SERVER_EVENTS_EXPIRED_BUCKET_BUFFER"
        self.environment = {
            "PREFECT_HOME": str(folder), "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            buffer: compose["services"]["server"]["environment"][buffer],
        }  # fmt: skip
        if database:
            self.environment["PREFECT_API_DATABASE_CONNECTION_URL"] = database
        self.start()

    def start(self) -> None:
        command = ["-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port)]
        self.process = Process([sys.executable, *command], self.environment, self.folder / "server.log")
        assert wait_until(self.healthy)

    def healthy(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
            return answer.status == 200
        return False

    def states(self, kind: str) -> dict[str, tuple[str, str]]:
        """Type and name of the state of all `flow_runs` or `task_runs`."""
        request = urllib.request.Request(f"{self.url}/{kind}/filter", b"{}", {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return {run["id"]: (run["state_type"], run["state_name"]) for run in json.load(answer)}


def start_flow(url: str, folder: Path, workspace: Path, seconds: int = 8, size: int = 10) -> Process:
    (folder / "faults_flow.py").write_text(FLOW)
    project = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())
    environment = project["definitions"]["pool"]["job_variables"]["env"] | {
        "PREFECT_API_URL": url, "PREFECT_HOME": str(folder / "client"), "PYTHONPATH": str(ROOT),
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # the shortest
    }  # fmt: skip
    command = [sys.executable, str(folder / "faults_flow.py"), str(workspace), str(seconds), str(size)]
    return Process(command, environment, folder / "flow.log")


def said(process: Process, text: str) -> bool:
    return process.wait(0) is not None or any(text in line for line in process.tail)


@pytest.fixture(scope="module")
def database() -> Iterator[Postgres]:
    if (os.geteuid() or not BINARIES) and "CI" not in os.environ:
        pytest.skip("needs root, and Debian's postgresql")
    assert BINARIES, "apt-get install postgresql"
    postgres = Postgres()
    yield postgres
    postgres.process.stop()
    shutil.rmtree(postgres.folder)


@pytest.fixture(scope="module")
def server(database: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"), database.url)
    yield server
    server.process.stop()


@pytest.fixture(scope="module")
def automation(server: Server, tmp_path_factory: pytest.TempPathFactory) -> None:
    """That of automations.yaml, but it waits for WITHIN and not for 15 minutes."""
    wanted = yaml.safe_load((ROOT / "deployments" / "automations.yaml").read_text())
    wanted["trigger"]["within"] = WITHIN
    file = tmp_path_factory.mktemp("automation") / "automation.yaml"
    file.write_text(yaml.safe_dump(wanted))
    create = [sys.executable, "-m", "prefect", "automation", "create", "--from-file", str(file)]
    subprocess.run(create, env={**os.environ, "PREFECT_API_URL": server.url}, check=True, timeout=300)


def test_a_run_survives_a_crash_of_the_database_and_a_restart_of_the_server(
    server: Server, database: Postgres, tmp_path: Path
) -> None:
    flow = start_flow(server.url, tmp_path, tmp_path / "work")
    assert wait_until(lambda: said(flow, "working shard"))
    database.crash()
    time.sleep(5)
    database.start()
    assert wait_until(lambda: said(flow, "working index"))
    server.process.stop()
    time.sleep(5)
    server.start()
    assert flow.wait(300) == 0, list(flow.tail)[-30:]
    (record,) = (tmp_path / "work").glob("index/*")
    assert load_record(IndexRecord, record).num_samples == {"train": 1}
    for kind in ("flow_runs", "task_runs"):
        assert wait_until(lambda kind=kind: {state for state, _ in server.states(kind).values()} == {"COMPLETED"}, 60)


def test_results_survive_the_loss_of_the_database(server: Server, tmp_path: Path) -> None:
    """A new server with an empty database finds the stages' records on disk, and works on nothing."""
    flow = start_flow(server.url, tmp_path, tmp_path / "work", seconds=0)
    assert flow.wait(300) == 0, list(flow.tail)[-30:]
    (home := tmp_path / "home").mkdir()
    empty = Server(home, None)
    flow = start_flow(empty.url, tmp_path, tmp_path / "work", seconds=1)  # a stage that worked would say so each second
    assert flow.wait(300) == 0, list(flow.tail)[-30:]
    assert not any("working" in line for line in flow.tail)
    assert len(empty.states("task_runs")) == 2
    empty.process.stop()


@pytest.mark.skipif(os.geteuid() != 0 and "CI" not in os.environ, reason="mounting needs root")
def test_a_full_disk_fails_at_once_and_leaves_nothing_behind(server: Server, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=True)
    try:
        flow = start_flow(server.url, tmp_path, disk / "work", seconds=0, size=4 << 20)
        assert flow.wait(300) == 1
        assert any("No space left on device" in line for line in flow.tail)
        assert not any("retry" in line.lower() for line in flow.tail)
        assert not list((disk / "work" / "shard").iterdir())
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)  # the remedy
        flow = start_flow(server.url, tmp_path, disk / "work", seconds=0, size=4 << 20)
        assert flow.wait(300) == 0, list(flow.tail)[-30:]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.usefixtures("automation")
def test_a_killed_run_blocks_nobody_and_becomes_crashed(server: Server, tmp_path: Path) -> None:
    """kill -9 of the flow's process while it holds the stage's lock; the next run does the work. The automation tells
    of the run that cannot tell itself, and leaves those alone that completed, whatever their state is called.
    """
    before = server.states("flow_runs").keys()
    flow = start_flow(server.url, tmp_path, tmp_path / "other", seconds=0)
    assert flow.wait(300) == 0, list(flow.tail)[-30:]
    (whole,) = server.states("flow_runs").keys() - before
    flow = start_flow(server.url, tmp_path, tmp_path / "work")
    assert wait_until(lambda: said(flow, "working shard 1"))
    (killed,) = server.states("flow_runs").keys() - before - {whole}
    os.kill(flow.pid, signal.SIGKILL)
    assert flow.wait(60) is not None
    flow = start_flow(server.url, tmp_path, tmp_path / "work", seconds=0)
    assert flow.wait(300) == 0, list(flow.tail)[-30:]
    assert not [path for path in (tmp_path / "work" / "shard").iterdir() if path.name.startswith(".t")]
    assert wait_until(lambda: server.states("flow_runs")[killed] == ("CRASHED", "Crashed"))
    assert server.states("flow_runs")[whole] == ("COMPLETED", "Promoted")


@pytest.mark.usefixtures("automation")
def test_after_a_long_outage_dead_runs_become_crashed_and_live_ones_complete(server: Server, tmp_path: Path) -> None:
    """The server is away for longer than the automation waits, and than Prefect by itself keeps what it has counted.
    Live runs, whose silence looks the same, may be called Crashed until they complete.
    """
    flows, runs, known = [], [], server.states("flow_runs").keys()
    for name in ("live", "dead"):
        (tmp_path / name).mkdir()
        flows.append(start_flow(server.url, tmp_path / name, tmp_path / name / "work", seconds=80))
        assert wait_until(lambda flow=flows[-1]: said(flow, "working shard 5"))  # its first heartbeat is on the server
        runs += server.states("flow_runs").keys() - known - set(runs)
    os.kill(flows[1].pid, signal.SIGKILL)
    assert flows[1].wait(60) is not None
    server.process.stop()
    time.sleep(WITHIN + PREFECTS_BUFFER + 10)
    server.start()
    live, dead = runs
    assert wait_until(lambda: server.states("flow_runs")[dead] == ("CRASHED", "Crashed"), 60)
    assert flows[0].wait(400) == 0, list(flows[0].tail)[-30:]
    assert server.states("flow_runs")[live] == ("COMPLETED", "Promoted")


def test_two_processes_on_one_stage_work_once(server: Server, tmp_path: Path) -> None:
    flows = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        flows.append(start_flow(server.url, tmp_path / name, tmp_path / "work", seconds=20))
    assert [flow.wait(300) for flow in flows] == [0, 0]
    assert any("Waits for another run that works on" in line for flow in flows for line in flow.tail)
    for stage in ("shard", "index"):
        working = [any(f"working {stage}" in line for line in flow.tail) for flow in flows]
        assert sorted(working) == [False, True], stage

"""A flow run in a Slurm job of its own: infra/slurm/run-flow against a Slurm of shell scripts, which runs jobs here."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from tests.processes import living, wait_until

ROOT = Path(__file__).parents[1]
RUN = "0c0ffee0-0000-0000-0000-000000000000"
# A job is a file of the folder jobs/, named by its number, with its state in it, for as long as Slurm has it in its
# queue. STUCK lets jobs wait for nodes; AWAY is there while slurmctld does not answer.
PROGRAMS = {
    "sbatch": """
        echo "$@" >>"$SLURM/sbatch.calls"
        job=$((100 + $(wc -l <"$SLURM/sbatch.calls")))
        while (($# > 1)); do [[ $1 == --output ]] && log=${2/\\%j/$job}; shift; done
        if [[ -e $SLURM/STUCK ]]; then echo PENDING >"$SLURM/jobs/$job"; else
          echo RUNNING >"$SLURM/jobs/$job"
          (SLURM_JOB_ID=$job bash "$1" & echo $! >"$SLURM/pids/$job"; wait $!; rm -f "$SLURM/jobs/$job") >"$log" 2>&1 &
        fi
        echo "$job;cluster"
    """,
    "squeue": """
        echo "$@" >>"$SLURM/squeue.calls"
        if [[ -e $SLURM/AWAY ]]; then
          echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1; fi
        [[ $* =~ --jobs\\ ([0-9]+)\\ --format\\ (.*)$ ]]
        if [[ ! -e $SLURM/jobs/${BASH_REMATCH[1]} ]]; then
          [[ -e $SLURM/FORGETS ]] || exit 0
          echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; fi
        echo "${BASH_REMATCH[2]/\\%T/$(cat "$SLURM/jobs/${BASH_REMATCH[1]}")}"
    """,
    "scancel": """
        echo "$@" >>"$SLURM/scancel.calls"
        job=${!#}
        if [[ $1 == --state=PENDING ]]; then grep -q PENDING "$SLURM/jobs/$job" && rm "$SLURM/jobs/$job"; exit 0; fi
        grep -lz "^SLURM_JOB_ID=$job$" /proc/[0-9]*/environ 2>/dev/null | cut -d/ -f3 | xargs -r kill -TERM
    """,
}


class Slurm:
    """The programs in `bin`, and what they know."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder / "slurm", folder / "bin"
        for path in (self.bin, self.folder / "jobs", self.folder / "pids"):
            path.mkdir(parents=True)
        for name, body in PROGRAMS.items():
            self.program(name, body)

    def program(self, name: str, body: str) -> None:
        (self.bin / name).write_text("#!/usr/bin/env bash\n" + textwrap.dedent(body))
        (self.bin / name).chmod(0o755)

    def set(self, name: str) -> None:
        (self.folder / name).touch()

    def calls(self, name: str) -> list[str]:
        path = self.folder / f"{name}.calls"
        return path.read_text().splitlines() if path.exists() else []

    def job(self) -> int | None:
        """The process of the newest job's script, to which `--signal=B:...` goes."""
        pids = sorted((self.folder / "pids").iterdir())
        return int(pids[-1].read_text() or 0) or None if pids else None

    def environment(self, **more: str) -> dict[str, str]:
        paths = f"{self.bin}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        return {**os.environ, "PATH": paths, "SLURM": str(self.folder), "WAN_SLURM_POLL": "0.2", **more}


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    slurm = Slurm(tmp_path)
    yield slurm
    for pid in living(f"SLURM={slurm.folder}"):
        os.kill(pid, signal.SIGKILL)


def run_flow(slurm: Slurm, prefect: str, **environment: str) -> subprocess.Popen[str]:
    """run-flow in a checkout of its own, where `prefect flow-run execute` is a script of the test."""
    checkout = slurm.folder / "checkout"
    shutil.copytree(ROOT / "infra" / "slurm", checkout / "infra" / "slurm")
    slurm.program("prefect", prefect)
    environment = slurm.environment(PREFECT__FLOW_RUN_ID=RUN, **environment)
    command = [str(checkout / "infra" / "slurm" / "run-flow")]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_job_that_completes(slurm: Slurm) -> None:
    flow = run_flow(slurm, 'echo "executing $3"', WAN_SBATCH="--nodes 2 --time 1:00:00")
    assert flow.wait(30) == 0
    (call,) = slurm.calls("sbatch")
    assert "--nodes 2 --time 1:00:00 infra/slurm/flow.sbatch" in call
    (log,) = (slurm.folder / "checkout" / "workspace" / "logs").iterdir()
    assert log.read_text() == f"executing {RUN}\n" and log.name == f"flow-{RUN}-101.log"


@pytest.mark.parametrize("end", ["exit 3", "kill -KILL $PPID"])
def test_a_job_that_fails(slurm: Slurm, end: str) -> None:
    """The second as a lost node or the kernel's out-of-memory killer end it: without a word."""
    flow = run_flow(slurm, end)
    assert flow.wait(30) == 1
    assert "sacct --jobs 101" in flow.communicate()[0]


@pytest.mark.parametrize("forgets", [False, True])
def test_a_slurmctld_that_is_away_is_no_end(slurm: Slurm, forgets: bool) -> None:
    if forgets:  # it comes back minutes after the job's end
        slurm.set("FORGETS")
    slurm.set("AWAY")
    flow = run_flow(slurm, "exec sleep 1")
    assert wait_until(lambda: len(slurm.calls("squeue")) > 10 and not list((slurm.folder / "jobs").iterdir()), 30)
    assert flow.poll() is None
    (slurm.folder / "AWAY").unlink()
    assert flow.wait(30) == 0


def test_cancelling_takes_a_job_out_of_the_queue(slurm: Slurm) -> None:
    slurm.set("STUCK")
    flow = run_flow(slurm, "")
    assert wait_until(lambda: slurm.calls("squeue"), 30)
    flow.terminate()
    assert flow.wait(10) == 143
    assert slurm.calls("scancel") == ["--state=PENDING 101"]


@pytest.mark.parametrize("deaf", [False, True])
def test_cancelling_waits_for_a_flow_that_saves_and_ends_others(slurm: Slurm, deaf: bool) -> None:
    """A flow hears from Prefect, here by a file, that it is cancelled."""
    body = "exec sleep 600" if deaf else 'until [[ -e "$SLURM/cancelled" ]]; do sleep 0.1; done; echo saved'
    flow = run_flow(slurm, body, WAN_SLURM_STOP_SECONDS="3")
    assert wait_until(lambda: living(f"PREFECT__FLOW_RUN_ID={RUN}", b"sleep\x00") and slurm.job(), 30)
    flow.terminate()
    slurm.set("cancelled")
    assert flow.wait(20) == 143
    assert slurm.calls("scancel")[1:] == (["101"] if deaf else [])
    assert wait_until(lambda: not living("SLURM_JOB_ID=101"), 10)
    assert ("saved" in next((slurm.folder / "checkout" / "workspace" / "logs").glob("*.log")).read_text()) is not deaf


FLOWS = """
import sys
from pathlib import Path
from prefect import flow, task
from tasks.launch import launch
from wan_core.config import LaunchConfig

@flow
def training(folder: str):
    @task
    def train():
        launch(LaunchConfig(processes_per_node=2), ["rank"], Path(folder) / "logs")
    train()
"""
# Like a trainer: from its checkpoint on, and with SIGTERM to a new one.
RANK = """
import os, signal, sys, time
from pathlib import Path
checkpoint = Path(__file__).with_name("checkpoint-" + os.environ["RANK"])
def save(*_):
    checkpoint.touch()
    print("interrupted, saved at iteration 7")
    sys.exit(1)
signal.signal(signal.SIGTERM, save)
Path(__file__).with_name("started-" + os.environ["RANK"]).touch()
time.sleep(0 if checkpoint.exists() else 600)
"""


class Pool:
    """A pool made from slurm.json, whose worker was started in the repository's root."""

    def __init__(self, slurm: Slurm, folder: Path) -> None:
        from prefect.client.orchestration import get_client
        from prefect.client.schemas.actions import WorkPoolCreate

        from tasks.process import Process

        self.folder, self.name = folder, f"pool-{folder.name}"
        template = json.loads((ROOT / "deployments" / "pools" / "slurm.json").read_text())
        (folder / "slurm_flows.py").write_text(FLOWS)
        (folder / "rank.py").write_text(RANK)
        with get_client(sync_client=True) as client:
            client.create_work_pool(WorkPoolCreate(name=self.name, type="process", base_job_template=template))
        path = f"{folder}:{ROOT}"
        environment = slurm.environment(
            PYTHONPATH=path, PREFECT_WORKER_QUERY_SECONDS="2", WAN_SLURM_LOGS=str(folder / "slurm-logs")
        )
        command = ["env", "-C", str(ROOT), sys.executable, "-m", "prefect", "worker", "start", "--pool", self.name]
        self.worker = Process(command, environment, folder / "worker.log")

    def start(self) -> UUID:
        import slurm_flows  # type: ignore[import-not-found]
        from prefect.client.orchestration import get_client

        with get_client(sync_client=True) as client:
            deployment = client.create_deployment(
                client.create_flow(slurm_flows.training), name="t", work_pool_name=self.name,
                path=str(self.folder), entrypoint="slurm_flows.py:training", enforce_parameter_schema=False,
                pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": str(self.folder)}}],
            )  # fmt: skip
            return client.create_flow_run_from_deployment(deployment, parameters={"folder": str(self.folder)}).id

    def trains(self) -> bool:
        return all((self.folder / f"started-{rank}").exists() for rank in (0, 1))

    def saved(self) -> bool:
        return all((self.folder / f"checkpoint-{rank}").exists() for rank in (0, 1))

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in self.folder.glob("**/*.log"))


@pytest.fixture
def pool(slurm: Slurm, prefect_api: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    monkeypatch.syspath_prepend(tmp_path)
    pool = Pool(slurm, tmp_path)
    yield pool
    pool.worker.stop()


@pytest.fixture(scope="module")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from flows.server import prefect_api

    with prefect_api(tmp_path_factory.mktemp("prefect")) as url:
        yield url


def states(run: UUID) -> list[str]:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        found: list[Any] = client.read_flow_run_states(run)
    return [state.name for state in sorted(found, key=lambda state: state.timestamp)]


@pytest.mark.slow
def test_a_run_that_meets_its_time_limit_goes_on_in_a_new_job(slurm: Slurm, pool: Pool) -> None:
    run = pool.start()
    assert wait_until(pool.trains), pool.logs()
    os.kill(slurm.job() or 0, signal.SIGUSR1)  # what --signal=B:USR1@300 sends, and to whom
    assert wait_until(lambda: states(run)[-1] == "Completed"), (states(run), pool.logs())
    assert pool.saved()
    names = states(run)
    assert names[names.index("Crashed") + 1] == "AwaitingRetry" and names.count("Crashed") == 1, names
    assert len(slurm.calls("sbatch")) == 2 and not slurm.calls("scancel")
    assert wait_until(lambda: not living(f"PREFECT__FLOW_RUN_ID={run}"), 30)
    assert not list((pool.folder / "slurm-logs").glob("*.status"))


@pytest.mark.slow
def test_cancelling_a_run_lets_its_ranks_save(slurm: Slurm, pool: Pool) -> None:
    from prefect.client.orchestration import get_client
    from prefect.states import Cancelling

    run = pool.start()
    assert wait_until(pool.trains), pool.logs()
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run, Cancelling())
    assert wait_until(lambda: not living(f"PREFECT__FLOW_RUN_ID={run}"), 30), pool.logs()
    assert wait_until(lambda: states(run)[-1] == "Cancelled"), (states(run), pool.logs())
    assert pool.saved() and len(slurm.calls("sbatch")) == 1

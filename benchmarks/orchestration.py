"""What orchestration costs: a stage as a task over the plain function, and encode's task runs with no-op parts.

    python -m benchmarks.orchestration stages 20
    python -m benchmarks.orchestration parts 1000 2000 5000 10000

One JSON line per measurement. Seconds of CPU are steadier than seconds of wall time on a machine that others use. With
PREFECT_API_URL the server is that one, whose CPU, memory and database are not to be seen from here and left out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from flows.server import prefect_api

SETTLED_SECONDS = 30.0  # without a new state: the server has worked off its queue of events, or dropped the rest


def usage(process: psutil.Process) -> tuple[float, float]:
    """CPU seconds and MiB of resident memory."""
    times = process.cpu_times()
    return times.user + times.system, process.memory_info().rss / 2**20


def server_process() -> psutil.Process | None:
    """The server that `prefect_api` started; None where PREFECT_API_URL names another."""
    children = psutil.Process().children(recursive=True)
    return next((child for child in children if "uvicorn" in " ".join(child.cmdline())), None)


def completed() -> int:
    """Task runs that the server knows to have completed: it works off a queue of events."""
    from prefect.client.orchestration import get_client

    wanted = {"task_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}
    with get_client(sync_client=True) as client:
        return int(client.request("POST", "/task_runs/count", json=wanted, timeout=600).json())


def measured(name: str, count: int, work: Any, task_runs: int) -> None:
    """Run `work` and print what it cost this process and the server, per item."""
    here, server = psutil.Process(), server_process()
    known_before = completed()
    before, server_before, begun = usage(here), usage(server) if server else (0.0, 0.0), time.monotonic()
    work()
    seconds, after = time.monotonic() - begun, usage(here)
    known, changed = completed() - known_before, time.monotonic()
    while known < task_runs and time.monotonic() < changed + SETTLED_SECONDS:
        time.sleep(1)
        if (now := completed() - known_before) != known:
            known, changed = now, time.monotonic()
    row = {
        "what": name, "count": count, "wall_ms_each": round(1e3 * seconds / count, 1),
        "flow_cpu_ms_each": round(1e3 * (after[0] - before[0]) / count, 2),
        "flow_mib": round(after[1]), "flow_mib_grown": round(after[1] - before[1], 1),
        "server_knows": known, "server_seconds": round(changed - begun, 1),
    }  # fmt: skip
    if server:
        server_after = usage(server)
        database = sum(path.stat().st_size for path in Path(os.environ["PREFECT_HOME"]).glob("prefect.db*"))
        row |= {
            "server_cpu_ms_each": round(1e3 * (server_after[0] - server_before[0]) / count, 2),
            "server_mib": round(server_after[1]), "database_mib": round(database / 2**20, 1),
        }  # fmt: skip
    print(json.dumps(row), flush=True)


def stages(root: Path, count: int) -> None:
    """`count` different shard stages that write one small file: plain, as tasks, and found again."""
    from prefect import flow

    from tasks.stage import Target, Workspace, stage_task
    from wan_core.config import ShardConfig
    from wan_core.output import writing
    from wan_core.records import ShardRecord, fingerprint

    def work(target: Target, config: ShardConfig) -> ShardRecord:
        with writing("shard", target.folder, config, target.fingerprint) as output:
            (output.path / "data").write_text("bytes")
            return output.finish(ShardRecord, num_samples={"train": 1}, shards={"data": 1}, encoder={})

    task = stage_task("shard")(work)

    @flow
    def as_tasks() -> None:
        run = Workspace(root / "tasks", "t")
        for seed in range(count):
            config = ShardConfig(seed=seed)
            run.make(task, run.target("shard", ShardRecord, fingerprint("shard", config)), config=config)

    def plain() -> None:
        run = Workspace(root / "plain", "t")
        for seed in range(count):
            config = ShardConfig(seed=seed)
            work(run.target("shard", ShardRecord, fingerprint("shard", config)), config)

    measured("plain function", count, plain, 0)
    measured("stage as task", count, as_tasks, count)
    measured("stage found again", count, as_tasks, count)


def parts(count: int) -> None:
    """`count` task runs of encode whose worker returns at once."""
    from prefect import flow
    from prefect.futures import wait
    from prefect.task_runners import ThreadPoolTaskRunner

    from tasks.encode import encode_part
    from wan_core.encode.stage import Part

    class Nothing:
        def encode(self, *arguments: Any) -> None: ...
        def report(self, *arguments: Any) -> None: ...

    @flow(task_runner=ThreadPoolTaskRunner(max_workers=16), validate_parameters=False)
    def no_op() -> None:
        pool: Any = Nothing()
        futures = [encode_part.submit(Part(f"{i:06d}", ()), pool, pool, Path(), Path()) for i in range(count)]
        wait(futures)
        for future in futures:
            future.result()

    measured("no-op part", count, no_op, count)


def main() -> None:
    os.environ["PREFECT_LOGGING_LEVEL"] = "WARNING"
    what, counts = sys.argv[1], sys.argv[2:]
    if len(counts) > 1:  # a process for each: memory that one took would hide what the next takes
        for count in counts:
            subprocess.run([sys.executable, "-m", "benchmarks.orchestration", what, count], check=True)
        return
    with tempfile.TemporaryDirectory() as folder, prefect_api(Path(folder)):
        if what == "stages":
            stages(Path(folder), int(counts[0]))
        else:
            parts(int(counts[0]))


if __name__ == "__main__":
    main()

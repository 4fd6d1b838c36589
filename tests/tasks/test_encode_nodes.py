"""Encoding over two machines, of which one is lost while it works on a part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.flows.test_encode import CONFIG, make_clips
from tests.processes import wait_until
from tests.tasks.network import NEEDED, PORT, ip, machines

pytestmark = NEEDED
CLIPS = 12

# A worker that takes its time, and notes who began what; on the path of both machines.
WORKER = """
import os, time
from pathlib import Path
from tasks.workers import EncodeWorker

class SlowWorker(EncodeWorker):
    def encode(self, part, videos, output_dir):
        begun = Path(__file__).parent / "begun"
        (begun / f"{os.getpid()}-{part.name}").touch()
        time.sleep(3)
        return super().encode(part, videos, output_dir)
"""

# Runs on the head's machine, as the flow would.
DRIVER = """
import json, sys
from pathlib import Path
import tasks.workers
from slow_worker import SlowWorker
from flows.server import prefect_api
from tests.flows.test_encode import CONFIG
from prefect import flow
from tasks.encode import encode
from tasks.stage import Workspace
from wan_core.config import RayConfig
folder, videos, model, address = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
tasks.workers.EncodeWorker = SlowWorker

@flow
def encoded():
    ray = RayConfig(address, actors=2, cpus_per_actor=2.0)  # all cores of a machine each: Ray puts one on each
    return encode(Workspace(folder / "work", "t"), CONFIG, ray, videos, model)

with prefect_api(folder / "prefect"):
    record = encoded()
print("RESULT", json.dumps([record.num_clips, record.num_quarantined, len(record.parts)]))
"""


def test_a_lost_machine_costs_its_part_another_try_and_no_clip(tmp_path: Path, tiny_model: Path) -> None:
    videos = make_clips(tmp_path / "videos", [f"{number:02d}" for number in range(CLIPS)])
    begun = tmp_path / "begun"
    begun.mkdir()
    (tmp_path / "slow_worker.py").write_text(WORKER)
    with machines(2, tmp_path, subnet="10.213.8") as made:
        head, other = made
        # The server that an earlier test of this process had is not there.
        outer = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        environment = {
            **outer, "PYTHONPATH": f"{os.getcwd()}:{tmp_path}", "RAY_AUTH_MODE": "disabled",
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, "-c", DRIVER, *map(str, (tmp_path, videos, tiny_model, f"{head.address}:{PORT}"))]
        with (tmp_path / "driver.log").open("w") as log:
            driver = subprocess.Popen(head.command(*command), env=environment, stdout=log, stderr=log)

        def work() -> set[str]:
            """Parts that the other machine has begun."""
            there = set(ip("netns", "pids", other.name).split())
            return {name for pid, _, name in (path.name.partition("-") for path in begun.iterdir()) if pid in there}

        assert wait_until(lambda: work() or driver.poll() is not None)
        lost = work()
        other.kill()
        driver.wait(600)
        said = (tmp_path / "driver.log").read_text()
        assert lost and driver.returncode == 0, said[-3000:]
        result = next(line for line in said.splitlines() if line.startswith("RESULT "))
        parts = CLIPS // CONFIG.clips_per_part
        assert json.loads(result.removeprefix("RESULT ")) == [CLIPS, 0, parts]
        tries = [path.name.partition("-")[2] for path in begun.iterdir()]
        assert set(tries) >= lost and len(tries) > len(set(tries)), tries

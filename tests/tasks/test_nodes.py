"""torchrun over several machines: here network namespaces, with Ray nodes and gloo between them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.tasks.network import NEEDED, PORT, Machine, machines

pytestmark = NEEDED

# Sums over all ranks of all machines, `steps` times; the count survives in a file, as checkpoints do.
RANK = """
import os, sys, time
import torch, torch.distributed as dist
steps, pause, count = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo")
done = int(open(count).read()) if os.path.exists(count) else 0
ranks, interface = dist.get_world_size(), os.environ["GLOO_SOCKET_IFNAME"]
print("begins at", done, "with", ranks, "ranks, this one on", interface, flush=True)
while done < steps:
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == ranks
    done += 1
    if dist.get_rank() == 0:
        open(count + ".new", "w").write(str(done)); os.replace(count + ".new", count)
        print("step", done, flush=True)
    time.sleep(pause)
"""

# Runs on the head's machine, as the flow would, with retries as Prefect makes them; prints what became of each attempt.
DRIVER = """
import json, sys, time
from pathlib import Path
import ray
from tasks.errors import LaunchError
from tasks.launch import launch
from tasks.workers import ray_session
from wan_core.config import LaunchConfig, RayConfig
folder, address, attempts = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
with ray_session(RayConfig(address=address)):
    for number, (values, arguments) in enumerate(attempts):
        time.sleep(10 if number > 1 else 0)
        lines = []
        config = LaunchConfig(launcher="ray", stop_seconds=3, **values)
        try:
            launch(config, ["machine_rank", *arguments], folder / f"logs{number}", lines.append)
            result = {"ok": True}
        except LaunchError as error:
            result = {"ok": False, "error": str(error), "retry": error.retry}
        print("RESULT", json.dumps({**result, "lines": lines}), flush=True)
        if number > 0 and result["ok"]:
            break
"""


def drive(machine: Machine, folder: Path, attempts: list[Any]) -> subprocess.Popen[str]:
    (folder / "machine_rank.py").write_text(RANK)
    environment = {
        **os.environ, "PYTHONPATH": f"{os.getcwd()}:{folder}", "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", DRIVER, str(folder), f"{machine.address}:{PORT}", json.dumps(attempts)]
    return subprocess.Popen(
        machine.command(*command), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def results(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    said = process.communicate(timeout=900)[0]
    found = [json.loads(line.removeprefix("RESULT ")) for line in said.splitlines() if line.startswith("RESULT ")]
    assert found and process.returncode == 0, said[-3000:]
    return found


def test_machines_train_together_and_a_lost_one_is_replaced_or_done_without(tmp_path: Path) -> None:
    count = str(tmp_path / "count")
    with machines(3, tmp_path) as made:
        three = {"nodes": 3, "processes_per_node": 2, "placement_seconds": 120}
        (done,) = results(drive(made[0], tmp_path, [(three, ["3", "0", count])]))
        assert done["ok"], done
        assert "begins at 0 with 6 ranks, this one on eth0" in done["lines"]
        assert [line for line in done["lines"] if line.startswith("step")] == ["step 1", "step 2", "step 3"]

        fewer = {**three, "min_nodes": 2, "placement_seconds": 5}
        driver = drive(made[0], tmp_path, [(three, ["100000", "0.1", count]), *[(fewer, ["400", "0", count])] * 4])
        first = int(Path(count).read_text())
        while int(Path(count).read_text()) < first + 5 and driver.poll() is None:
            time.sleep(0.2)
        made[2].kill()
        *failed, after = results(driver)
        assert failed and all(attempt["retry"] for attempt in failed), failed
        assert after["ok"], after
        begun = next(line for line in after["lines"] if line.startswith("begins"))
        assert "with 4 ranks" in begun and int(begun.split()[2]) >= first + 5

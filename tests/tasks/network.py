"""Machines for tests: network namespaces on one bridge, each with a Ray node. Needs root and iproute2."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tasks.process import Process
from tests.processes import start_ray

PORT = 6379
NEEDED = [  # marks of the tests that use this
    pytest.mark.slow,
    pytest.mark.skipif(
        (os.geteuid() != 0 or not shutil.which("ip")) and "CI" not in os.environ,
        reason="network namespaces need root and iproute2",
    ),
]


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@dataclass
class Machine:
    """A namespace with one address, and the Ray node in it."""

    name: str
    address: str
    log: Path
    ray: Process | None = None

    def command(self, *arguments: str) -> list[str]:
        return ["ip", "netns", "exec", self.name, *arguments]

    def start_ray(self, *arguments: str) -> None:
        path = f"{os.getcwd()}:{self.log.parent}"  # of all that Ray starts there: this project, the test's own modules
        own = ["--num-cpus=2", f"--node-ip-address={self.address}", *arguments]
        self.ray = start_ray(own, {"PYTHONPATH": path}, self.log, self.command())

    def kill(self) -> None:
        """The machine loses power: every process in it, at once."""
        for pid in ip("netns", "pids", self.name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


@contextlib.contextmanager
def machines(count: int, folder: Path, subnet: str = "10.213.7") -> Iterator[list[Machine]]:
    """That many machines on one bridge; the first is Ray's head."""
    assert os.geteuid() == 0 and shutil.which("ip"), "network namespaces need root and iproute2"
    tag = f"w{os.getpid() % 10000}"
    made = [Machine(f"{tag}n{i}", f"{subnet}.{i + 1}", folder / f"node{i}.log") for i in range(count)]
    ip("link", "add", f"{tag}br", "type", "bridge")
    ip("link", "set", f"{tag}br", "up")
    try:
        for i, machine in enumerate(made):
            ip("netns", "add", machine.name)
            ip("link", "add", f"{tag}v{i}", "type", "veth", "peer", "name", "eth0", "netns", machine.name)
            ip("link", "set", f"{tag}v{i}", "master", f"{tag}br", "up")
            ip("-n", machine.name, "addr", "add", f"{machine.address}/24", "dev", "eth0")
            ip("-n", machine.name, "link", "set", "lo", "up")
            ip("-n", machine.name, "link", "set", "eth0", "up")
        made[0].start_ray("--head", f"--port={PORT}", "--include-dashboard=false")
        for machine in made[1:]:
            machine.start_ray(f"--address={made[0].address}:{PORT}")
        yield made
    finally:
        for machine in made:
            if machine.ray is not None:
                machine.ray.stop()
            with contextlib.suppress(subprocess.CalledProcessError):  # what Ray left, and a namespace never made
                machine.kill()
                ip("netns", "del", machine.name)
        ip("link", "del", f"{tag}br")

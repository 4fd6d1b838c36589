"""Where a torchrun lives: in this process's care, or in that of a Ray actor on another node."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from tasks.errors import LaunchError
from tasks.process import Process
from wan_core.config import LaunchConfig

SIOCGIFADDR = 0x8915
KILL_SECONDS = 5.0  # that a node's `stop` may take beyond the time that it grants
AGENT_SECONDS = 60.0  # for a new process on a node that is there
FEWER_SECONDS = 20.0  # to find fewer nodes than asked for, once that has failed


class Node(Protocol):
    def wait(self, seconds: float) -> int | None:
        """Exit status, or None if it still runs after `seconds`."""

    def lines(self) -> list[str]:
        """What it said since the last call."""

    def tail(self) -> list[str]:
        """The last lines that it said."""

    def stop(self, seconds: float) -> None:
        """End it, and everything that it started; what does not end by itself within `seconds` is killed."""


class LocalNode:
    """A command on this machine."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.process = Process(command, environment, log)

    def wait(self, seconds: float) -> int | None:
        return self.process.wait(seconds)

    def lines(self) -> list[str]:
        return self.process.lines()

    def tail(self) -> list[str]:
        return list(self.process.tail)

    def stop(self, seconds: float) -> None:
        self.process.stop(seconds)


def interface_of(address: str) -> str:
    """Name of this machine's network interface that has an IPv4 address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    raise LaunchError(f"no network interface of {socket.gethostname()} has the address {address}", retry=False)


class Agent:
    """The Ray actor of one node: it starts the command and watches it. If it is killed, the command dies with it."""

    def __init__(self) -> None:
        self.node: LocalNode | None = None

    def endpoint(self) -> tuple[str, int]:
        """This node's address and a free port on it."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), int(probe.getsockname()[1])

    def start(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        import ray

        # gloo takes the interface that the host name resolves to, which is often the loopback one.
        if "GLOO_SOCKET_IFNAME" not in os.environ:
            environment = {**environment, "GLOO_SOCKET_IFNAME": interface_of(ray.util.get_node_ip_address())}
        self.node = LocalNode(command, environment, log)

    def report(self, seconds: float) -> tuple[int | None, list[str], list[str]]:
        """Status, new lines, and the last lines once it has ended."""
        assert self.node is not None, "report() before start()"
        status = self.node.wait(seconds)
        return status, self.node.lines(), [] if status is None else self.node.tail()

    def stop(self, seconds: float) -> None:
        if self.node is not None:
            self.node.stop(seconds)


class RayNode:
    """An `Agent` on another node, seen from here."""

    def __init__(self, number: int, agent: Any, ended: Callable[[int], None]) -> None:
        self.number, self.agent, self.ended = number, agent, ended
        self._lines: list[str] = []
        self._tail: list[str] = []

    def wait(self, seconds: float) -> int | None:
        import ray

        try:
            status, lines, tail = ray.get(self.agent.report.remote(seconds))
        except ray.exceptions.RayActorError as error:
            raise LaunchError(f"node {self.number} was lost: {type(error).__name__}", retry=True) from error
        self._lines += lines
        self._tail = tail
        return status

    def lines(self) -> list[str]:
        lines, self._lines = self._lines, []
        return lines

    def tail(self) -> list[str]:
        return self._tail

    def stop(self, seconds: float) -> None:
        import ray

        ray.wait([self.agent.stop.remote(seconds)], timeout=seconds + KILL_SECONDS)
        ray.kill(self.agent)
        self.ended(self.number)


def place(config: LaunchConfig) -> Any:
    """A placement group with a bundle on each of `config.nodes` machines, or of as many as there are.

    Raises:
        LaunchError: the cluster has not even `config.min_nodes`.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    bundle = {"CPU": 1.0, **({"GPU": float(config.gpus_per_node)} if config.gpus_per_node else {})}
    seconds = config.placement_seconds
    for nodes in range(config.nodes, (config.min_nodes or config.nodes) - 1, -1):
        group = placement_group([bundle] * nodes, strategy="STRICT_SPREAD")
        if group.wait(seconds):
            return group
        remove_placement_group(group)
        seconds = min(seconds, FEWER_SECONDS)
    have = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    raise LaunchError(f"no {nodes} separate Ray nodes with {bundle} each; the cluster has {have}", retry=True)


def ray_nodes(
    config: LaunchConfig,
    command: Callable[[Sequence[str], int, int], list[str]],
    environment: dict[str, str],
    log_dir: Path,
) -> list[Node]:
    """Start `command(addresses of the nodes, node, a free port of the first)` on nodes of the connected Ray.

    Raises:
        LaunchError: the cluster has too few nodes, or lost one.
    """
    import ray
    from ray.util.placement_group import remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = place(config)
    count = group.bundle_count
    # The bundle holds the whole machine's GPUs, and so does the agent: CUDA_VISIBLE_DEVICES reaches torchrun from it.
    remote = ray.remote(num_cpus=1, num_gpus=config.gpus_per_node, max_restarts=0, max_concurrency=3)(Agent)
    places = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i) for i in range(count)]
    agents = [remote.options(scheduling_strategy=place).remote() for place in places]
    running, lock = set(range(count)), threading.Lock()

    def ended(number: int) -> None:
        with lock:
            running.discard(number)
            if not running:  # an agent dies with its group, so the last one out removes it
                remove_placement_group(group)

    nodes: list[Node] = [RayNode(i, agent, ended) for i, agent in enumerate(agents)]
    try:
        # Ray notices a lost node after 15 s and more, and until then places agents on it, which never answer.
        endpoints = ray.get([agent.endpoint.remote() for agent in agents], timeout=AGENT_SECONDS)
        addresses, port = [address for address, _ in endpoints], endpoints[0][1]
        logs = [log_dir / f"node{i}" / "torchrun.log" for i in range(count)]
        started = [
            agent.start.remote(command(addresses, i, port), environment, logs[i]) for i, agent in enumerate(agents)
        ]
        ray.get(started, timeout=AGENT_SECONDS)
    except BaseException as error:
        for node in nodes:
            node.stop(0)
        if isinstance(error, (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError)):
            raise LaunchError(f"a node did not start: {type(error).__name__}", retry=True) from error
        raise
    return nodes

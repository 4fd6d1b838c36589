"""Where a torchrun lives: in this process's care, or in that of a Ray actor on another node."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from tasks.errors import LaunchError
from tasks.process import Process
from wan_core.config import LaunchConfig

PLACEMENT_SECONDS = 300.0  # to find the nodes; an autoscaling cluster may have to start them


class Node(Protocol):
    def wait(self, seconds: float) -> int | None:
        """Exit status, or None if it still runs after `seconds`."""

    def lines(self) -> list[str]:
        """What it said since the last call."""

    def tail(self) -> list[str]:
        """The last lines that it said."""

    def stop(self) -> None:
        """End it, and everything that it started."""


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

    def stop(self) -> None:
        self.process.stop()


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
        self.node = LocalNode(command, environment, log)

    def report(self, seconds: float) -> tuple[int | None, list[str], list[str]]:
        """Status, new lines, and the last lines once it has ended."""
        assert self.node is not None, "report() before start()"
        status = self.node.wait(seconds)
        return status, self.node.lines(), [] if status is None else self.node.tail()

    def stop(self) -> None:
        if self.node is not None:
            self.node.stop()


class RayNode:
    """An `Agent` on another node, seen from here."""

    def __init__(self, number: int, agent: Any, release: Callable[[], None]) -> None:
        self.number, self.agent, self.release = number, agent, release
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

    def stop(self) -> None:
        import ray

        ray.wait([self.agent.stop.remote()], timeout=20)
        ray.kill(self.agent)
        self.release()


def ray_nodes(
    config: LaunchConfig, command: Callable[[int, str, int], list[str]], environment: dict[str, str], log_dir: Path
) -> list[Node]:
    """Start `command(node, master host, master port)` on `config.nodes` different nodes of the connected Ray.

    Raises:
        LaunchError: the cluster has no such nodes.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    bundle = {"CPU": 1.0, **({"GPU": float(config.gpus_per_node)} if config.gpus_per_node else {})}
    group = placement_group([bundle] * config.nodes, strategy="STRICT_SPREAD")
    if not group.wait(PLACEMENT_SECONDS):
        remove_placement_group(group)
        have = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        raise LaunchError(
            f"no {config.nodes} separate Ray nodes with {bundle} each; the cluster has {have}", retry=True
        )
    remote = ray.remote(num_cpus=1, num_gpus=config.gpus_per_node, max_restarts=0, max_concurrency=3)(Agent)
    places = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=i) for i in range(config.nodes)]
    agents = [remote.options(scheduling_strategy=place).remote() for place in places]
    nodes: list[Node] = []
    for i, agent in enumerate(agents):
        last = i == config.nodes - 1
        nodes.append(RayNode(i, agent, (lambda: remove_placement_group(group)) if last else (lambda: None)))
    try:
        host, port = ray.get(agents[0].endpoint.remote())
        ray.get(
            [
                agent.start.remote(command(i, host, port), environment, log_dir / f"node{i}" / "torchrun.log")
                for i, agent in enumerate(agents)
            ]
        )
    except BaseException:
        for node in nodes:
            node.stop()
        raise
    return nodes

"""The only place that starts torchrun: on this machine, on the nodes of a Ray cluster, or under Slurm.

The first node that fails ends all of them, the error carries the last lines of the rank that failed first, and nothing
is left running, whatever ends the launch: success, failure, Ctrl-C or the death of this process.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

from tasks.errors import FULL, LaunchError
from tasks.nodes import LocalNode, Node, ray_nodes
from wan_core.config import LaunchConfig

POLL_SECONDS = 0.5
SIGNALLED = 128  # srun's status of a program that a signal killed is this plus the signal
SHOWN_LINES = 15  # of the failing rank, in the error
ROOT_CAUSE = re.compile(r"Root Cause.*?rank\s*:\s*(\d+) \(local_rank: \d+\).*?exitcode\s*:\s*(-?\d+)", re.DOTALL)
MARKED = r"^(?:\d+: )?"  # srun --label puts the task's number before a line
OTHER_RANK = re.compile(MARKED + r"\[rank[1-9]\d*\]:")
RANK_0 = re.compile(MARKED + r"\[rank0\]:")
EXCEPTION = re.compile(r"^(?:[\w]+\.)*(\w*(?:Error|Exception|Interrupt|Exit))\b(?:: (.*))?$")
INTERRUPTED = re.compile(
    r"interrupted, (saved at iteration \d+|nothing saved)"
)  # what a rank says that was asked to stop
# torchruns that did not meet: a port was taken meanwhile, a node came late or left.
NOT_MET = re.compile(r"\b(?:Rendezvous|DistNetwork|DistStore)\w*Error\b")
REFUSED = re.compile(r"wan_core\.train: (.+)")  # what it says of input that cannot make a run
# Exceptions of a rank that come back with the next attempt; others (a lost peer, a file system) may pass.
FINAL = {
    "ValueError", "TypeError", "AssertionError", "KeyError", "IndexError", "AttributeError", "ImportError",
    "ModuleNotFoundError", "NameError", "NotImplementedError", "FileNotFoundError", "FileExistsError", "SyntaxError",
    "PermissionError", "ValidationError", "ConfigKeyError", "SystemExit", "OutOfMemoryError",
}  # fmt: skip


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def rendezvous(attempt: str, host: str, port: int, is_host: object, address: str) -> list[str]:
    """Where the torchruns of an attempt meet (c10d): options of one of them.

    Args:
        is_host: 1 on `host`, 0 elsewhere. torchrun would look host names up, which takes minutes where they resolve to
            127.0.0.1.
        address: what the other nodes reach this one by.
    """
    meeting = ["--rdzv-backend", "c10d", "--rdzv-id", attempt, "--rdzv-endpoint", f"{host}:{port}"]
    return [*meeting, "--rdzv-conf", f"is_host={is_host}", "--local-addr", address]


def environment(config: LaunchConfig) -> dict[str, str]:
    """Environment of the ranks. Without GPUs they share the cores of their node."""
    common = {"PYTHONUNBUFFERED": "1", "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "[rank${rank}]:"}
    if config.gpus_per_node:
        return common
    cores = len(os.sched_getaffinity(0))
    # One core of each rank's is left to the process that loads its data: on two, a step of the demo takes 0.17 s in
    # one thread and 0.20 s in two.
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // config.processes_per_node - 1)))
    return {
        **common,
        "OMP_NUM_THREADS": threads,
        "TORCHDYNAMO_DISABLE": "1",  # compiling with inductor costs 20 s per process on CPU
        "CUDA_VISIBLE_DEVICES": "",
    }


# Becomes a rank, after asking the kernel for SIGKILL when torchrun dies (PR_SET_PDEATHSIG = 1): one that is told to end
# while it starts its ranks forgets the one that it is starting. Checkpoints are whole whenever a rank dies.
RANK = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGKILL); "
    "os.getppid() > 1 or sys.exit('torchrun has died'); os.execvp(sys.argv[1], sys.argv[1:])"
)


def torchrun(config: LaunchConfig, arguments: Sequence[str], log_dir: Path, meeting: Sequence[str]) -> list[str]:
    """The command for one node. Rank 0 speaks to the terminal; every rank has its files below `log_dir`.

    torchrun restarts nothing itself: it would try a config error again, and cannot replace a lost machine. An attempt
    ends everywhere, and the next one finds nodes anew, as many as there are.
    """
    return [
        sys.executable, "-m", "torch.distributed.run",
        "--nnodes", str(config.nodes), "--nproc-per-node", str(config.processes_per_node), "--max-restarts", "0",
        *meeting, "--log-dir", str(log_dir), "--redirects", "3", "--tee", "3", "--no-python",
        sys.executable, "-I", "-S", "-c", RANK, sys.executable, "-u", "-m", *arguments,
    ]  # fmt: skip


def _local(config: LaunchConfig, arguments: Sequence[str], log_dir: Path) -> list[Node]:
    meeting = rendezvous(uuid4().hex, "127.0.0.1", 0, 1, "127.0.0.1")
    command = torchrun(config, arguments, log_dir, meeting)
    return [LocalNode(command, environment(config), log_dir / "torchrun.log")]


FILLED_IN = (
    'set -- "${@//@node@/$SLURM_NODEID}"; set -- "${@//@name@/$SLURMD_NODENAME}"; '
    'exec "${@//@first@/$((SLURM_NODEID == 0))}"'
)


def _slurm(config: LaunchConfig, arguments: Sequence[str], log_dir: Path) -> list[Node]:
    """srun starts one torchrun per node of the allocation that this process runs in."""
    nodelist = os.environ.get("SLURM_JOB_NODELIST")
    if not nodelist:
        raise ValueError("launcher='slurm' runs inside an allocation, and there is none here; use salloc or sbatch")
    hosts = subprocess.run(
        ["scontrol", "show", "hostnames", nodelist], check=True, capture_output=True, text=True
    ).stdout.split()
    if len(hosts) < config.nodes:
        raise ValueError(f"launch.nodes={config.nodes} exceeds the allocation's {len(hosts)}; ask Slurm for more nodes")
    meeting = rendezvous(uuid4().hex, hosts[0], free_port(), "@first@", "@name@")
    srun = ["srun", "--nodes", str(config.nodes), "--ntasks", str(config.nodes), "--ntasks-per-node", "1"]
    srun += ["--kill-on-bad-exit=1", "--label", "--export=ALL"]
    if config.gpus_per_node:
        srun += ["--gpus-per-node", str(config.gpus_per_node)]
    # One command for all nodes: each fills in what is its own.
    own = ["bash", "-c", FILLED_IN, "node"]
    command = [*srun, *own, *torchrun(config, arguments, log_dir / "node@node@", meeting)]
    return [LocalNode(command, environment(config), log_dir / "torchrun.log")]


def _ray(config: LaunchConfig, arguments: Sequence[str], log_dir: Path) -> list[Node]:
    attempt = uuid4().hex

    def command(addresses: Sequence[str], node: int, port: int) -> list[str]:
        meeting = rendezvous(attempt, addresses[0], port, int(node == 0), addresses[node])
        return torchrun(replace(config, nodes=len(addresses)), arguments, log_dir / f"node{node}", meeting)

    return ray_nodes(config, command, environment(config), log_dir)


def failure(node: int, status: int, tail: Sequence[str], log_dir: Path) -> Exception:
    """What to raise for a node that ended badly.

    A `ValueError` of a rank stays one, because its sentence is meant for the user; an interrupted run says where it
    was saved. Everything else becomes a
    `LaunchError` with the last lines of the rank that torchrun names as the first to fail.
    """
    text = "\n".join(tail)
    if interrupted := INTERRUPTED.search(text):  # SIGTERM to a rank or to torchrun: the next attempt goes on from there
        return LaunchError(f"training was interrupted, {interrupted[1]}; logs in {log_dir}", retry=True)
    if refused := REFUSED.search(text):
        return ValueError(f"{refused[1]} (logs in {log_dir})")
    cause = ROOT_CAUSE.search(text)
    if cause is None:
        lines = [line for line in tail if line.strip()][-SHOWN_LINES:]
        shown = "\n".join(f"  | {line}" for line in lines)
        killed = status < 0 or status > SIGNALLED
        retry = killed or NOT_MET.search(text) is not None
        return LaunchError(f"torchrun on node {node} ended with {status}, see {log_dir}\n{shown}", retry=retry)
    rank, exitcode = (int(group) for group in cause.groups())
    if labelled := re.search(rf"^(\d+): \[rank{rank}\]:", text, re.MULTILINE):  # by srun, which is one for all nodes
        node = int(labelled[1])
    # --tee marks each line with the rank; torch marks tracebacks with it once more when the group is up.
    prefix = re.compile(rf"{MARKED}\[rank{rank}\]:(?:\[rank\d+\]: ?)?")
    own = [prefix.sub("", line) for line in tail if prefix.match(line) and prefix.sub("", line).strip()]
    # A killed rank raised nothing: what looks so was logged, and passed.
    raised = [match for match in map(EXCEPTION.match, own) if match] if exitcode > 0 else []
    name, sentence = (raised[-1][1], raised[-1][2] or "") if raised else ("", "")
    if name == "ValueError" and sentence:
        return ValueError(f"{sentence} (rank {rank} of the training, logs in {log_dir})")
    shown = "\n".join(f"  | {line}" for line in own[-SHOWN_LINES:])
    why = f"was killed by signal {-exitcode}" if exitcode < 0 else f"ended with exit code {exitcode}"
    may_pass = name not in FINAL and not any(os.strerror(number) in sentence for number in FULL)
    return LaunchError(f"rank {rank} on node {node} {why}; logs in {log_dir}\n{shown}", retry=may_pass)


def launch(
    config: LaunchConfig,
    arguments: Sequence[str],
    log_dir: Path,
    on_line: Callable[[str], None] = lambda line: None,
    on_tick: Callable[[], None] = lambda: None,
) -> None:
    """Run `python -m arguments...` under torchrun and wait for it.

    Args:
        config: which launcher, how many nodes, processes and GPUs.
        arguments: module name and its arguments.
        log_dir: gets torchrun's log and, per rank, its stdout and stderr; on several nodes a shared folder.
        on_line: called with every line of rank 0 and of the first node's torchrun.
        on_tick: called about every half second.

    Raises:
        ValueError: a rank refused its input.
        LaunchError: a rank or a node failed otherwise.
    """
    start = {"local": _local, "slurm": _slurm, "ray": _ray}[config.launcher]
    running = dict(enumerate(start(config, arguments, log_dir)))
    everyone = list(running.values())
    try:
        while running:
            for number, node in list(running.items()):
                status = node.wait(POLL_SECONDS / len(running))
                for line in node.lines():  # rank 0 may be on any node
                    if RANK_0.match(line) or (number == 0 and not OTHER_RANK.match(line)):
                        on_line(RANK_0.sub("", line))
                if status is None:
                    continue
                del running[number]
                if status != 0:
                    raise failure(number, status, node.tail(), log_dir)
            on_tick()
        on_tick()
    finally:
        with ThreadPoolExecutor(len(everyone)) as pool:  # side by side: each may take all of its seconds
            list(pool.map(lambda node: node.stop(config.stop_seconds), everyone))

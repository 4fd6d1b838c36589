"""Trainings that are killed, stopped, starved of disk or fed with nonsense: real processes, one import of Megatron.

    python -m tests.resume.trainer OUT_DIR SCENARIO...

Forks two scenarios at a time, and the ranks of every attempt, from one process that has imported everything. Results
lie below OUT_DIR/<scenario>/: the run folder as a user's would, `log<attempt>.txt` with what the ranks said,
`codes.json` with their exit codes, and `taken.jsonl` with what each rank read in each step. This module stays light:
checkpoint writers import it anew.
"""

from __future__ import annotations

import gc
import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

SETTINGS: dict[str, dict[str, Any]] = {
    "train": {"train_iters": 9, "global_batch_size": 4},
    "optimizer": {"lr": 1.0e-3, "weight_decay": 0.01, "ema_decay": 0.9},
    "scheduler": {"lr_decay_style": "cosine", "lr_warmup_iters": 2},
    "dataset": {"tokens_per_pack": 40, "packing_buffer_size": 12, "num_workers": 1},
    "checkpoint": {"save_interval": 3},
    "validation": {"eval_interval": 0, "max_samples": 6, "sigmas": [0.2, 0.8]},
    "logger": {"log_interval": 1},
    "ddp": {"overlap_grad_reduce": True, "bucket_size": 8000},  # several buckets, as large models have them
}


FULL_BYTES = 60_000  # a checkpoint's tensors take more


@dataclass(frozen=True)
class Attempt:
    """One start of the training."""

    ranks: int = 1
    overrides: tuple[str, ...] = ()
    signal: int = signal.SIGKILL
    until: Callable[[Path], bool] = lambda run: False  # looked at all the time; then every rank gets the signal
    poison: Mapping[int, float] = field(default_factory=dict)  # what a step's velocity is multiplied by
    at_readers: bool = False  # the signal goes to the processes that read data instead
    model: str = "model"
    full_disk: bool = False  # instead of the signal, what a full disk does: writes fail half-way


def logged(iteration: int) -> Callable[[Path], bool]:
    """Once this iteration is over."""
    text = f'"iteration": {iteration},'
    return lambda run: (run / "metrics.jsonl").is_file() and text in (run / "metrics.jsonl").read_text()


def saving(iteration: int) -> Callable[[Path], bool]:
    """While this checkpoint is half-written."""
    return lambda run: (run / f"checkpoints/iter_{iteration:07d}").is_dir()


def data_written(iteration: int) -> Callable[[Path], bool]:
    """When this checkpoint's tensors lie there, but Bridge has not finished."""
    return lambda run: (run / f"checkpoints/iter_{iteration:07d}/.metadata").is_file()


VALIDATED = ("validation.eval_interval=3",)
SPIKES = ("stability.spike_factor=10", "stability.history=8")
ASYNC = ("checkpoint.async_save=true",)
POISON = {2: math.nan, 5: 100.0, 6: 1e4}
BACK = (*SPIKES, "stability.on_bad_steps=rollback", "stability.max_bad_steps=2")
SCENARIOS: dict[str, tuple[Attempt, ...]] = {
    "whole": (Attempt(overrides=VALIDATED),),
    "killed": (
        Attempt(until=logged(2)),  # before anything is saved
        Attempt(until=logged(5)),
        Attempt(until=saving(6)),
        Attempt(until=data_written(6), overrides=VALIDATED),
        Attempt(overrides=VALIDATED),
    ),
    "ranks": (
        Attempt(ranks=2, overrides=VALIDATED, signal=signal.SIGTERM, until=logged(4)),
        Attempt(),
    ),
    "poisoned": (Attempt(poison=POISON, overrides=BACK),),
    "sharded": (
        Attempt(ranks=2, poison=POISON, overrides=(*BACK, "dist.use_megatron_fsdp=true"), until=logged(8)),
        Attempt(ranks=2, overrides=(*BACK, "dist.use_megatron_fsdp=true")),
    ),
    "stopped": (
        Attempt(poison={4: 1e4}, overrides=(*SPIKES, "stability.on_bad_steps=stop")),
        Attempt(model="wide"),
    ),
    "full": (
        Attempt(until=logged(4), full_disk=True),
        Attempt(overrides=("checkpoint.keep_last=2", "checkpoint.keep_every=3")),
    ),
    "async": (
        Attempt(overrides=ASYNC, until=saving(6)),
        Attempt(overrides=ASYNC, until=logged(8)),
        Attempt(overrides=(*ASYNC, *VALIDATED)),
    ),
    "async-stopped": (
        Attempt(overrides=ASYNC, signal=signal.SIGTERM, until=saving(3)),
        Attempt(overrides=(*ASYNC, *VALIDATED)),
    ),
    "worker": (Attempt(until=logged(4), at_readers=True), Attempt()),
}


def run_scenario(out: Path, name: str) -> None:
    codes = []
    for number in range(len(SCENARIOS[name])):
        codes.append(attempt(name, number, out))
        (out / name / "codes.json").write_text(json.dumps(codes))


def attempt(name: str, number: int, out: Path) -> list[int]:
    """Start the ranks, send the signal when its time has come, and wait: exit codes, -9 for a kill."""
    plan, run, since = SCENARIOS[name][number], out / name / "run", time.monotonic()
    run.mkdir(parents=True, exist_ok=True)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    pids = [start_rank(name, number, rank, out) for rank in range(plan.ranks)]
    codes: dict[int, int] = {}
    sent = False
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(ended[1])
        left = [pid for pid in pids if pid not in codes]
        if not sent and plan.until(run):
            sent = True
            for pid in left:
                if plan.full_disk:
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, (FULL_BYTES, FULL_BYTES))
                else:
                    group = [pid, *children(pid)] if plan.signal == signal.SIGTERM else [pid]  # as torchrun does
                    for target in children(pid) if plan.at_readers else group:
                        os.kill(target, plan.signal)
        if any(codes.values()) and left and not sent:  # as torchrun does
            time.sleep(1)
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)
    print(f"{name} {number}: {list(codes.values())} after {time.monotonic() - since:.1f} s", flush=True)
    return [codes[pid] for pid in pids]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_rank(name: str, number: int, rank: int, out: Path) -> int:
    """A fork of this process, which has imported everything; with a GPU, which forks cannot use, a new one."""
    import torch

    if torch.cuda.is_available():
        command = [sys.executable, "-m", "tests.resume.trainer", str(out), "--rank", name, str(number), str(rank)]
        return subprocess.Popen(command).pid
    if (pid := os.fork()) == 0:
        work(name, number, rank, out)
    return pid


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def work(name: str, number: int, rank: int, out: Path) -> None:
    """One rank, as `python -m wan_core.train` under torchrun; does not return."""
    plan, folder = SCENARIOS[name][number], out / name
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(plan.ranks))
    log = os.open(folder / f"log{number}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # else the kernel kills who exceeds a file's limit
    import torch

    from tests.resume import observed
    from wan_core import train

    torch.set_num_threads(1)  # makes a fork's thread pool anew; autograd's threads, two at once, may find none
    observed.install(folder / "taken.jsonl", number, plan.poison)
    sys.argv = [
        "wan_core.train", "--recipe", "wan_demo", "--model", str(out / plan.model), "--run-dir", str(folder / "run"),
        "--config-file", str(out / "settings.yaml"), f"dataset.path={out / 'data' / 'index'}", *plan.overrides,
    ]  # fmt: skip
    code = 1
    try:
        train.main()
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    out, *names = Path(sys.argv[1]), *sys.argv[2:]
    if names[0] == "--rank":
        work(names[1], int(names[2]), int(names[3]), out)
    import torch

    torch.set_num_threads(1)
    from tests.resume import observed

    observed.write_inputs(out)
    gc.freeze()  # else each fork's first collection walks through, and copies, all that was imported
    with ProcessPoolExecutor(2, get_context("fork")) as pool:
        list(pool.map(partial(run_scenario, out), names))


if __name__ == "__main__":
    main()

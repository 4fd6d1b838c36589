"""Ray actors that hold the encoders. Loaded by Ray's worker processes, so this module imports no Prefect."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan_core.config import EncodeConfig, RayConfig
from wan_core.data.folder import Location
from wan_core.records import PartRecord

if TYPE_CHECKING:
    from wan_core.encode.part import Part

POLL_SECONDS = 1.0
START_ATTEMPTS = 3
START_ERRORS = ("timed out during startup", "Failed to connect to GCS")  # what Ray says on a loaded machine
NODE_SECONDS = 300.0  # for a cluster to start a machine that holds a worker, as launch.placement_seconds
RESTART_SECONDS = 300.0  # for Ray to start a lost worker again, on a loaded machine
READY_RETRIES = 3  # of a worker that dies while it loads its encoders
OBJECT_STORE_BYTES = 128 << 20  # actors write straight to disk; what travels through Ray is small


class WorkersLostError(RuntimeError):
    """No worker is left: none could load its encoders."""


class EncodeWorker:
    """One VAE and one text encoder, loaded once. A second thread answers `progress()` while `encode` works."""

    def __init__(self, config: EncodeConfig, model: Path, device: str) -> None:
        from wan_core.encode.part import load_encoders

        self.config, self.done = config, 0
        self.encoders = load_encoders(config, model, device)

    def ready(self) -> None:
        """Answers once the encoders are loaded."""

    def encode(self, part: Part, videos: Location, output_dir: Path) -> PartRecord:
        import torch

        from wan_core.encode.part import encode_part

        self.done = 0
        try:
            return encode_part(self.config, part, videos, output_dir, self.encoders, progress=self._count)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            raise
        except torch.AcceleratorError as error:  # the GPU's context is lost, and with it this process
            print(f"ending this worker: {error}", flush=True)
            os._exit(1)

    def progress(self) -> int:
        """Clips of the current part that are done."""
        return self.done

    def _count(self, done: int) -> None:
        self.done = done


class Closed(RuntimeError):
    """The pool was closed while a part waited or worked: its run is ending, so nothing is tried again."""


def check_some_node_suffices(config: RayConfig) -> None:
    """Raise `ValueError` if no node has one worker's share: Ray would wait for ever. Where some fit, they do the work.

    A cluster may start machines for workers that wait, and Ray does not say whether it does, so it has `NODE_SECONDS`.
    """
    import ray

    end = time.monotonic() + (NODE_SECONDS if config.address else 0)
    while True:
        found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        nodes = [(has.get("GPU", 0.0), has.get("CPU", 0.0)) for has in found]
        if any(gpus >= config.gpus_per_actor and cpus >= config.cpus_per_actor for gpus, cpus in nodes):
            return
        if time.monotonic() >= end:
            break
        time.sleep(POLL_SECONDS)
    gpus, cpus = max(nodes, default=(0.0, 0.0))
    raise ValueError(
        f"ray.gpus_per_actor={config.gpus_per_actor:g} and ray.cpus_per_actor={config.cpus_per_actor:g} are more than "
        f"any node of {config.address or 'this machine'} has (at most {gpus:g} GPUs and {cpus:g} CPUs); lower them "
        "(ray.gpus_per_actor=0 encodes on CPUs), or give the ray.address of a cluster that has them"
    )


class EncodePool:
    """Workers to borrow, one part at a time. Must be used inside `ray_session`.

    A worker is lent once it has loaded its encoders, so what ends it after that is the part's doing or the machine's.
    """

    def __init__(self, config: EncodeConfig, ray_config: RayConfig, model: Path) -> None:
        import ray

        # A dead actor is replaced by Ray, but the call that it lost raises here: that retry is Prefect's.
        remote = ray.remote(
            num_cpus=ray_config.cpus_per_actor, num_gpus=ray_config.gpus_per_actor,
            max_restarts=-1, max_task_retries=0, max_concurrency=2,
        )(EncodeWorker)  # fmt: skip
        device = "cuda" if ray_config.gpus_per_actor else "cpu"
        self._closed = threading.Event()
        self._free: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._num_left, self._lock = ray_config.actors, threading.Lock()
        workers = [remote.remote(config, model, device) for _ in range(ray_config.actors)]
        check_some_node_suffices(ray_config)  # after a cluster knows what is asked of it
        for worker in workers:
            self._admit(worker)

    def _admit(self, worker: Any) -> None:
        """Lend a worker as soon as it is ready, which may be after Ray has started it on another node."""

        def ready() -> None:
            import ray

            end = time.monotonic() + RESTART_SECONDS
            while True:
                try:
                    ray.get(worker.ready.options(max_task_retries=READY_RETRIES).remote())
                    return
                except ray.exceptions.ActorUnavailableError:  # Ray is starting it again, and gives up on us first
                    if time.monotonic() > end:
                        raise
                    time.sleep(POLL_SECONDS)

        def wait() -> None:
            try:
                ready()
                self._free.put(worker)
            except Exception as error:  # raised again by whoever wants a worker, once none is left
                with self._lock:
                    self._num_left -= 1
                    if self._num_left == 0:
                        self._free.put(error)

        threading.Thread(target=wait, daemon=True).start()

    def close(self) -> None:
        """Let every thread that waits for a worker, or for its answer, end within about a second."""
        self._closed.set()

    @contextlib.contextmanager
    def _borrow(self) -> Iterator[Any]:
        from ray.exceptions import RayActorError

        worker = self._free.get()
        if isinstance(worker, Exception):
            self._free.put(worker)  # for the next who asks
            raise WorkersLostError(f"no worker could load its encoders: {worker}") from worker
        try:
            yield worker
        except RayActorError:
            self._admit(worker)
            raise
        except BaseException:
            self._free.put(worker)
            raise
        self._free.put(worker)

    def encode(self, part: Part, videos: Location, output_dir: Path, progress: Callable[[int], None]) -> PartRecord:
        """Encode a part on the next free worker.

        Args:
            progress: called about every second with the number of clips of this part that are done.

        Raises:
            RayActorError: the worker died; Ray starts another in its place.
            Closed: `close` was called.
            WorkersLostError: no worker is left.
        """
        import ray

        with self._borrow() as worker:
            try:
                self._check_open()
                result = worker.encode.remote(part, videos, output_dir)
                while not ray.wait([result], timeout=POLL_SECONDS)[0]:
                    self._check_open()
                    answer = worker.progress.remote()
                    if ray.wait([answer], timeout=POLL_SECONDS)[0] and not ray.wait([result], timeout=0)[0]:
                        progress(ray.get(answer))
                return ray.get(result)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None  # what the stage raised, without Ray's wrapping
            except ray.exceptions.RayError:
                self._check_open()  # Ray was shut down under us
                raise

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise Closed("the run is ending")


def start_local(num_cpus: int, options: dict[str, Any]) -> None:
    """Start a Ray on this machine, whatever other Ray runs on it.

    Raises:
        TimeoutError: it did not start in time, again and again; later it may.
    """
    import ray

    for attempt in range(1, START_ATTEMPTS + 1):
        before = children()
        try:
            ray.init(  # without "local" Ray joins any cluster that it finds here
                address="local", num_cpus=num_cpus, include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES, **options,
            )  # fmt: skip
            return
        except Exception as error:  # Ray gives its node 30 s, not to be changed, which a loaded machine exceeds
            if not any(text in str(error) for text in START_ERRORS):
                raise
            ray.shutdown()  # what it takes for connected
            for pid in children() - before:  # and it forgets what it has started by then
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if attempt == START_ATTEMPTS:
                raise TimeoutError(
                    f"Ray did not start on this machine in {attempt} attempts of 30 s: it is too busy; run less beside "
                    "it, or give the ray.address of a cluster"
                ) from error


def children() -> set[int]:
    """Processes that this one has started and that have not been waited for."""
    return {int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


@contextlib.contextmanager
def ray_session(config: RayConfig) -> Iterator[None]:
    """Connect to `config.address`, or start a Ray of this process's own; leave as found."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # its future default; silences a warning
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # a call after the end would start another Ray
    import ray

    if ray.is_initialized():  # by the caller, for example a test with several nodes
        yield
        return
    on_sigterm = signal.getsignal(signal.SIGTERM)
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if config.address is None:
        start_local(max(os.cpu_count() or 1, round(config.actors * config.cpus_per_actor + 0.5)), quiet)
    else:
        ray.init(address=config.address, **quiet)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # ray.init puts a bare sys.exit in its place
    try:
        yield
    finally:
        ray.shutdown()

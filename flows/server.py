"""The Prefect API that a run speaks to: the one that PREFECT_API_URL names, or one of this command's own.

Without any API every process of a run would start a temporary server on the same SQLite file. One server process per
command, on the workspace's own PREFECT_HOME, avoids that; `wan ui` shows its runs later.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from tasks.process import Process

START_SECONDS = 120.0
DRAIN_SECONDS = 10.0
PORTS = range(20000, 30000)
QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",  # a run without an API fails clearly
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # the command says itself what failed
    "PREFECT_LOGGING_EXTRA_LOGGERS": "wan_core",
    "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    "PREFECT_CLI_PROMPT": "false",
}
# What only deployments and automations need; a server that lives for one command starts faster without.
UNNEEDED_SERVICES = ("SCHEDULER", "LATE_RUNS", "PAUSE_EXPIRATIONS", "CANCELLATION_CLEANUP", "FOREMAN", "TRIGGERS")


def home(workspace: Path) -> Path:
    """PREFECT_HOME of a workspace: the one of the environment, if it names one."""
    return Path(os.environ.get("PREFECT_HOME", workspace / ".prefect")).absolute()


def configure(workspace: Path) -> None:
    """Set Prefect's and Ray's environment for this process and its children. Call it before anything imports them."""
    os.environ["PREFECT_HOME"] = str(home(workspace))
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


class Server:
    """A Prefect API process on a port of this machine, in a session of its own: Ctrl-C stops it last, not first."""

    def __init__(self, workspace: Path) -> None:
        self.log = workspace / "logs" / "prefect-server.log"
        port = random.choice(PORTS)
        self.url = f"http://127.0.0.1:{port}"
        services = {f"PREFECT_SERVER_SERVICES_{name}_ENABLED": "false" for name in UNNEEDED_SERVICES}
        environment = {**services, "PREFECT_SERVER_API_PORT": str(port), "PREFECT_UI_API_URL": "/api"}
        command = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
        command += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "error", "--lifespan", "on"]
        self.process = Process(command, environment, self.log)

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/api/health", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return False

    def wait(self) -> None:
        """Return when the server answers.

        Raises:
            RuntimeError: it ended or did not answer in time.
        """
        end = time.monotonic() + START_SECONDS
        while not self.healthy():
            status = self.process.wait(0.1)
            if status is not None or time.monotonic() > end:
                self.stop()
                said = "\n".join(list(self.process.tail)[-10:])
                raise RuntimeError(
                    f"Prefect's server did not start (status {status}); its log {self.log} ends:\n{said}"
                )

    def stop(self) -> None:
        self.process.stop()


@contextlib.contextmanager
def prefect_api(workspace: Path, meanwhile: Callable[[], object] = lambda: None) -> Iterator[str]:
    """The API's URL, for as long as the block lasts.

    Args:
        meanwhile: called while the server starts, which takes 5 to 20 s: the place for imports. A Prefect
            that was imported before keeps its logging.
    """
    configure(workspace)
    given = os.environ.get("PREFECT_API_URL")
    if given:
        meanwhile()
        yield given
        return
    imported = "prefect" in sys.modules
    server = Server(workspace)
    url = f"{server.url}/api"
    try:
        os.environ["PREFECT_API_URL"] = url
        meanwhile()
        server.wait()
        if imported:
            _reread_settings()
        yield url
    finally:
        if "prefect" in sys.modules:
            _drain()
        server.stop()
        del os.environ["PREFECT_API_URL"]
        if imported:
            _reread_settings()


def _reread_settings() -> None:
    """Prefect reads the environment when it is imported; here it does so again."""
    from prefect.context import refresh_global_settings_context

    refresh_global_settings_context()


def _drain() -> None:
    """Send queued logs and events now: at exit Prefect would try for over a minute to reach the stopped server."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    EventsWorker.drain_all(timeout=DRAIN_SECONDS)
    APILogWorker.drain_all(timeout=DRAIN_SECONDS)

"""What is shown beside the work, while Prefect's server does not answer."""

from __future__ import annotations

import os
import re
import signal
from uuid import uuid4

import httpx
import psutil
import pytest
from prefect import flow
from prefect.artifacts import update_progress_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from tasks.aside import shown_if_possible
from tasks.progress import Progress


def server() -> int:
    """Process id of the fixture's server."""
    (found,) = [
        child.pid for child in psutil.Process().children(recursive=True) if "uvicorn" in " ".join(child.cmdline())
    ]
    return found


@pytest.mark.usefixtures("prefect_api")
def test_progress_waits_for_no_server() -> None:
    """A server that is stopped never answers: if a report waited for it, this test would not end well."""

    @flow
    def work() -> None:
        progress = Progress("stopped", 10, "things")
        os.kill(server(), signal.SIGSTOP)
        try:
            for done in range(10):
                progress.updated = 0.0  # as if the time of the next update had come
                progress.report(done)
        finally:
            os.kill(server(), signal.SIGCONT)
        progress.report(10)

    work()
    key = ArtifactFilter(key=ArtifactFilterKey(any_=["stopped-progress"]))
    with get_client(sync_client=True) as client:
        (artifact,) = client.read_artifacts(artifact_filter=key)
    assert artifact.data == 100 and artifact.flow_run_id is not None
    assert artifact.description is not None and artifact.description.startswith("10 of 10 things")


@pytest.mark.usefixtures("prefect_api")
def test_what_cannot_be_shown_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    @shown_if_possible("the page")
    def page() -> None:
        httpx.post("http://127.0.0.1:9/api/artifacts/")  # nobody listens there

    @shown_if_possible("the bar")
    def bar() -> None:
        update_progress_artifact(artifact_id=uuid4(), progress=1.0)  # of a database that is lost

    @flow
    def work() -> str:
        page()
        bar()
        return "worked"

    assert work() == "worked"
    assert "did not take the page: ConnectError" in caplog.text
    assert re.search(r"did not take the bar: PrefectHTTPStatusError: Client error .404", caplog.text)

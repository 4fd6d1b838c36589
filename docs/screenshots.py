"""Take the pictures of Prefect's UI in docs/images again, from a server where `end-to-end/demo` has run.

    python docs/screenshots.py        # with PREFECT_API_URL, and Debian's chromium

live.png is not among them: `python docs/screenshots.py live` takes it alone, while the run trains.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterKey,
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.sorting import ArtifactSort, FlowRunSort

IMAGES = Path(__file__).with_name("images")
DEPLOYMENT = "end-to-end/demo"


def of_the_demo(client: SyncPrefectClient) -> FlowRunFilter:
    deployment = client.read_deployment_by_name(DEPLOYMENT).id
    return FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[deployment]))


def artifact(key: str) -> Callable[[SyncPrefectClient], str]:
    """The page of the demo's newest artifact of this key."""

    def address(client: SyncPrefectClient) -> str:
        wanted = ArtifactFilter(key=ArtifactFilterKey(any_=[key]))
        (newest,) = client.read_artifacts(
            artifact_filter=wanted, flow_run_filter=of_the_demo(client), sort=ArtifactSort.CREATED_DESC, limit=1
        )
        return f"artifacts/artifact/{newest.id}"

    return address


def run(client: SyncPrefectClient) -> str:
    """The page of the demo's newest whole run."""
    wanted = of_the_demo(client)
    wanted.state = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.COMPLETED]))
    (newest,) = client.read_flow_runs(flow_run_filter=wanted, sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=1)
    return f"runs/flow-run/{newest.id}"


PAGES: dict[str, tuple[Callable[[SyncPrefectClient], str], int]] = {  # name: address below the UI's, height
    "run": (run, 520),
    "live": (artifact("train-loss"), 600),
    "train": (artifact("train"), 1100),
    "sample": (artifact("sample"), 1100),
    "evaluate": (artifact("evaluate"), 900),
    "clips": (artifact("clips"), 560),
    "deployments": (lambda client: "deployments", 900),
    "form": (lambda client: f"deployments/deployment/{client.read_deployment_by_name(DEPLOYMENT).id}/run", 920),
}


def take(url: str, height: int, image: Path) -> None:
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                "chromium", "--headless", "--no-sandbox", "--hide-scrollbars", f"--user-data-dir={profile}",
                "--run-all-compositor-stages-before-draw", f"--window-size=1200,{height}",
                "--virtual-time-budget=20000", f"--screenshot={image}", url,
            ],
            check=True, capture_output=True, timeout=300,
        )  # fmt: skip
    Image.open(image).quantize(256, kmeans=1).save(image, optimize=True)  # a third of the bytes


def main() -> None:
    with get_client(sync_client=True) as client:
        ui = str(client.api_url).rstrip("/").removesuffix("/api")
        for name in sys.argv[1:] or [name for name in PAGES if name != "live"]:
            page, height = PAGES[name]
            take(f"{ui}/{page(client)}", height, IMAGES / f"{name}.png")
            print(IMAGES / f"{name}.png")


if __name__ == "__main__":
    main()

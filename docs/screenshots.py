"""Take the pictures of Prefect's UI in docs/images again, from a server where `end-to-end/demo` has run.

    python docs/screenshots.py        # with PREFECT_API_URL, and Debian's chromium

live.png looks as in the guide only while the run trains: `python docs/screenshots.py live` takes it alone.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.sorting import ArtifactSort

IMAGES = Path(__file__).with_name("images")
DEPLOYMENT = "end-to-end/demo"


def artifact(key: str) -> Callable[[SyncPrefectClient], str]:
    """The page of the newest artifact of this key."""

    def address(client: SyncPrefectClient) -> str:
        wanted = ArtifactFilter(key=ArtifactFilterKey(any_=[key]))
        (newest,) = client.read_artifacts(artifact_filter=wanted, sort=ArtifactSort.CREATED_DESC, limit=1)
        return f"artifacts/artifact/{newest.id}"

    return address


def run(client: SyncPrefectClient) -> str:
    deployment = client.read_deployment_by_name(DEPLOYMENT).id
    answer = client.request("POST", "/flow_runs/filter", json={
        "deployments": {"id": {"any_": [str(deployment)]}}, "sort": "EXPECTED_START_TIME_DESC", "limit": 1,
    })  # fmt: skip
    return f"runs/flow-run/{answer.json()[0]['id']}"


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
                f"--window-size=1200,{height}", "--virtual-time-budget=20000", f"--screenshot={image}", url,
            ],
            check=True, capture_output=True, timeout=300,
        )  # fmt: skip


def main() -> None:
    with get_client(sync_client=True) as client:
        ui = str(client.api_url).rstrip("/").removesuffix("/api")
        for name in sys.argv[1:] or PAGES:
            page, height = PAGES[name]
            take(f"{ui}/{page(client)}", height, IMAGES / f"{name}.png")
            print(IMAGES / f"{name}.png")


if __name__ == "__main__":
    main()

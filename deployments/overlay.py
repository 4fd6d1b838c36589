"""Print prefect.yaml with a site's own parameters for the deployments named `default`; `deployments/deploy` calls it.

    python deployments/overlay.py PARAMETERS.yaml

The file has the fields that differ, as in prefect.yaml: `{config: {ray: {address: ray://head:10001}}, videos: clips}`.
`schedule` beside them is that of the nightly run: `{schedule: {active: true}}`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_name("prefect.yaml")


def overlaid(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`old` with the leaves of `new`."""
    return old | {
        key: overlaid(old.get(key, {}), value) if isinstance(value, dict) else value for key, value in new.items()
    }


def project(parameters: dict[str, Any]) -> dict[str, Any]:
    """What prefect.yaml says, with these parameters; `videos` only for the flows that take clips."""
    file: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    own = [item for item in file["deployments"] if item["name"] == "default"]
    known = set().union(*(item["parameters"] for item in own), {"schedule"})
    if unknown := parameters.keys() - known:
        raise ValueError(f"no deployment has the parameters {sorted(unknown)}; known are {sorted(known)}")
    for item in own:
        if "schedules" in item:
            item["schedules"] = [overlaid(one, parameters.get("schedule", {})) for one in item["schedules"]]
        here = {key: value for key, value in parameters.items() if key in item["parameters"]}
        item["parameters"] = overlaid(item["parameters"], here)
    return file


if __name__ == "__main__":
    print(yaml.safe_dump(project(yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8"))), sort_keys=False))

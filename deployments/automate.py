"""Bring the server's automation up to automations.yaml; `prefect automation create` would make a second one each time.

    python deployments/automate.py

One that is the same already is left alone: it may be counting the minutes of a run whose machine has just died.
"""

from __future__ import annotations

from pathlib import Path

import yaml
from prefect.client.orchestration import get_client
from prefect.events.schemas.automations import AutomationCore

FILE = Path(__file__).with_name("automations.yaml")


def main() -> None:
    wanted = AutomationCore.model_validate(yaml.safe_load(FILE.read_text(encoding="utf-8")))
    with get_client(sync_client=True) as client:
        found = client.read_automations_by_name(wanted.name)
        same = [one for one in found if AutomationCore.model_validate(one.model_dump(exclude={"id"})) == wanted]
        for one in found:
            if one not in same[:1]:
                client.delete_automation(one.id)
        if not same:
            client.create_automation(wanted)
    print(f"Automation {wanted.name!r}: {'as it was' if same else 'created'}")


if __name__ == "__main__":
    main()

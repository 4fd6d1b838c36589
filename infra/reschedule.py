"""Let Prefect start a run again that Slurm's time limit ended; slurm/flow.sbatch calls it when the flow is gone."""

from __future__ import annotations

import sys
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.states import AwaitingRetry


def main(run: UUID) -> None:
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(run).state
        if state is not None and state.is_crashed():  # not if it was done, or cancelled, before the signal reached it
            client.set_flow_run_state(run, AwaitingRetry(message="Slurm's time limit; it goes on in a new job"))


if __name__ == "__main__":
    main(UUID(sys.argv[1]))

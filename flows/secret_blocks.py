"""Secrets of a flow run: Prefect's blocks become environment of its process and of all that it starts.

WAN_SECRET_BLOCKS names them as VARIABLE=block, for example `HF_TOKEN=hf-token WANDB_API_KEY=wandb`. A reference to a
block in `prefect.yaml` would be filled in by `prefect deploy`, and the server would keep and show the plain text.
"""

from __future__ import annotations

import os

from prefect.blocks.system import Secret


def load_secrets() -> None:
    """Set the environment variables that WAN_SECRET_BLOCKS names.

    Raises:
        ValueError: an item is not VARIABLE=block, or the server has no such block.
    """
    for item in os.environ.get("WAN_SECRET_BLOCKS", "").split():
        variable, _, block = item.partition("=")
        if not variable or not block:
            raise ValueError(f"WAN_SECRET_BLOCKS: {item!r} is not VARIABLE=block, as in HF_TOKEN=hf-token")
        try:
            secret = Secret.load(block)
        except ValueError as error:
            raise ValueError(
                f"WAN_SECRET_BLOCKS: the server has no secret block {block!r}; make it: prefect block create secret"
            ) from error
        os.environ[variable] = str(secret.get())

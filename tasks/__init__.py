"""Prefect tasks: the stages of wan_core with cache, locks, retries, Ray actors and torchrun."""

import os

# Started by `uv run`, Ray would pack the working folder and build it an environment of its own, which takes a minute.
# Ours use this very environment. Ray reads the variable when it is imported, which all our modules do later.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

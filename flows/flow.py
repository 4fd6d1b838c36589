"""`prefect.flow` as the flows here use it: Prefect shows what `parameters.py` says of every parameter."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from prefect import flow
from prefect.flows import Flow

from flows.parameters import PARAMETERS
from flows.secret_blocks import load_secrets


def wan_flow[**P, R](
    name: str, *, run_name: str = "{config.name}", texts: dict[str, str] = PARAMETERS
) -> Callable[[Callable[P, R]], Flow[P, R]]:
    """A flow of this name, whose runs are named by `run_name`; its docstring gains the parameters' descriptions."""

    def decorate(function: Callable[P, R]) -> Flow[P, R]:
        lines = [f"    {parameter}: {texts[parameter]}" for parameter in inspect.signature(function).parameters]
        function.__doc__ = "\n".join([inspect.cleandoc(function.__doc__ or ""), "", "Args:", *lines])

        @functools.wraps(function)
        def with_secrets(*args: P.args, **kwargs: P.kwargs) -> R:
            load_secrets()
            return function(*args, **kwargs)

        made: Any = with_secrets
        # With types in place of their names, which Prefect would look up in this module.
        made.__signature__ = inspect.signature(function, eval_str=True)
        return flow(name=name, flow_run_name=run_name)(made)

    return decorate

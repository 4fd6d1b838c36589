"""What the commands of `wan` share: their options, a config from the command line, and a flow run in this terminal."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.overrides import apply_overrides
from flows.parameters import PARAMETERS
from flows.terminal import Display, console, log_records_to_file, log_to_file, summary
from wan_core.config import PipelineConfig, check

WorkspaceOption = Annotated[
    Path, typer.Option("--workspace", "-w", help=PARAMETERS["workspace"], file_okay=False, show_default=True)
]
RecipeOption = Annotated[str, typer.Option("--recipe", "-r", help="Preset to start from, see `wan presets`.")]
NameOption = Annotated[str | None, typer.Option("--name", help=PARAMETERS["name"] + " [dim]default: the recipe's[/]")]
VideosOption = Annotated[str, typer.Option("--videos", metavar="FOLDER|URL", help=PARAMETERS["videos"])]
ModelOption = Annotated[Path, typer.Option("--model", help=PARAMETERS["model"])]
RefreshOption = Annotated[str | None, typer.Option("--refresh", metavar="STAGE", help=PARAMETERS["refresh"])]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe.")]
WORKSPACE = Path("workspace")


def configured(recipe: str, overrides: list[str] | None, name: str | None = None) -> PipelineConfig:
    """A preset with the command line's changes."""
    from wan_core import presets

    return apply_overrides(presets.get(recipe), [*(overrides or []), *([f"name={name}"] if name else [])])


def execute(workspace: Path, module: str, function: str, /, *needed: str, **parameters: Any) -> None:
    """Run a flow with progress in this terminal, on Prefect's API or on one that lives as long as this command.

    Args:
        needed: modules that the flow will import, imported while the server starts.
    """
    from flows.server import prefect_api

    check(not workspace.is_file(), f"workspace={workspace} is a file; give a folder")
    started, workspace = time.monotonic(), workspace.absolute()
    log = workspace / "logs" / "wan.log"
    flow: list[Callable[..., Any]] = []

    def load() -> None:
        flow.append(getattr(import_module(module), function))
        for stage in needed:
            import_module(stage)
        from tasks import progress

        progress.watcher = display
        log_records_to_file(log)

    try:
        with stopped_once(), Display() as display, log_to_file(log), prefect_api(workspace, meanwhile=load):
            outcomes = flow[0](workspace=workspace, **parameters)
    except KeyboardInterrupt:
        raise Interrupted("interrupted; everything that this command started was stopped") from None
    summary(outcomes, workspace, time.monotonic() - started)


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, after all was stopped. Not a KeyboardInterrupt, which Click would turn into `Aborted!`."""


@contextlib.contextmanager
def stopped_once() -> Iterator[None]:
    """SIGTERM ends the block like Ctrl-C does, and a second signal does not break off the stopping."""

    def stop(number: int, frame: object) -> None:
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, signal.SIG_IGN)
        console.print("stopping ...")
        raise KeyboardInterrupt

    before = {name: signal.signal(name, stop) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)

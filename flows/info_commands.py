"""`wan ui`, `presets`, `plan`, `keys`: what is there, what could be."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from flows.command import WORKSPACE, RecipeOption, WorkspaceOption, configured
from flows.overrides import described_keys
from flows.terminal import console
from wan_core.config import check

app = typer.Typer()
PANEL = "Look around"


@app.command(rich_help_panel=PANEL)
def ui(
    workspace: WorkspaceOption = WORKSPACE,
    port: Annotated[int, typer.Option(help="Port on this machine.")] = 4200,
) -> None:
    """Prefect's UI over the runs of a workspace, until Ctrl-C."""
    from flows.server import configure, home

    folder = home(workspace)
    check(folder.is_dir(), f"{folder} does not exist; run something in --workspace {workspace} first")
    configure(workspace)
    os.environ |= {"PREFECT_SERVER_UI_API_URL": "/api", "PREFECT_SERVER_API_PORT": str(port)}
    console.print(f"Prefect's UI: http://127.0.0.1:{port}")
    os.execv(
        sys.executable, [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    )


@app.command(rich_help_panel=PANEL)
def presets() -> None:
    """The recipes that --recipe takes."""
    from rich.table import Table

    from wan_core import presets as known

    table = Table("recipe", "clips", "trainer overrides", "where", box=None, header_style="bold")
    for name in known.PRESETS:
        config = known.get(name)
        sizes = ", ".join(map(str, config.encode.sizes))
        where = (
            f"{config.launch.nodes} x {config.launch.processes_per_node} processes, {config.launch.gpus_per_node} GPUs"
        )
        table.add_row(name, f"{sizes}, {config.encode.max_frames} frames", "\n".join(config.train.overrides), where)
    console.print(table)


@app.command(rich_help_panel=PANEL)
def plan(
    model: Annotated[str, typer.Option(help="1.3B, 14B, i2v-14B or a model folder in the Diffusers layout.")] = "1.3B",
    gpus_per_node: Annotated[int, typer.Option("--gpus", help="GPUs of a node.")] = 8,
    nodes: Annotated[int, typer.Option(help="Nodes.")] = 1,
    device: Annotated[str, typer.Option(help="h100 or h200: rates and memory of a GPU.")] = "h200",
    memory: Annotated[float | None, typer.Option(metavar="GIB", help="Memory of a GPU, instead of its own.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of a pack; 81 frames of 480x832 have 32,760.")] = 32760,
    samples: Annotated[int, typer.Option(help="Clips in a pack, of equal length.")] = 1,
    packs: Annotated[int | None, typer.Option(help="Packs of a step. [dim]default: one for each GPU[/]")] = None,
    rows: Annotated[int, typer.Option(help="Layouts to show.")] = 10,
) -> None:
    """Parallel layouts of a cluster that fit, with estimated memory and step time, and the overrides to paste."""
    from flows.planning import show, work_of

    show(work_of(model, gpus_per_node, nodes, device, memory, tokens, samples, packs), rows)


@app.command(rich_help_panel=PANEL)
def keys(
    beginning: Annotated[str, typer.Argument(metavar="[BEGINNING]", help="Only keys that begin so.")] = "",
    recipe: RecipeOption = "wan_1_3b",
) -> None:
    """What key=value can change, with the recipe's values; the trainer's own keys by name."""
    from rich.table import Table

    from wan_core.trainer_keys import trainer_keys

    table = Table("key", "value", "", box=None, header_style="bold", padding=(0, 2, 0, 0))
    for key, value, text in described_keys(configured(recipe, None)):
        if key.startswith(beginning):
            table.add_row(key, value if len(value) < 60 else value[:57] + "...", text)
    console.print(table, markup=False)
    names = [key for key in sorted(trainer_keys()) if key.startswith(beginning)]
    if beginning:
        console.print("\n".join(names), markup=False)
    elif names:
        console.print(f"\nand {len(names)} keys of the trainer, for example `wan keys optimizer.`", markup=False)

"""`wan ...`: the flows from a terminal. Prefect, Ray and torch are imported only where a command needs them."""

from __future__ import annotations

import sys

import typer
from pydantic import ValidationError
from rich.markup import escape

from flows import info_commands, stage_commands
from flows.command import (
    WORKSPACE,
    Interrupted,
    ModelOption,
    NameOption,
    Overrides,
    RecipeOption,
    RefreshOption,
    VideosOption,
    WorkspaceOption,
    configured,
    execute,
)
from flows.demo import make_inputs
from flows.inputs import check_images, check_training, checked_model, checked_videos
from flows.overrides import sentence
from flows.terminal import console
from wan_core.config import STAGES, check

app = typer.Typer(
    name="wan", no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False, add_completion=False,
    help="Raw captioned videos to a trained WAN 2.1 model: encode, shard, index, train, convert, sample, evaluate.",
    epilog="[bold]key=value[/] changes the recipe: [cyan]encode.max_frames=49 sample.size=480x832[/] are ours, "
    "[cyan]train.train_iters=1000 optimizer.lr=1e-5[/] go to the trainer. `wan presets` lists the recipes.",
)  # fmt: skip

EVERY_STAGE = (
    "wan_core.encode.stage", "wan_core.data.shards", "wan_core.data.index", "wan_core.training_run",
    "wan_core.convert.stage", "wan_core.sample", "wan_core.evaluate",
)  # fmt: skip


@app.command()
def demo(workspace: WorkspaceOption = WORKSPACE / "demo", refresh: RefreshOption = None) -> None:
    """Everything, small: generate clips and a model, then run all seven stages. Needs no GPU and no download."""
    check_stage(refresh)
    config = configured("wan_demo", None)
    check(not workspace.is_file(), f"workspace={workspace} is a file; give a folder")
    inputs = workspace.absolute() / "input"
    make_inputs(inputs)
    execute(
        workspace, "flows.end_to_end", "end_to_end", *EVERY_STAGE,
        config=config, videos=str(inputs / "videos"), model=inputs / "model", refresh=refresh,
    )  # fmt: skip


@app.command()
def run(
    videos: VideosOption,
    model: ModelOption,
    recipe: RecipeOption,
    workspace: WorkspaceOption,
    refresh: RefreshOption = None,
    name: NameOption = None,
    overrides: Overrides = None,
) -> None:
    """All seven stages on your own clips and model. What is done already is not done again."""
    check_stage(refresh)
    config, videos, model = configured(recipe, overrides, name), checked_videos(videos), checked_model(model)
    check_images(config.sample, model)
    check_training(config.train, config.launch, model)
    execute(
        workspace, "flows.end_to_end", "end_to_end", *EVERY_STAGE,
        config=config, videos=videos, model=model, refresh=refresh,
    )  # fmt: skip


def check_stage(refresh: str | None) -> None:
    check(
        refresh is None or refresh in STAGES, f"--refresh {refresh} names no stage; choose one of {', '.join(STAGES)}"
    )


app.add_typer(stage_commands.app)
app.add_typer(info_commands.app)


def main() -> None:
    """Entry point of `wan`: an error of the user is one sentence and exit code 2."""
    try:
        app()
    except ValidationError as error:
        fail(sentence(error), 2)
    except (ValueError, FileNotFoundError) as error:
        fail(str(error), 2)
    except Interrupted as error:
        fail(str(error), 130)
    except RuntimeError as error:  # LaunchError and its like: the work failed, and the message says how
        fail(str(error), 1)


def fail(message: str, status: int) -> None:
    console.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    sys.exit(status)

"""`wan ...`: the flows from a terminal. Prefect, Ray and torch are imported only where a command needs them."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.markup import escape

from flows.demo import make_inputs
from flows.inputs import check_images, check_training, checked_model, checked_videos, given_or_newest
from flows.overrides import apply_overrides, described_keys, sentence
from flows.parameters import PARAMETERS, SAMPLE_PARAMETERS, STAGE_PARAMETERS
from flows.terminal import Display, console, log_records_to_file, log_to_file, summary
from wan_core.config import STAGES, PipelineConfig, Stage, check
from wan_core.records import (
    ConvertRecord,
    EncodeRecord,
    IndexRecord,
    Record,
    SampleRecord,
    ShardRecord,
    TrainRecord,
)

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
STAGE_PANEL = "Stages, one at a time"
WorkspaceOption = Annotated[
    Path, typer.Option("--workspace", "-w", help=PARAMETERS["workspace"], file_okay=False, show_default=True)
]
RecipeOption = Annotated[str, typer.Option("--recipe", "-r", help="Preset to start from, see `wan presets`.")]
NameOption = Annotated[str | None, typer.Option("--name", help=PARAMETERS["name"] + " [dim]default: the recipe's[/]")]
VideosOption = Annotated[str, typer.Option("--videos", metavar="FOLDER|URL", help=PARAMETERS["videos"])]
ModelOption = Annotated[Path, typer.Option("--model", help=PARAMETERS["model"])]
RefreshOption = Annotated[str | None, typer.Option("--refresh", metavar="STAGE", help=PARAMETERS["refresh"])]
AgainOption = Annotated[bool, typer.Option("--refresh", help=STAGE_PARAMETERS["refresh"])]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe.")]
WORKSPACE = Path("workspace")


CHECKED: dict[str, Callable[..., Any]] = {"videos": checked_videos, "model": checked_model}


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


@dataclass(frozen=True)
class StageCommand:
    """What the command of one stage takes, beside what all take: recipe, workspace, name, refresh, overrides."""

    help: str
    takes: tuple[str, ...] = ()  # `videos` and `model`, which must be given
    reads: dict[str, tuple[type[Record], Stage]] = field(default_factory=dict)  # option -> whose newest output it is
    places: tuple[str, ...] = ()  # parts of the pipeline's config that say where it runs


ENCODE_HELP = """Clips and captions to VAE latents and UMT5 embeddings, in parts, on Ray workers.

[cyan]encode.sizes=480x832,832x480[/]  a clip goes to the size of nearest aspect ratio
[cyan]encode.tokens_per_sample=32760[/]  or to a bucket of aspect ratio, length and area within this budget
[cyan]encode.window_frames=81[/]  long videos are cut into windows, window_stride apart
[cyan]encode.scene_detector=content[/]  and before that at scene changes
[cyan]encode.mode=frames[/]  images, and the first frames of videos
[cyan]ray.actors=8 ray.gpus_per_actor=1[/]  one worker per GPU
"""
STAGE_COMMANDS: dict[Stage, StageCommand] = {
    "encode": StageCommand(
        ENCODE_HELP,
        takes=("videos", "model"), places=("ray",),
    ),
    "shard": StageCommand(
        "Encoded parts to shuffled WebDataset shards, split into train, val and test.",
        reads={"encoded": (EncodeRecord, "encode")},
    ),
    "index": StageCommand(
        "Energon metadata beside the shards: the dataset that training reads.",
        reads={"sharded": (ShardRecord, "shard")},
    ),
    "train": StageCommand(
        "Train with Megatron under torchrun; an interrupted run goes on from its last checkpoint.",
        takes=("model",), reads={"dataset": (IndexRecord, "index")}, places=("launch", "ray"),
    ),
    "convert": StageCommand(
        "Megatron checkpoint to a complete Diffusers folder.",
        takes=("model",), reads={"trained": (TrainRecord, "train")},
    ),
    "sample": StageCommand(
        r"Videos from prompts: `'sample.prompts=\[a red circle, a blue square]'`.",
        reads={"model": (ConvertRecord, "convert")},
    ),
    "evaluate": StageCommand(
        "Metrics and an HTML report over samples, training and data.",
        reads={
            "sampled": (SampleRecord, "sample"), "trained": (TrainRecord, "train"), "encoded": (EncodeRecord, "encode"),
        },
    ),
}  # fmt: skip


def stage_command(stage: Stage, command: StageCommand) -> Callable[..., None]:
    """The function behind `wan STAGE`; Typer reads its options from the signature made here."""

    def run_stage(
        recipe: str, workspace: Path, name: str | None, refresh: bool, overrides: list[str] | None, **given: Path | None
    ) -> None:
        config = configured(recipe, overrides, name)
        inputs: dict[str, Any] = {place: getattr(config, place) for place in command.places}
        for option, folder in given.items():
            if option in command.takes or (folder is not None and option in CHECKED):
                inputs[option] = CHECKED[option](folder)
            else:
                inputs[option] = given_or_newest(*command.reads[option], workspace, config.name, folder).path
        execute(
            workspace, "flows.stages", stage, config=getattr(config, stage), name=config.name, refresh=refresh, **inputs
        )

    texts = SAMPLE_PARAMETERS if stage == "sample" else STAGE_PARAMETERS
    needed = {"videos": VideosOption, "model": ModelOption}
    optional = {
        option: Annotated[Path | None, typer.Option(f"--{option}", help=texts[option])] for option in command.reads
    }
    kind = Parameter.POSITIONAL_OR_KEYWORD
    run_stage.__signature__ = Signature(  # type: ignore[attr-defined]
        [
            *(Parameter(option, kind, annotation=hint) for option, hint in needed.items() if option in command.takes),
            Parameter("recipe", kind, annotation=RecipeOption),
            *(Parameter(option, kind, annotation=hint, default=None) for option, hint in optional.items()),
            Parameter("workspace", kind, annotation=WorkspaceOption, default=WORKSPACE),
            Parameter("name", kind, annotation=NameOption, default=None),
            Parameter("refresh", kind, annotation=AgainOption, default=False),
            Parameter("overrides", kind, annotation=Overrides, default=None),
        ]
    )
    run_stage.__annotations__ = {p.name: p.annotation for p in run_stage.__signature__.parameters.values()}  # type: ignore[attr-defined]
    return run_stage


for _stage, _command in STAGE_COMMANDS.items():
    app.command(_stage, help=_command.help, rich_help_panel=STAGE_PANEL)(stage_command(_stage, _command))


@app.command(rich_help_panel=STAGE_PANEL)
def blend(
    shares: Annotated[
        list[str],
        typer.Argument(
            metavar="DATASET=SHARE...", help="Name in the workspace, or path of an output folder of index (with a /)."
        ),
    ],
    name: Annotated[str, typer.Option("--name", help="Name of the blend.")],
    workspace: WorkspaceOption = WORKSPACE,
) -> None:
    """Several datasets as one, each with its share of the samples: `images=0.3 clips=0.7`. Trains like any dataset."""
    from tasks.layout import stage_folder
    from wan_core.data import blend as stage

    PipelineConfig(name=name)  # checks it
    weights: dict[Path, float] = {}
    for text in shares:
        dataset, _, share = text.rpartition("=")
        check(
            bool(dataset) and share.replace(".", "", 1).isdecimal(),
            f"{text!r} is not DATASET=SHARE; write for example images=0.3",
        )
        folder = Path(dataset) if "/" in dataset else None
        record = given_or_newest(IndexRecord, "index", workspace, dataset, folder)
        check(record.path not in weights, f"{dataset} is named twice; name it once, with both shares")
        weights[record.path] = float(share)
    config = stage.BlendConfig.of(weights)
    folder = stage_folder(workspace.absolute(), "index") / f"{name}-{stage.fingerprint(config)[:8]}"
    made = stage.run(weights, folder)
    counts = ", ".join(f"{count:,} {split}" for split, count in made.num_samples.items())
    console.print(f"{made.path}: {len(weights)} datasets, {counts} samples")


@app.command(rich_help_panel="Look around")
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


@app.command(rich_help_panel="Look around")
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


@app.command(rich_help_panel="Look around")
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


@app.command(rich_help_panel="Look around")
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

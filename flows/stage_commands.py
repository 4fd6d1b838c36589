"""`wan encode`, `shard`, `index`, `train`, `convert`, `sample`, `evaluate`: one stage alone; and `wan blend`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.command import (
    WORKSPACE,
    ModelOption,
    NameOption,
    Overrides,
    RecipeOption,
    VideosOption,
    WorkspaceOption,
    configured,
    execute,
)
from flows.inputs import checked_model, checked_videos, given_or_newest
from flows.parameters import SAMPLE_PARAMETERS, STAGE_PARAMETERS
from flows.terminal import console
from wan_core.config import PipelineConfig, Stage, check
from wan_core.records import (
    ConvertRecord,
    EncodeRecord,
    IndexRecord,
    Record,
    SampleRecord,
    ShardRecord,
    TrainRecord,
)

app = typer.Typer()
STAGE_PANEL = "Stages, one at a time"
AgainOption = Annotated[bool, typer.Option("--refresh", help=STAGE_PARAMETERS["refresh"])]
CHECKED: dict[str, Callable[..., Any]] = {"videos": checked_videos, "model": checked_model}


@dataclass(frozen=True)
class StageCommand:
    """What the command of one stage takes, beside what all take: recipe, workspace, name, refresh, overrides."""

    help: str
    takes: tuple[str, ...] = ()  # `videos` and `model`, which must be given
    may_take: tuple[str, ...] = ()
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
        "Energon metadata beside the shards: the dataset that training reads. With --model its card shows clips.",
        may_take=("model",), reads={"sharded": (ShardRecord, "shard")},
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
            elif option in command.reads:
                inputs[option] = given_or_newest(*command.reads[option], workspace, config.name, folder).path
        execute(
            workspace, "flows.stages", stage, config=getattr(config, stage), name=config.name, refresh=refresh, **inputs
        )

    texts = SAMPLE_PARAMETERS if stage == "sample" else STAGE_PARAMETERS
    needed = {"videos": VideosOption, "model": ModelOption}
    optional = {
        option: Annotated[Path | None, typer.Option(f"--{option}", help=texts[option])]
        for option in (*command.reads, *command.may_take)
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

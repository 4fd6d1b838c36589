"""What a run is given is looked at before any work starts. Imports no Prefect, so the command line looks first."""

from __future__ import annotations

from pathlib import Path

from tasks.layout import newest, stage_folder
from wan_core import layout
from wan_core.architecture import Architecture
from wan_core.config import LaunchConfig, SampleConfig, Stage, TrainConfig, check
from wan_core.data.folder import checked_folder
from wan_core.digests import IMAGE_PARTS, sees_images
from wan_core.records import RECORD_NAME, Record, find_record, load_record

MODEL_PARTS = ("vae", "text_encoder", "tokenizer", "transformer")


def checked_videos(videos: str) -> str:
    """A folder of clips, absolute, or the URL of one (`s3://bucket/clips`).

    Raises:
        ValueError: it does not exist, or cannot be reached.
    """
    return str(checked_folder(videos))


def checked_model(folder: Path) -> Path:
    """A WAN folder in the Diffusers layout, absolute.

    Raises:
        ValueError: it does not exist or lacks a part.
    """
    check(folder.is_dir(), f"model={folder} is not a folder; give a WAN 2.1 model in the Diffusers layout")
    parts = (*MODEL_PARTS, *(IMAGE_PARTS if sees_images(folder) else ()))
    missing = [name + "/" for name in parts if not (folder / name).is_dir()]
    check(
        not missing,
        f"model={folder} lacks {', '.join(missing)}; a WAN 2.1 model in the Diffusers layout has "
        f"{', '.join(name + '/' for name in parts)}",
    )
    return folder.absolute()


def check_images(config: SampleConfig, model: Path) -> None:
    """Look at first frames before hours of training.

    Raises:
        ValueError: prompts of an image-to-video model have none, or those of a text-to-video model have some.
    """
    Architecture.from_diffusers(model).check_images(config.images, len(config.prompts))


def check_training(config: TrainConfig, launch: LaunchConfig, model: Path) -> None:
    """Look at the layout of the training to come.

    Raises:
        ValueError: the model cannot be split like that, or not over so many ranks.
    """
    layout.check_training(config, Architecture.from_diffusers(model), launch.nodes * launch.processes_per_node)


def given_or_newest[R: Record](kind: type[R], stage: Stage, workspace: Path, name: str, folder: Path | None) -> R:
    """The record of `folder`, or of the newest output of a stage in this workspace.

    Raises:
        ValueError: there is none, or its files are not what its record says.
    """
    if folder is None:
        folder = newest(workspace.absolute(), stage, name)
    if folder is None:
        raise ValueError(
            f"{stage_folder(workspace.absolute(), stage)} has no finished output named {name}; run `wan {stage}` "
            "first, give --name, or give an output folder"
        )
    check((folder / RECORD_NAME).is_file(), f"{folder} has no {RECORD_NAME}, so it is no finished output of {stage}")
    record = load_record(kind, folder.absolute())
    check(record.stage == stage, f"{folder} is an output of {record.stage}; give one of {stage}")
    check(
        find_record(kind, folder.absolute(), record.fingerprint) is not None,
        f"files of {folder} are missing or altered; run `wan {stage}` again",
    )
    return record

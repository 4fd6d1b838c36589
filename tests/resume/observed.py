"""What the trainings of `tests.resume.trainer` read, import and record; importing this takes as long as Megatron."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.model.reference import reference_model  # imports diffusers, which must come before the line below
from tests.resume.data import TEXT_DIM, make_dataset
from tests.resume.trainer import SETTINGS
from wan_core.architecture import Architecture
from wan_core.runtime import cpu

cpu.install()  # before megatron.bridge is imported

from wan_core import training  # noqa: E402
from wan_core.step import WanStep  # noqa: E402

PACKS_PER_STEP = SETTINGS["train"]["global_batch_size"]
SMALL = Architecture(32, 64, 2, 2, text_dim=TEXT_DIM, freq_dim=32)
WIDE = Architecture(64, 64, 2, 2, text_dim=TEXT_DIM, freq_dim=32)


def write_inputs(out: Path) -> None:
    """Models, dataset and settings that all trainings share."""
    for name, architecture in (("model", SMALL), ("wide", WIDE)):
        reference_model(architecture).save_pretrained(out / name / "transformer")
    make_dataset(out / "data", 40)
    (out / "settings.yaml").write_text(yaml.safe_dump(SETTINGS))


def install(path: Path, attempt: int, poison: Mapping[int, float]) -> None:
    """Let this process's training note what it reads, and spoil some steps."""

    class Observed(WanStep):
        packs = 0

        def __call__(self, state: Any, data_iterator: Any, model: Any, return_schedule_plan: bool = False) -> Any:
            velocity, reduce = super().__call__(state, data_iterator, model, return_schedule_plan)
            if not model.training:
                return velocity, reduce
            step = state.train_state.step
            Observed.packs += torch.distributed.get_world_size()  # of all ranks
            inputs = reduce.args[0]
            pack = [self.keys[-inputs.packing.num_samples :], inputs.timesteps.tolist()]
            with path.open("a") as file:
                rank = torch.distributed.get_rank()
                file.write(json.dumps({"attempt": attempt, "step": step, "rank": rank, "pack": pack}) + "\n")
            return velocity * poison.get(-(-Observed.packs // PACKS_PER_STEP), 1.0), reduce

    training.WanStep = Observed  # type: ignore[misc]

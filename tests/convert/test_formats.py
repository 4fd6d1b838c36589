"""A checkpoint of one format, read as the other: the same bytes under the other's names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemReader, FileSystemWriter

from wan_core.convert.checkpoint import checkpoint_format, iteration_dir
from wan_core.convert.formats import COMMON, readable

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
NAMES = ("head.linear.weight", "layers.1.modulation")
GROUPS = [{"wd_mult": 1.0, "lr": 0.1}, {"wd_mult": 0.0, "lr": 0.1}]  # of the two parameters


def values(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(name))
    return {key: torch.randn(6, 4, generator=generator) for key in ("param", "exp_avg", "exp_avg_sq")}


def save(root: Path, state: dict[str, Any], form: str) -> Path:
    folder = root / "iter_0000007"
    planner = DefaultSavePlanner(flatten_state_dict=form == "fsdp_dtensor")  # as megatron has it
    dcp.save(state, storage_writer=FileSystemWriter(folder), planner=planner, no_dist=True)
    (folder / "run_config.yaml").write_text(yaml.safe_dump({"checkpoint": {"ckpt_format": form, "save_rng": True}}))
    (folder / "train_state.pt").write_bytes(b"state")
    (root / "latest_checkpointed_iteration.txt").write_text("7")
    (root / "energon").mkdir()
    return root


@pytest.fixture
def fsdp(tmp_path: Path) -> Path:
    state: dict[str, Any] = {"checkpoint_version": 3.0, "iteration": 7, "opt_param_scheduler": {"num_steps": 14}}
    for name, group in zip(NAMES, GROUPS, strict=True):
        of = values(name)
        state[f"model.module.{name}"] = of.pop("param")
        state |= {f"optimizer.state.module.module.{name}.{key}": value for key, value in of.items()}
        state[f"optimizer.state.module.module.{name}.step"] = torch.tensor(7.0)
        state |= {f"optimizer.param_to_group_meta.module.module.{name}.{key}": value for key, value in group.items()}
    return save(tmp_path, state, "fsdp_dtensor")


def torch_dist(root: Path, kind: str = "fully_reshardable") -> Path:
    groups = [{**group, "step": 7} for group in GROUPS]
    common = {
        "checkpoint_version": 3.0, "iteration": 7, "opt_param_scheduler": {"num_steps": 14},
        "optimizer": {"optimizer": {"param_groups": groups}, "param_state_sharding_type": kind},
    }  # fmt: skip
    state: dict[str, Any] = {COMMON: [common], "rng_state/shard_0.0_1.1": [1]}
    for name in NAMES:
        of = values(name)
        state[name] = of["param"].bfloat16()
        state |= {f"optimizer.state.{key}.{name}": value for key, value in of.items()}
    save(root, state, "torch_dist")
    (root / "iter_0000007" / "metadata.json").write_text("{}")
    return root


def read(folder: Path, *keys: str, dtype: torch.dtype = torch.float32) -> Iterator[torch.Tensor]:
    state = {key: torch.empty(6, 4, dtype=dtype) for key in keys}
    dcp.load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    yield from state.values()


def test_fsdp_read_as_torch_dist(fsdp: Path) -> None:
    with readable(str(fsdp), "torch_dist") as load:
        assert load is not None and (Path(load) / "energon").is_dir()  # the data loader's state
        folder = iteration_dir(Path(load))
        assert checkpoint_format(folder) == "torch_dist" and (folder / "train_state.pt").read_bytes() == b"state"
        config = yaml.safe_load((folder / "run_config.yaml").read_text())["checkpoint"]
        assert config == {"ckpt_format": "torch_dist", "save_rng": False}
        for name in NAMES:
            of = values(name)
            for key, found in zip(of, read(folder, *(f"optimizer.state.{key}.{name}" for key in of)), strict=True):
                assert torch.equal(found, of[key])
            (weight,) = read(folder, name, dtype=torch.bfloat16)
            assert torch.equal(weight, of["param"].bfloat16())
        common = torch.load(folder / "common.pt")
        assert common["optimizer"]["optimizer"]["param_groups"] == [{**group, "step": 7.0} for group in GROUPS]
        assert common["opt_param_scheduler"] == {"num_steps": 14} and common["iteration"] == 7
    assert not folder.exists()
    assert checkpoint_format(iteration_dir(fsdp)) == "fsdp_dtensor"


def test_torch_dist_read_as_fsdp(tmp_path: Path) -> None:
    with readable(str(torch_dist(tmp_path)), "fsdp_dtensor") as load:
        folder = iteration_dir(Path(load or ""))
        assert checkpoint_format(folder) == "fsdp_dtensor"
        for name in NAMES:
            of = values(name)
            for wrapped in ("module.", "module.module."):  # without and with Float16Module
                keys = [f"model.{wrapped}{name}"]
                keys += [f"optimizer.state.module.{wrapped}{name}.{key}" for key in ("exp_avg", "exp_avg_sq")]
                assert all(map(torch.equal, read(folder, *keys), of.values()))  # the weight, too, is float32
        state = {
            f"optimizer.param_to_group_meta.module.module.{NAMES[0]}.step": None,
            "opt_param_scheduler.num_steps": None,
        }
        dcp.load(state, storage_reader=FileSystemReader(folder), no_dist=True)
        assert list(state.values()) == [7, 14]


def test_one_iteration_is_enough(fsdp: Path) -> None:
    with readable(str(fsdp / "iter_0000007"), "torch_dist") as load:
        assert load is not None and iteration_dir(Path(load)) == Path(load)
        assert len(list(read(Path(load), *NAMES))) == 2


def test_what_needs_no_view(fsdp: Path, tmp_path: Path) -> None:
    for load in (None, str(fsdp), str(tmp_path / "nothing")):
        with readable(load, "fsdp_dtensor") as found:
            assert found == load


def test_an_optimizer_of_one_layout_is_refused(tmp_path: Path) -> None:
    folder = torch_dist(tmp_path, "dp_reshardable")
    with pytest.raises(ValueError, match=r"as dp_reshardable, which only fits the layout that saved it; save a"):  # noqa: SIM117
        with readable(str(folder), "fsdp_dtensor"):
            pass

"""Every layout against one rank: losses, gradients, gradient norms, equal replicas; checkpoints across layouts."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.parallel.compare import Run, compare, module_errors, read_run
from tests.parallel.layouts import BASES, LOADED, NAMES, SAVED, Layout
from wan_core.architecture import Architecture
from wan_core.convert.checkpoint import iteration_dir, read_weights
from wan_core.convert.mapping import parameter_names, stays_float32, to_diffusers
from wan_core.fsdp import configure
from wan_core.model.config import WanTransformerConfig
from wan_core.model.model import WanModel
from wan_core.parallel import layout

ROOT = Path(__file__).parents[2]
slow = pytest.mark.slow


def found(runs: Path, name: str) -> Run:
    return read_run(runs / Layout.of(name).folder)


def test_every_two_parts_of_a_layout_meet_in_one() -> None:
    """A fault may need two: pipeline stages with data parallelism had wrong gradients once, either alone had not."""
    exclude_each_other = {("cp", "ring"), ("fsdp", "pp"), ("full", "selective"), ("load", "save")}
    met = {pair for name in NAMES for pair in combinations(sorted(Layout.of(name).parts), 2)}
    parts = sorted(set().union(*(Layout.of(name).parts for name in NAMES)))
    assert not set(combinations(parts, 2)) - met - exclude_each_other


@slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in BASES])
def test_a_layout_equals_one_rank(runs: Path, name: str) -> None:
    run = found(runs, name)
    errors = compare(run, found(runs, Layout.of(name).base))
    assert len(run.losses) >= 10
    assert errors.loss <= 1e-5
    assert errors.grad_norm <= 1e-5
    assert errors.gradient <= 1e-4, errors.gradient_of
    assert not run.differing


@slow
def test_gradients_do_not_depend_on_who_works_on_which_pack(runs: Path) -> None:
    """Two data-parallel ranks with a pack each, and one rank with both packs: only the order of a sum differs."""
    ranks, packs = found(runs, "dp2"), found(runs, "packs2")
    errors = module_errors(ranks.gradients, packs.gradients)
    assert max(error for error, _ in errors.values()) <= 1e-6
    assert compare(ranks, packs).loss <= 1e-6


@slow
@pytest.mark.parametrize("name", LOADED)
def test_training_goes_on_in_another_layout(runs: Path, name: str) -> None:
    """As if it had never stopped: Adam's moments and step counts are the same."""
    run, expected = found(runs, name), found(runs, Layout.of(name).base)
    assert min(run.losses) == 11 and max(run.losses) == max(expected.losses) == 20
    assert run.losses == pytest.approx({step: expected.losses[step] for step in run.losses}, rel=1e-5)
    errors = module_errors(run.weights, expected.weights)
    assert max(error for error, _ in errors.values()) <= 1e-4


@slow
@pytest.mark.parametrize("name", SAVED)
def test_export_gives_the_trained_bytes(runs: Path, name: str) -> None:
    """What a checkpoint of any layout and format holds is what its ranks trained, to the bit."""
    trained = found(runs, name).weights
    read = read_weights(iteration_dir(runs / name / "checkpoints"))
    architecture = Architecture.from_diffusers(runs / ("i2v-model" if Layout.of(name).i2v else "model"))
    exported, expected = to_diffusers(read, architecture), to_diffusers(trained, architecture)
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"tensor_model_parallel_size": 3}, "num_attention_heads=4 is not divisible by tensor_model_parallel_size=3; "
         "choose one of 1, 2, 4"),
        ({"tensor_model_parallel_size": 2, "context_parallel_size": 4}, "tensor_model_parallel_size=2 x "
         "context_parallel_size=4, which exchanges heads; choose a product among 1, 2, 4"),
        ({"pipeline_model_parallel_size": 5, "pipeline_dtype": torch.float32}, "pipeline_model_parallel_size=5 exceeds "
         "num_layers=4; choose 4 or less"),
        ({"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 10},
         "recompute_num_layers=10 with recompute_method=uniform: every layer is recomputed by itself; set it to 1"),
        ({"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 0},
         "recompute_num_layers=0 is not between 1 and 4, the layers of a pipeline stage; choose one of them, or "),
        ({"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float32, "recompute_granularity": "full",
          "recompute_method": "block", "recompute_num_layers": 3}, "recompute_num_layers=3 is not between 1 and 2"),
        ({"virtual_pipeline_model_parallel_size": 2}, "virtual_pipeline_model_parallel_size=2, but stages get equal"),
        ({"account_for_embedding_in_pipeline_split": True}, "account_for_embedding_in_pipeline_split=True, but"),
        ({"sequence_parallel": True}, "sequence_parallel=true needs tensor_model_parallel_size > 1, which is 1; "
         "set sequence_parallel=false"),
    ],
)  # fmt: skip
def test_a_layout_that_cannot_work_is_refused(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError) as refusal:
        WanTransformerConfig.of(Architecture(64, 160, 4, 4), **values)
    assert sentence in str(refusal.value)


def test_what_an_export_keeps_in_float32_is_what_the_model_does() -> None:
    architecture = Architecture(64, 160, 4, 1)
    with layout():
        values = {"params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16, "bf16": True}
        config = WanTransformerConfig.of(architecture, transformer_impl="local", use_cpu_initialization=True, **values)
        dtypes = {name: parameter.dtype for name, parameter in WanModel(config).named_parameters()}
    assert dtypes.keys() == parameter_names(architecture)
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == set(filter(stays_float32, dtypes))


def fsdp_container(**changes: object) -> SimpleNamespace:
    """The fields that Megatron-FSDP depends on, at their defaults."""
    values = {
        "dist.use_megatron_fsdp": True, "ddp.use_megatron_fsdp": False, "ddp.use_distributed_optimizer": True,
        "optimizer.use_distributed_optimizer": True, "ddp.data_parallel_sharding_strategy": "no_shard",
        "ddp.megatron_fsdp_main_grads_dtype": None, "checkpoint.ckpt_format": "torch_dist",
        "model.pipeline_model_parallel_size": 1, **changes,
    }  # fmt: skip
    container = SimpleNamespace(**{section: SimpleNamespace() for section in {key.split(".")[0] for key in values}})
    for key, value in values.items():
        setattr(getattr(container, key.split(".")[0]), key.split(".")[1], value)
    return container


def test_one_override_asks_for_fsdp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    container = fsdp_container()
    configure(container, {"dist.use_megatron_fsdp"})
    assert container.ddp.data_parallel_sharding_strategy == "optim_grads_params"
    assert container.checkpoint.ckpt_format == "fsdp_dtensor"
    plain = fsdp_container(**{"dist.use_megatron_fsdp": False})
    configure(plain, set())
    assert plain == fsdp_container(**{"dist.use_megatron_fsdp": False})


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"checkpoint.ckpt_format": "torch_dist"}, "checkpoint.ckpt_format=torch_dist does not go with Megatron-FSDP, "
         "which needs fsdp_dtensor; leave it out, or set dist.use_megatron_fsdp=false"),
        ({"model.pipeline_model_parallel_size": 2}, "pipeline_model_parallel_size=2 with Megatron-FSDP would leave"),
    ],
)  # fmt: skip
def test_what_contradicts_fsdp_is_refused(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError) as refusal:
        configure(fsdp_container(**values), values)
    assert sentence in str(refusal.value)

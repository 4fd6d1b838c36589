"""`wan plan`: memory against counted parameters, estimates against measured steps, and the model's own rules."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from diffusers import WanTransformer3DModel

from wan_core.architecture import I2V_14B, T2V_1_3B, T2V_14B, Architecture
from wan_core.cluster import DEVICES, Layout, Work
from wan_core.config import TrainConfig
from wan_core.costs import GIB, layer_parameters, rank_parameters, state_bytes
from wan_core.layout import check_training
from wan_core.model.config import WanTransformerConfig
from wan_core.model.model import WanModel
from wan_core.parallel import layout as one_rank
from wan_core.plan import MARGIN, estimate, layouts, rank

SMALL = Architecture(96, 160, 4, 5, text_dim=32, freq_dim=64)
ONE = Work(T2V_1_3B, DEVICES["h200"], gpus_per_node=1, nodes=1, tokens=37_440)
NODE = Work(T2V_14B, DEVICES["h200"], gpus_per_node=8, nodes=1, tokens=37_440, packs=8)


@pytest.mark.parametrize(("architecture", "millions"), [(T2V_1_3B, 1418), (T2V_14B, 14288), (I2V_14B, 16394)])
def test_parameters_are_those_of_diffusers(architecture: Architecture, millions: int) -> None:
    with torch.device("meta"):
        reference = WanTransformer3DModel(**architecture.to_diffusers())
    count = rank_parameters(architecture, Layout()).total
    assert count == sum(parameter.numel() for parameter in reference.parameters())
    assert count // 10**6 == millions


def test_states_are_those_of_a_built_model() -> None:
    """Weights and float32 gradients as they are; master weights of what is bfloat16; Adam's two moments."""
    with one_rank():
        values = {"params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16, "bf16": True}
        config = WanTransformerConfig.of(SMALL, transformer_impl="local", use_cpu_initialization=True, **values)
        parameters = list(WanModel(config).parameters())
    held = sum(p.numel() * (p.element_size() + 4) for p in parameters)
    sharded = sum(p.numel() * (8 + 4 * (p.dtype == torch.bfloat16)) for p in parameters)
    assert state_bytes(SMALL, Layout()) == held + sharded
    assert state_bytes(SMALL, Layout(dp=2, cp=2)) == held + sharded / 4
    split = sum(p.numel() for p in parameters if getattr(p, "tensor_model_parallel", False))
    saved = rank_parameters(SMALL, Layout()).total - rank_parameters(SMALL, Layout(tp=2)).total
    assert saved == split // 2
    blocks = [-(-SMALL.num_layers // pp) for pp in (1, 2)]
    stage = rank_parameters(SMALL, Layout()).total - rank_parameters(SMALL, Layout(pp=2)).total
    assert stage == (blocks[0] - blocks[1]) * layer_parameters(SMALL).total + 66 * SMALL.hidden_size + 64  # the head


def test_fsdp_shards_everything_but_blocks_in_use() -> None:
    """2 + 4 + 4 + 8 bytes for each weight over 64 ranks; the rest does not shrink with them."""
    whole, sharded = (state_bytes(T2V_14B, Layout(dp=64, fsdp=fsdp)) for fsdp in (False, True))
    assert sharded < whole / 5
    more = state_bytes(T2V_14B, Layout(dp=128, fsdp=True))
    assert sharded - more == pytest.approx(18 * rank_parameters(T2V_14B, Layout()).total / 128, rel=0.02)


@pytest.mark.parametrize(
    ("layout", "seconds", "gib"), [(Layout(), 2.07, 117.0), (Layout(recompute="selective"), 2.11, 73.3)]
)
def test_estimates_are_near_what_was_measured(layout: Layout, seconds: float, gib: float) -> None:
    """docs/benchmarks/h200.md; the errors are those that docs/parallelism.md states."""
    found = estimate(ONE, layout)
    assert found.seconds == pytest.approx(seconds, rel=0.07)
    assert found.allocated_bytes / GIB == pytest.approx(gib, rel=0.01)


SELECTIVE = Layout(recompute="selective")
TP2_SP = replace(SELECTIVE, tp=2, sequence_parallel=True)
CP2_RING = replace(SELECTIVE, cp=2, ring=True)


@pytest.mark.parametrize(
    ("device", "layers", "layout", "seconds", "gib"),
    [
        ("h200", 40, replace(TP2_SP, tp=4), 3.40, 105.7),
        ("h200", 40, replace(TP2_SP, cp=2, ring=True), 3.45, 125.0),
        ("h200", 40, replace(TP2_SP, cp=2), 3.38, 124.3),
        ("h200", 40, replace(SELECTIVE, cp=4, fsdp=True), 3.25, 108.1),
        ("h200", 40, replace(SELECTIVE, cp=4, ring=True, fsdp=True), 3.47, 109.1),
        ("h200", 40, Layout(dp=4, fsdp=True, recompute="full", recompute_layers=40), 14.31, 90.5),
        ("h200", 6, TP2_SP, 0.953, 35.7),
        ("h200", 6, Layout(cp=2), 0.934, 53.3),
        ("h200", 6, replace(SELECTIVE, cp=2), 0.970, 40.4),
        ("h200", 6, CP2_RING, 0.996, 42.2),
        ("h200", 6, replace(SELECTIVE, cp=2, fsdp=True), 0.959, 38.1),
        ("h200", 6, replace(SELECTIVE, dp=2, fsdp=True), 1.740, 52.0),
        ("h100", 6, TP2_SP, 0.971, 35.7),
        ("h100", 6, CP2_RING, 1.010, 42.2),
        ("h100", 6, replace(SELECTIVE, dp=2), 1.764, 54.3),
    ],
)
def test_estimates_of_layouts_are_near_what_was_measured(
    device: str, layers: int, layout: Layout, seconds: float, gib: float
) -> None:
    """docs/benchmarks/multi_gpu.md: 14B or some of its layers, a pack for each data-parallel rank."""
    work = Work(replace(T2V_14B, num_layers=layers), DEVICES[device], layout.ranks, 1, tokens=37_440, packs=layout.dp)
    found = estimate(work, layout)
    assert found.seconds == pytest.approx(seconds, rel=0.18)
    assert found.allocated_bytes / GIB == pytest.approx(gib, rel=0.01 if layers == 40 else 0.06)


def test_what_shrinks_and_what_grows() -> None:
    def memory(**values: object) -> float:
        return estimate(NODE, replace(Layout(), **values)).allocated_bytes

    for more in ({"tp": 2}, {"cp": 2}, {"dp": 2}, {"dp": 2, "fsdp": True}):
        assert memory(**more) < memory()
    assert memory(tp=2, sequence_parallel=True) < memory(tp=2)
    assert memory(dp=8, fsdp=True) < memory(dp=8)
    assert memory(recompute="full", recompute_layers=40) < memory(recompute="full", recompute_layers=20) < memory()
    assert memory(recompute="full", recompute_layers=40) < memory(recompute="selective") < memory()

    def seconds(work: Work, **values: object) -> float:
        return estimate(work, replace(Layout(), **values)).seconds

    assert seconds(NODE) < seconds(NODE, recompute="selective") < seconds(NODE, recompute="full", recompute_layers=40)
    longer = replace(NODE, tokens=2 * NODE.tokens)
    assert 2 * seconds(NODE) < seconds(longer) < 4 * seconds(NODE)
    assert estimate(longer, Layout()).allocated_bytes > memory()
    assert seconds(replace(longer, samples=2)) < seconds(longer)  # clips do not see each other
    assert seconds(replace(NODE, nodes=2), tp=4, cp=4) > seconds(replace(NODE, gpus_per_node=16), tp=4, cp=4)


def test_only_what_the_model_accepts_is_listed() -> None:
    found = list(layouts(replace(NODE, architecture=T2V_1_3B, packs=4)))
    assert found
    for each in found:
        assert each.ranks == 8 and 4 % each.dp == 0
        assert not (each.fsdp and each.pp > 1)
        WanTransformerConfig.of(T2V_1_3B, pipeline_dtype=torch.float32, **each.settings())  # does not raise
    assert {each.tp for each in found} == {1, 2, 4}  # of 12 heads
    refused = Layout(tp=8)
    with pytest.raises(ValueError, match="choose one of 1, 2, 3, 4, 6, 12"):
        WanTransformerConfig.of(T2V_1_3B, **refused.settings())


def test_ranked_layouts_fit_and_the_fastest_is_first() -> None:
    found = rank(replace(NODE, architecture=T2V_1_3B, device=DEVICES["h100"]))
    seconds = [float(f"{each.seconds:.3g}") for each in found]
    assert seconds == sorted(seconds)
    assert all(each.total_bytes <= DEVICES["h100"].memory_gib * GIB * (1 - MARGIN) for each in found)
    bare = {each.layout for each in found if each.layout.recompute is None}
    assert not any(
        replace(each.layout, recompute=None, recompute_layers=0) in bare for each in found if each.layout.recompute
    )


def test_no_layout_is_listed_with_a_recomputation_that_only_loses() -> None:
    """14B on four H200s: a few blocks made again whole take more memory and more time than all of them selectively."""
    found = rank(Work(T2V_14B, DEVICES["h200"], 4, 1, tokens=37_440, packs=1))
    chosen: dict[Layout, list[tuple[float, float]]] = {}
    for each in found:
        layout = replace(each.layout, recompute=None, recompute_layers=0)
        chosen.setdefault(layout, []).append((each.seconds, each.total_bytes))
    assert len(chosen) > 5
    for options in chosen.values():  # from the fastest on, each takes less memory than the one before
        assert all(slower[1] < faster[1] for faster, slower in pairwise(sorted(options)))


def test_a_pack_holds_whole_samples() -> None:
    with pytest.raises(ValueError, match="tokens=10 do not divide over samples=100"):
        replace(NODE, tokens=10, samples=100)


@pytest.mark.parametrize("recipe", ["wan_1_3b", "wan_14b"])
def test_every_layout_is_accepted_over_every_recipe(recipe: str) -> None:
    """What is pasted behind a recipe that has set other values."""
    architecture = {"wan_1_3b": T2V_1_3B, "wan_14b": T2V_14B}[recipe]
    for tokens in (16384, 75600, 151200):  # with every recomputation
        found = rank(replace(NODE, architecture=architecture, nodes=2, tokens=tokens, packs=16))
        assert found
        for each in found:
            overrides = tuple(each.layout.overrides(16, tokens))
            check_training(TrainConfig(recipe=recipe, overrides=overrides), architecture, each.layout.ranks)


def test_overrides_say_everything() -> None:
    """A recipe may have set other values than the defaults."""
    assert Layout(dp=2, fsdp=True).overrides(8, 32760) == [
        "model.tensor_model_parallel_size=1", "model.sequence_parallel=false", "model.context_parallel_size=1",
        "model.pipeline_model_parallel_size=1", "model.recompute_granularity=null", "model.recompute_method=null",
        "model.recompute_num_layers=null", "dist.use_megatron_fsdp=true", "train.global_batch_size=8",
        "dataset.tokens_per_pack=32760",
    ]  # fmt: skip
    assert "model.cp_comm_type=a2a" in Layout(cp=2).overrides(1, 32760)


def test_the_command_prints_a_table_of_100_columns() -> None:
    def wan(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", "from flows.cli import main; main()", "plan", *arguments],
            capture_output=True, text=True, timeout=120, env={**os.environ, "COLUMNS": "100"},
        )  # fmt: skip

    done = wan("--model", "14B", "--gpus", "8", "--tokens", "75600")
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if "model." not in line]
    assert max(map(len, rows)) <= 100
    assert rows[0] == "8 packs of 75,600 tokens a step, 1 x 8 GPUs of 139.8 GiB: " + rows[0].rpartition(": ")[2]
    assert "TFLOP/s" in rows[1] and " a2a " in done.stdout
    none = wan("--model", "14B", "--gpus", "1", "--device", "h100")
    assert none.returncode == 2
    assert none.stderr.startswith(
        "error: no layout fits 79.1 GiB a GPU and leaves 5% free; one rank full, 40 comes closest with"
    )

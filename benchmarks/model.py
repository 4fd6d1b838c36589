"""Time the transformer forward and backward on one GPU, without a training loop, and say where the time goes.

    python3 benchmarks/model.py --model t2v-1.3B --layers 6 --tokens 24x104x60 --recompute none selective --profile 25

One JSON line per recomputation mode: milliseconds, model TFLOP/s of the layers that ran, peak GiB; with --profile also
the GPU kernels that take the most time, each with its share. Fewer layers than the model's are enough: all are alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile
from triton.testing import do_bench

from wan_core.architecture import ARCHITECTURES, Architecture
from wan_core.config import PATCH_SIZE
from wan_core.model.config import WanTransformerConfig
from wan_core.model.kernels import attention_backend
from wan_core.model.model import WanModel
from wan_core.packing import Packing, pack_text
from wan_core.parallel import layout
from wan_core.patch import GridSize


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=sorted(ARCHITECTURES), default="t2v-1.3B")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", nargs="+", default=["24x104x60"], help="latents of each packed sample")
    parser.add_argument("--recompute", nargs="+", choices=("none", "selective", "full"), default=["none"])
    parser.add_argument("--profile", type=int, default=0, metavar="KERNELS")
    arguments = parser.parse_args()
    architecture = dataclasses.replace(ARCHITECTURES[arguments.model], num_layers=arguments.layers)
    shapes = [tuple(map(int, text.split("x"))) for text in arguments.tokens]
    grids = [GridSize(t, h // PATCH_SIZE[1], w // PATCH_SIZE[2]) for t, h, w in shapes]
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    with layout():
        model_parallel_cuda_manual_seed(0)
        for recompute in arguments.recompute:
            model = build(architecture, recompute)
            step = forward_backward(model, grids)
            torch.cuda.reset_peak_memory_stats()
            milliseconds = float(do_bench(step, warmup=1, rep=1500, return_mode="median"))
            flops = sum(architecture.training_flops(grid.num_tokens) for grid in grids)
            row = {
                "model": arguments.model, "layers": arguments.layers, "tokens": arguments.tokens,
                "recompute": recompute, "attention": attention_backend(), "ms": round(milliseconds, 2),
                "tflops": round(flops / milliseconds / 1e9, 1),
                "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
                "device": torch.cuda.get_device_name(),
            }  # fmt: skip
            print(json.dumps(row), flush=True)
            if arguments.profile:
                print_kernels(step, arguments.profile)
            del model, step
            torch.cuda.empty_cache()


def build(architecture: Architecture, recompute: str) -> WanModel:
    method = {"recompute_method": "uniform", "recompute_num_layers": 1} if recompute == "full" else {}
    config = WanTransformerConfig.of(
        architecture, params_dtype=torch.bfloat16, bf16=True, transformer_impl="transformer_engine",
        gradient_accumulation_fusion=False, recompute_granularity=None if recompute == "none" else recompute, **method,
    )  # fmt: skip
    model = WanModel(config)
    model.initialize(0)
    return model.train()


def forward_backward(model: WanModel, grids: list[GridSize]) -> Callable[[], None]:
    """A step over random patches; gradients are dropped at its end."""
    texts = [torch.randn(120, model.config.text_dim, device="cuda", dtype=torch.bfloat16) for _ in grids]
    packing, text = Packing.of(grids, texts), pack_text(texts)
    patches = torch.randn(packing.num_tokens, 64, device="cuda")
    timesteps = torch.rand(len(grids), device="cuda", dtype=torch.float64) * 1000

    def step() -> None:
        model(patches, timesteps, text, packing).float().square().mean().backward()
        for parameter in model.parameters():
            parameter.grad = None

    return step


def print_kernels(step: Callable[[], None], count: int) -> None:
    step()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        step()
        torch.cuda.synchronize()
    rows = [event for event in trace.key_averages() if event.device_type.name == "CUDA"]
    total = sum(row.self_device_time_total for row in rows)
    print(f"kernels: {total / 1000:.2f} ms")
    for row in sorted(rows, key=lambda row: -row.self_device_time_total)[:count]:
        time = row.self_device_time_total
        print(f"  {time / 1000:8.2f} ms {time / total:6.1%} {row.count:5d} x {row.key[:90]}")


if __name__ == "__main__":
    main()

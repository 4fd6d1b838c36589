"""Time each fused op beside plain torch on one GPU, forward and backward, at the model sizes' shapes.

    python3 benchmarks/kernels.py [--tokens 37440] [--samples 2]

One JSON line per op, direction and width: the median milliseconds of both, how far the results lie apart, and the
fused op's GB/s, counting each activation once per read and once per write. A device-to-device copy comes first as the
ceiling.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.testing import do_bench

from wan_core.model import fused, fused_norm, fused_rotary, ops
from wan_core.parallel import Parallel

EPS = 1e-6
WIDTHS = {"1.3B": (12, 128), "14B": (40, 128), "14B, TP 2": (20, 128)}  # heads, head_dim


def milliseconds(work: Callable[[], Any]) -> float:
    return float(do_bench(work, warmup=50, rep=150, return_mode="median"))


def report(**values: Any) -> None:
    print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()}), flush=True)


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype, requires_grad=True)


def compare(
    op: str, model: str, ours: Callable[..., Any], plain: Callable[..., Any], inputs: list[Tensor],
    traffic: tuple[int, int],
) -> None:  # fmt: skip
    """Two lines; `traffic` is the fewest bytes forward and backward can move."""
    forward, backward, results = [], [], []
    for function in (ours, plain):
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        generator = torch.Generator("cuda").manual_seed(1)
        weights = [torch.empty_like(out).normal_(generator=generator) for out in outputs]

        def gradients(outputs: Any = outputs, weights: Any = weights) -> tuple[Tensor, ...]:
            return torch.autograd.grad(outputs, inputs, weights, retain_graph=True)

        results.append(([out.detach() for out in outputs], list(gradients())))
        forward.append(milliseconds(partial(function, *inputs)))
        backward.append(milliseconds(gradients))
        del outputs, gradients
    for index, (direction, times) in enumerate((("forward", forward), ("backward", backward))):
        pairs = zip(results[0][index], results[1][index], strict=True)
        apart = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)
        report(
            op=op, direction=direction, model=model, shape=list(inputs[0].shape), ms_fused=times[0], ms_torch=times[1],
            speedup=times[1] / times[0], gb_per_s=traffic[index] / times[0] / 1e6, apart=apart,
        )  # fmt: skip


def modulation_ops(model: str, tokens: int, width: int, lengths: tuple[int, ...]) -> None:
    once = 2 * tokens * width  # bytes of one activation
    x, update = normal(tokens, width), normal(tokens, width)
    shift, scale, gate = (normal(len(lengths), width, dtype=torch.float32) for _ in range(3))
    weight, bias = normal(width, dtype=torch.float32), normal(width, dtype=torch.float32)
    compare(
        "modulated_norm", model, lambda x, a, b: fused_norm.modulated_norm(x, a, b, lengths, EPS),
        lambda x, a, b: ops.torch_modulated_norm(x, a, b, lengths, EPS), [x, shift, scale], (2 * once, 3 * once),
    )  # fmt: skip
    compare(
        "gated_add", model, lambda x, a, b: fused.gated_add(x, a, b, lengths),
        lambda x, a, b: ops.torch_gated_add(x, a, b, lengths), [x, update, gate], (3 * once, 3 * once),
    )  # fmt: skip
    compare(
        "layer_norm", model, lambda x, a, b: fused_norm.layer_norm(x, a, b, EPS),
        lambda x, a, b: ops.torch_layer_norm(x, a, b, EPS), [x, weight, bias], (2 * once, 3 * once),
    )  # fmt: skip


def head_ops(model: str, tokens: int, heads: int, dim: int) -> None:
    once = 2 * tokens * heads * dim
    weights = [normal(heads * dim), normal(heads * dim)]
    angle = torch.rand(tokens, dim // 2, device="cuda")
    rotary = torch.stack((angle.cos(), angle.sin()))
    compare(
        "qk_norm_rotary", model, lambda x, *w: fused_rotary.head_norm(x, w, rotary, EPS),
        lambda x, *w: ops.torch_head_norm(x, w, rotary, EPS, Parallel()),
        [normal(tokens, heads, 3, dim), *weights], (4 * once, 8 * once),
    )  # fmt: skip
    compare(
        "q_norm", model, lambda x, *w: fused_rotary.head_norm(x, w, None, EPS),
        lambda x, *w: ops.torch_head_norm(x, w, None, EPS, Parallel()),
        [normal(tokens, heads, 1, dim), weights[0]], (2 * once, 3 * once),
    )  # fmt: skip


def copy_ceiling() -> None:
    source = torch.randn(2**29, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source))
    report(op="copy", device=torch.cuda.get_device_name(), ms=copy, gb_per_s=2 * source.nbytes / copy / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=37440)
    parser.add_argument("--samples", type=int, default=2)
    arguments = parser.parse_args()
    tokens, samples = arguments.tokens, arguments.samples
    short = tokens // (2 * samples)
    lengths = (*[short] * (samples - 1), tokens - short * (samples - 1))
    torch.manual_seed(0)
    copy_ceiling()
    for model, (heads, dim) in WIDTHS.items():
        if "TP" not in model:
            modulation_ops(model, tokens, heads * dim, lengths)
        head_ops(model, tokens, heads, dim)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

"""The fused kernels against float64 autograd of the formulas: on a GPU, and in Triton's interpreter without one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from wan_core.model import fused, fused_norm, fused_rotary, ops
from wan_core.parallel import Parallel

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BF16_FACTOR = 3 if INTERPRETED else 1.1  # the interpreter truncates where GPUs round
DEVICE = "cpu" if INTERPRETED else "cuda"
if INTERPRETED:  # triton 3.6 takes loop bounds from its 1-element arrays by int(), which numpy 2.5 refuses
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_with_index
EPS = 1e-6
Op = Callable[..., Any]

# (width, tokens of each sample): no power of two, several samples, empty ones, one token, more tokens than chunks
TINY = [(96, (5,)), (40, (0, 3, 0, 1, 4, 0))]
LARGE = [(1536, (1300, 0, 7, 2401)), (5120, (1, 0, 2048, 33)), (96, (3000,)), (1536, (9999,))]
SHAPES = TINY if INTERPRETED else TINY + LARGE
HEADS = [(3, 24, 7), (2, 16, 5)] + ([] if INTERPRETED else [(12, 128, 3333), (40, 128, 1057), (5, 128, 4000)])
DTYPES = [torch.float32, torch.bfloat16]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """On the host, and exact in bf16, so that every precision starts from the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).bfloat16().to(dtype)


def run(op: Op, inputs: Sequence[Tensor], device: str) -> list[Tensor]:
    """Outputs, then gradients of all inputs, for random gradients of the outputs."""
    inputs = [x.detach().to(device).requires_grad_() for x in inputs]
    outputs = op(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = [random(*out.shape, dtype=out.dtype, seed=9 + i).to(device) for i, out in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, inputs, weights)
    return [x.detach().cpu() for x in (*outputs, *grads)]


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def compare(ours: Op, torch_op: Op, exact: Op, inputs: Sequence[Tensor]) -> None:
    """float32: 1e-5 from float64. bf16: no further from it than 1.1 times plain torch, each output and gradient."""
    truth = run(exact, [x.double() for x in inputs], "cpu")
    theirs = run(torch_op, inputs, "cpu")
    found, again = run(ours, inputs, DEVICE), run(ours, inputs, DEVICE)
    for index, (mine, other, right, second) in enumerate(zip(found, theirs, truth, again, strict=True)):
        assert mine.dtype == other.dtype and mine.shape == right.shape
        assert torch.equal(mine, second), f"result {index} differs between two runs"
        bound = 1e-5 if inputs[0].dtype == torch.float32 else max(BF16_FACTOR * error(other, right), 1e-5)
        assert error(mine, right) <= bound, (index, error(mine, right), error(other, right))


def repeat(values: Tensor, lengths: Sequence[int]) -> Tensor:
    return torch.cat([row.expand(length, -1) for row, length in zip(values, lengths, strict=True)])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "lengths"), SHAPES)
def test_modulated_norm(width: int, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    def exact(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(x, (width,), eps=EPS) * (1 + repeat(scale, lengths)) + repeat(shift, lengths)

    n = len(lengths)
    inputs = [3 * random(sum(lengths), width, dtype=dtype) + 1, random(n, width, seed=1), random(n, width, seed=2)]
    compare(
        lambda *x: fused_norm.modulated_norm(*x, lengths, EPS),
        lambda *x: ops.torch_modulated_norm(*x, lengths, EPS), exact, inputs,
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "lengths"), SHAPES)
def test_gated_add(width: int, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    def exact(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
        return x + update * repeat(gate, lengths)

    tokens = sum(lengths)
    inputs = [random(tokens, width, dtype=dtype), random(tokens, width, dtype=dtype, seed=1)]
    inputs.append(random(len(lengths), width, seed=2))
    compare(
        lambda *x: fused.gated_add(*x, lengths), lambda *x: ops.torch_gated_add(*x, lengths), exact, inputs
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "lengths"), SHAPES)
def test_layer_norm(width: int, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = [3 * random(sum(lengths), width, dtype=dtype) + 1, random(width, seed=1), random(width, seed=2)]
    compare(
        lambda *x: fused_norm.layer_norm(*x, EPS), lambda *x: ops.torch_layer_norm(*x, EPS),
        lambda x, weight, bias: F.layer_norm(x, (width,), weight, bias, EPS), inputs,
    )  # fmt: skip


def exact_head_norm(x: Tensor, weights: Sequence[Tensor], rotary: Tensor | None) -> tuple[Tensor, ...]:
    """In complex numbers, another way than ours."""
    parts = list(x.unbind(2))
    for index, weight in enumerate(weights):
        normed = F.rms_norm(parts[index].flatten(1), (weight.shape[0],), weight, EPS).unflatten(1, x.shape[1::2])
        if rotary is not None:
            turn = torch.complex(*rotary.double())[:, None]
            pairs = torch.view_as_complex(normed.unflatten(-1, (-1, 2)).contiguous())
            normed = torch.view_as_real(pairs * turn).flatten(-2)
        parts[index] = normed
    return tuple(parts)


def angles(tokens: int, dim: int) -> Tensor:
    angle = random(tokens, dim // 2, seed=5).double()
    return torch.stack((angle.cos(), angle.sin())).float()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dim", "tokens"), HEADS)
@pytest.mark.parametrize(("parts", "normed", "rotated"), [(3, 2, True), (1, 1, False), (2, 1, False)])
def test_head_norm(
    heads: int, dim: int, tokens: int, parts: int, normed: int, rotated: bool, dtype: torch.dtype
) -> None:
    rotary = angles(tokens, dim) if rotated else None
    inputs = [2 * random(tokens, heads, parts, dim, dtype=dtype)]
    inputs += [1 + random(heads * dim, dtype=dtype, seed=i + 1) / 8 for i in range(normed)]
    compare(
        lambda x, *w: fused_rotary.head_norm(x, w, rotary if rotary is None else rotary.to(DEVICE), EPS),
        lambda x, *w: ops.torch_head_norm(x, w, rotary, EPS, Parallel()),
        lambda x, *w: exact_head_norm(x, w, rotary), inputs,
    )  # fmt: skip


def _one_of_two(rank: int, folder: str, heads: int, dim: int, tokens: int) -> None:
    """This rank's half of the heads, through the kernels that wait for the other rank's sums."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    rotary = angles(tokens, dim)
    inputs = [random(tokens, 2 * heads, 3, dim), *(1 + random(2 * heads * dim, seed=i) / 8 for i in (1, 2))]

    def halves(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        weights = tuple(w.chunk(2)[rank] for w in weights)
        return fused_rotary.head_norm(x.chunk(2, 1)[rank], weights, rotary.to(DEVICE), EPS, 2, dist.group.WORLD)

    def exact(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(out.chunk(2, 1)[rank] for out in exact_head_norm(x, weights, rotary))

    def of_both(op: Op) -> list[Tensor]:
        """Outputs of this half; gradients, which reach the other half's heads through the shared sum, added up."""
        results = run(op, inputs if op is halves else [x.double() for x in inputs], DEVICE if op is halves else "cpu")
        for grad in results[3:]:
            dist.all_reduce(grad)
        return results

    for found, truth in zip(of_both(halves), of_both(exact), strict=True):
        assert error(found, truth) <= 1e-5
    dist.destroy_process_group()


@pytest.mark.gpu
def test_head_norm_over_two_ranks(tmp_path: Path) -> None:
    size, method = ((2, 8, 3), "fork") if INTERPRETED else ((6, 128, 1500), "spawn")  # CUDA does not survive a fork
    mp.start_processes(_one_of_two, (str(tmp_path), *size), nprocs=2, start_method=method)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="measures GPU memory")
def test_saves_only_x() -> None:
    """The graph of a norm keeps its input, which lives anyway, and 8 bytes per token."""
    x = torch.randn(4096, 1536, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    shift, scale = torch.zeros(2, 1, 1536, device=DEVICE)
    fused_norm.modulated_norm(x, shift, scale, (4096,), EPS)  # the chunks' table stays
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = fused_norm.modulated_norm(x, shift, scale, (4096,), EPS)
    assert torch.cuda.memory_allocated() - before <= out.nbytes + 4096 * 8 + 4096


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    """The same tests on tiny sizes without a GPU."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "passed" in result.stdout, result.stdout[-4000:] + result.stderr[-2000:]

"""The kernels without a GPU: Triton interprets them, in a process of their own because it must know at its start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import torch
import torch.nn.functional as F
from wan_core.encode.vae_precision import halved
from wan_core.encode.vae_kernels import conv3, conv_table, write_padded

torch.manual_seed(0)
for batch, frames, channels, outputs in ((2, 2, 8, 96), (1, 1, 96, 192)):
    for terms, error in ((1, 4e-4), (2, 2e-6)):
        padded, weight = torch.randn(batch, frames + 2, 6, 7, channels), torch.randn(outputs, channels, 3, 3, 3)
        table = conv_table(weight, torch.float16, terms)
        expected = F.conv3d(padded.permute(0, 4, 1, 2, 3), weight).permute(0, 2, 3, 4, 1)
        for rows in (0, 128):
            found = conv3(torch.stack(halved(padded, torch.float16, terms)), table, torch.float32, rows)
            assert (found - expected).norm() < error * expected.norm(), (channels, terms, rows)

x, residual = (torch.randn(2, 3, 6, 7, 24)[:, :, :4, :5] for _ in range(2))
bias, gamma = torch.randn(24), torch.rand(24)
for terms, error in ((1, 2e-3), (2, 1e-6)):
    padded, total = torch.full((terms, 2, 5, 6, 7, 24), 7.0, dtype=torch.float16), torch.empty(2, 3, 4, 5, 24)
    write_padded(x, bias, residual, gamma, padded, total)
    torch.testing.assert_close(total, x + bias + residual)
    inner = F.silu(F.normalize(total, dim=-1) * gamma)
    assert (padded[:, :, :2] == 7).all()
    torch.testing.assert_close(padded.float().sum(0)[:, 2:], F.pad(inner, (0, 0, 1, 1, 1, 1)), rtol=error, atol=error)
below = torch.full((1, 2, 3, 5, 6, 24), 7.0)
write_padded(x, None, None, None, below, None)
assert torch.equal(below[0], F.pad(x, (0, 0, 0, 1, 0, 1)))
"""

COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from wan_core.encode.vae_kernels import _conv3_kernel as kernel

HOPPER, SMALL, A100 = 232448, 101376, 166912  # bytes of shared memory
for card, most, product, partial, rows, columns, passes in (
    (90, HOPPER, "fp16", "fp32", 256, 128, 3), (90, HOPPER, "fp16", "fp32", 128, 64, 3),
    (90, HOPPER, "bf16", "bf16", 256, 128, 1), (80, A100, "fp16", "fp32", 256, 128, 3),
    (86, SMALL, "fp16", "fp32", 128, 128, 3), (89, SMALL, "bf16", "bf16", 128, 128, 1),
    (120, SMALL, "fp16", "fp32", 128, 128, 3),
):
    tile = lambda height: f"tensordesc<{product}[{height}, 64]>"
    sizes = dict(STEPS=9, PASSES=passes, M=rows, N=columns, K=64, OUTPUTS=columns * 3 // 2)
    signature = dict(x_desc=tile(rows), w_desc=tile(columns), w2_desc=tile(columns // 2), out_ptr="*" + partial)
    signature |= dict.fromkeys(("rows_in", "rows_out", "line", "frame", "rows_low"), "i32")
    signature |= dict.fromkeys(sizes, "constexpr")
    options = dict(num_warps=8, num_stages=3)
    made = compile(ASTSource(kernel, signature, sizes), target=GPUTarget("cuda", card, 32), options=options)
    assert made.metadata.shared <= most, (card, made.metadata.shared)
    ptx = made.asm["ptx"]
    assert card != 90 or ("wgmma.mma_async" in ptx and "cp.async.bulk.tensor" in ptx and "st.local" not in ptx)
"""


@pytest.mark.parametrize(
    ("program", "interpret"),
    [(PROGRAM, "1"), pytest.param(COMPILE, "0", marks=pytest.mark.slow)],
    ids=["run", "compile"],
)
def test_kernels_without_a_gpu(tmp_path: Path, program: str, interpret: str) -> None:
    root = Path(__file__).parents[2]
    settings = {"TRITON_INTERPRET": interpret, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    file = tmp_path / "program.py"  # Triton reads a kernel's source, and the interpreter that of what calls it
    file.write_text(program)
    done = subprocess.run(
        [sys.executable, file], env=os.environ | settings, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]

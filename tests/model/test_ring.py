"""Ring attention on several processes against attention over the whole pack in one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from wan_core.model.kernels import packed_attention
from wan_core.model.ring import ring_attention
from wan_core.packing import Packing
from wan_core.parallel import Parallel
from wan_core.patch import GridSize

HEADS, DIM = 2, 8
RANKS = (2, 3)
PACKS = {
    "odd lengths and padding": ((1, 3, 5), (1, 2, 2), (2, 4, 3), (1, 1, 1)),
    "one sample": ((2, 4, 6),),
    "a sample ends where a rank does": ((1, 4, 4), (1, 4, 4), (1, 4, 4)),
}


def pack(name: str, ranks: int) -> Packing:
    grids = [GridSize(*size) for size in PACKS[name]]
    return Packing.of(grids, [torch.zeros(4, 1)] * len(grids), multiple=ranks)


def tensors(packing: Packing) -> list[Tensor]:
    """q, k, v and the output's gradient."""
    generator = torch.Generator().manual_seed(7)
    shape = (packing.num_tokens, HEADS, DIM)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4)]


def _rank(rank: int, ranks: int, folder: Path) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), ranks), rank=rank, world_size=ranks)
    parallel = Parallel(cp=ranks, cp_rank=rank)
    results = {}
    for name in PACKS:
        packing = pack(name, ranks).part(rank, ranks)
        mine = slice(packing.start, packing.stop)
        q, k, v, grad = (x[mine].clone() for x in tensors(packing))
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out = ring_attention(*inputs, packing, parallel)
        results[name] = [out.detach(), *torch.autograd.grad(out, inputs, grad)]
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each rank of 2 and of 3 found. They are forks of a fresh process: one that has run tests has threads."""
    folder = tmp_path_factory.mktemp("ring")
    command = [sys.executable, "-m", "tests.model.test_ring", str(folder)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("ranks", RANKS)
def test_ranks_together_attend_as_one(runs: Path, ranks: int) -> None:
    parts = [torch.load(runs / str(ranks) / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
    for name in PACKS:
        packing = pack(name, ranks)
        q, k, v, grad = tensors(packing)
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out = packed_attention(*inputs, packing.self_segments)
        expected = [out.detach(), *torch.autograd.grad(out, inputs, grad)]
        for index, whole in enumerate(expected):
            together = torch.cat([part[name][index] for part in parts])
            # float32 accumulators between the blocks
            torch.testing.assert_close(together, whole, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    for ranks in RANKS:
        folder = Path(sys.argv[1]) / str(ranks)
        folder.mkdir()
        start_processes(_rank, (ranks, folder), nprocs=ranks, start_method="fork")

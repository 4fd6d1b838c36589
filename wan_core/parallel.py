"""One frozen view of ranks and groups: the only reader of megatron's parallel_state."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

Group = dist.ProcessGroup | None


@dataclass(frozen=True)
class Parallel:
    """Sizes, ranks and groups of the layout that this process belongs to."""

    tp: int = 1
    cp: int = 1
    pp: int = 1
    dp: int = 1
    tp_rank: int = 0
    cp_rank: int = 0
    pp_rank: int = 0
    dp_rank: int = 0
    tp_group: Group = None
    cp_group: Group = None
    dp_group: Group = None
    pp_group: Group = None
    sequence_parallel: bool = False

    @classmethod
    def current(cls, sequence_parallel: bool = False) -> Parallel:
        """The layout that megatron was initialised with; one rank when it was not."""
        if not parallel_state.is_initialized():
            return cls()
        state = parallel_state
        return cls(
            tp=state.get_tensor_model_parallel_world_size(), tp_rank=state.get_tensor_model_parallel_rank(),
            cp=state.get_context_parallel_world_size(), cp_rank=state.get_context_parallel_rank(),
            pp=state.get_pipeline_model_parallel_world_size(), pp_rank=state.get_pipeline_model_parallel_rank(),
            dp=state.get_data_parallel_world_size(), dp_rank=state.get_data_parallel_rank(),
            tp_group=state.get_tensor_model_parallel_group(), cp_group=state.get_context_parallel_group(),
            dp_group=state.get_data_parallel_group(), pp_group=state.get_pipeline_model_parallel_group(),
            sequence_parallel=sequence_parallel and state.get_tensor_model_parallel_world_size() > 1,
        )  # fmt: skip

    @property
    def sequence_ranks(self) -> int:
        """How many ranks share one sequence: its length is padded to a multiple of this."""
        return self.cp * (self.tp if self.sequence_parallel else 1)

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    def layer_range(self, num_layers: int) -> range:
        """This pipeline stage's layers; the first stages take one more where the division leaves a rest."""
        size, rest = divmod(num_layers, self.pp)
        begin = self.pp_rank * size + min(self.pp_rank, rest)
        return range(begin, begin + size + (self.pp_rank < rest))


class _SumOverGroup(torch.autograd.Function):
    """All-reduce whose result every rank goes on with: the gradient is summed over the ranks, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def sum_over_tp(x: Tensor, parallel: Parallel) -> Tensor:
    """Sum of `x` over the tensor-parallel ranks, differentiable on every rank."""
    return x if parallel.tp == 1 else _SumOverGroup.apply(x, parallel.tp_group)


class _AllToAll(torch.autograd.Function):
    """Exchange the chunks of dimension 0: chunk i goes to rank i. Its own transpose, so backward is the same call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(grads[0], ctx.group), None


def heads_to_tokens(x: Tensor, parallel: Parallel) -> Tensor:
    """Ulysses, before attention: [tokens / cp, n, heads, d] -> [tokens, n, heads / cp, d]."""
    if parallel.cp == 1:
        return x
    tokens, n, heads, d = x.shape
    x = x.view(tokens, n, parallel.cp, heads // parallel.cp, d).permute(2, 0, 1, 3, 4)
    return _AllToAll.apply(x, parallel.cp_group).flatten(0, 1)


def tokens_to_heads(x: Tensor, parallel: Parallel) -> Tensor:
    """Ulysses, after attention: [tokens, heads / cp, d] -> [tokens / cp, heads, d]."""
    if parallel.cp == 1:
        return x
    tokens, heads, d = x.shape
    x = _AllToAll.apply(x.view(parallel.cp, tokens // parallel.cp, heads, d), parallel.cp_group)
    return x.permute(1, 0, 2, 3).reshape(tokens // parallel.cp, heads * parallel.cp, d)


def pass_on(x: Tensor, parallel: Parallel, tag: int = 0) -> Callable[[], Tensor]:
    """Send `x` to the next context-parallel rank, and begin to receive the previous one's, of the same shape.

    Args:
        tag: tells apart what is under way at the same time (gloo needs it).

    Returns:
        A function that waits for the arrival and returns it.
    """
    x, arriving = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    after, before = (parallel.cp_rank + 1) % parallel.cp, (parallel.cp_rank - 1) % parallel.cp
    work = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, x, group=parallel.cp_group, group_peer=after, tag=tag),
            dist.P2POp(dist.irecv, arriving, group=parallel.cp_group, group_peer=before, tag=tag),
        ]
    )

    def arrived() -> Tensor:
        for part in work:
            part.wait()
        return arriving

    return arrived


@contextlib.contextmanager
def layout(tp: int = 1, cp: int = 1, pp: int = 1, backend: str | None = None) -> Iterator[None]:
    """Process groups for work outside of a training loop: under torchrun its ranks, else this one process.

    Where groups exist already they are used as they are.
    """
    if parallel_state.is_initialized():
        yield
        return
    own = not dist.is_initialized()
    if own:
        backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
        if "RANK" in os.environ:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, context_parallel_size=cp
    )
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        if own:
            dist.destroy_process_group()

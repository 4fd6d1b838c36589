"""Selective recomputation: keep what matrix products and attention made, make the rest again in the backward pass.

Ops marked `cheap` only move memory: norms, rotations, GELU, gated adds, Ulysses' exchange. While `selective()` is
active, autograd keeps a recipe (the op and its inputs) in place of each of their outputs. Half of a layer's activations
go, for about 1 % of its time. What an op made from the same inputs again is equal to the bit.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class _Recipe:
    """An op's call. It lives as long as autograd nodes hold handles to its outputs, and so does what it made."""

    op: Callable[..., Any]
    inputs: tuple[Any, ...]  # tensors, handles to outputs of other recipes, and plain values
    made: tuple[Tensor, ...] | None = field(default=None, repr=False)

    def outputs(self) -> tuple[Tensor, ...]:
        if self.made is None:
            with torch.no_grad():
                made = self.op(*(_unpack(value) for value in self.inputs))
            self.made = made if isinstance(made, tuple) else (made,)
        return self.made


@dataclass(frozen=True)
class _Handle:
    """Stands for a view of a recipe's output."""

    recipe: _Recipe
    index: int  # of the output
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Recorder:
    """Recipes of the living outputs of cheap ops, by the address of their storage."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[weakref.ref[Tensor], _Recipe, int]] = {}

    def remember(self, output: Tensor, recipe: _Recipe, index: int) -> None:
        """Entries go with their tensor: a later one may get the same address."""
        address = output.untyped_storage().data_ptr()

        def forget(gone: weakref.ref[Tensor]) -> None:
            if address in self.known and self.known[address][0] is gone:
                del self.known[address]

        self.known[address] = weakref.ref(output, forget), recipe, index

    def pack(self, tensor: Any) -> Any:
        """A handle in place of a cheap op's output; other tensors without their history."""
        if not isinstance(tensor, Tensor) or tensor.is_leaf:
            return tensor
        found = self.known.get(tensor.untyped_storage().data_ptr())
        if found is None:
            return tensor.detach()
        return _Handle(found[1], found[2], tensor.shape, tensor.stride(), int(tensor.storage_offset()))


def _unpack(value: Any) -> Any:
    if not isinstance(value, _Handle):
        return value
    return value.recipe.outputs()[value.index].as_strided(value.shape, value.stride, value.offset)


_recorder: _Recorder | None = None


@contextlib.contextmanager
def selective(active: bool) -> Iterator[None]:
    """While active, what autograd saves of cheap ops' outputs are recipes."""
    global _recorder
    if not active:
        yield
        return
    before, _recorder = _recorder, _Recorder()
    try:
        with torch.autograd.graph.saved_tensors_hooks(_recorder.pack, _unpack):
            yield
    finally:
        _recorder = before


def cheap[**P, R](op: Callable[P, R]) -> Callable[P, R]:
    """Mark an op of positional arguments that `selective()` makes again; outputs that alias an input are kept."""

    @functools.wraps(op)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        recorder = _recorder
        if recorder is None or not torch.is_grad_enabled():
            return op(*args, **kwargs)
        assert not kwargs, "a recipe holds positional arguments"
        output = op(*args, **kwargs)
        recipe = _Recipe(op, tuple(recorder.pack(value) for value in args))
        given = {value.untyped_storage().data_ptr() for value in args if isinstance(value, Tensor)}
        for index, tensor in enumerate(output if isinstance(output, tuple) else (output,)):
            if tensor.untyped_storage().data_ptr() not in given:
                recorder.remember(tensor, recipe, index)
        return output

    return call

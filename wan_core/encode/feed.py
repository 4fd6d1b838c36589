"""Keeping an encoder busy: inputs prepared in threads ahead of it, results fetched one behind it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from itertools import islice

import numpy as np
import torch
from torch import Tensor


def ahead[T, R](function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """`map` in order, with `threads` results computed ahead in as many threads; so many are in memory, and one more."""
    source = iter(items)
    with ThreadPoolExecutor(max_workers=threads) as pool:
        waiting: deque[Future[R]] = deque(pool.submit(function, item) for item in islice(source, threads))
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(function, item) for item in islice(source, 1))
                yield result
        finally:  # the consumer failed: what nobody waits for need not start
            for future in waiting:
                future.cancel()


def one_behind[T, R](launch: Callable[[T], Callable[[], R]], items: Iterable[T]) -> Iterator[R]:
    """For each item what the function that `launch(item)` returns gives, called after the next item's launch.

    While the GPU works on what was launched, the CPU finishes the item before.
    """
    finish: Callable[[], R] | None = None
    for item in items:
        following = launch(item)
        if finish:
            yield finish()
        finish = following
    if finish:
        yield finish()


def batched[T, S](items: Iterable[T], shape: Callable[[T], S | None], size: Callable[[S], int]) -> Iterator[list[T]]:
    """Items of one shape in lists of `size(shape)`, each as soon as it is full, the rest at the end.

    An item without a shape is passed on by itself at once. Which items share a list depends on their order alone.
    """
    waiting: dict[S, list[T]] = {}
    for item in items:
        if (of := shape(item)) is None:
            yield [item]
            continue
        alike = waiting.setdefault(of, [])
        alike.append(item)
        if len(alike) >= size(of):
            yield waiting.pop(of)
    yield from waiting.values()


def singly_if_too_large[T, R](
    launch: Callable[[Sequence[T]], Callable[[], list[R]]], batch: Sequence[T]
) -> Callable[[], list[R]]:
    """`launch(batch)`; where the GPU has no memory for that, a launch of each item by itself."""
    try:
        return launch(batch)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    torch.cuda.empty_cache()  # here, where no error holds the batch's tensors any more
    _say_once(f"no memory on the GPU for {len(batch)} clips at once: encoding such batches singly")
    alone = [launch([item]) for item in batch]
    return lambda: [result for finish in alone for result in finish()]


@cache
def _say_once(message: str) -> None:
    print(message, flush=True)


def pinned(frames: np.ndarray) -> Tensor:
    """An array as a tensor that a GPU, if there is one, fetches while the CPU goes on."""
    tensor = torch.from_numpy(frames if frames.flags.writeable else frames.copy())
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def fetching(tensor: Tensor) -> Callable[[], Tensor]:
    """Start a tensor's copy to the CPU; the function waits for it."""
    if not tensor.is_cuda:
        return lambda: tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def fetched() -> Tensor:
        done.synchronize()
        return copy

    return fetched

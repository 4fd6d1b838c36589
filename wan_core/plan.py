"""The parallel layouts of a cluster that fit, by estimated step time. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from types import SimpleNamespace

from wan_core.architecture import Architecture
from wan_core.cluster import Layout, Work
from wan_core.costs import GIB, KEPT, activation_bytes, state_bytes, step_seconds, total_bytes
from wan_core.layout import check_fsdp, check_layout

MARGIN = 0.05  # of the memory that a layout must leave free: estimates are off by up to 1 %, longest packs come late


@dataclass(frozen=True)
class Estimate:
    """One layout's memory and step."""

    layout: Layout
    state_bytes: float  # weights, gradients, master weights, Adam's moments; FSDP's gathered weights
    activation_bytes: float
    total_bytes: float  # with contexts, communicators and fragmentation
    seconds: float  # of a step
    tflops: float  # per GPU: model FLOPs, so that recomputation does not count

    @property
    def allocated_bytes(self) -> float:
        """What torch counts as allocated."""
        return self.state_bytes + self.activation_bytes


def estimate(work: Work, layout: Layout) -> Estimate:
    state, activations = state_bytes(work.architecture, layout), activation_bytes(work, layout)
    seconds = step_seconds(work, layout)
    flops = work.packs * work.samples * work.architecture.training_flops(work.tokens // work.samples)
    return Estimate(
        layout, state, activations, total_bytes(state + activations, layout), seconds,
        flops / seconds / work.ranks / 1e12,
    )  # fmt: skip


def layouts(work: Work) -> Iterator[Layout]:
    """Every layout of the machines that the model's own rules allow; tensor parallelism stays inside a node."""
    ranks, a = work.ranks, work.architecture
    for tp in _divisors(work.gpus_per_node):
        for cp in _divisors(ranks // tp):
            for pp in _divisors(ranks // tp // cp):
                dp, layers = ranks // tp // cp // pp, -(-a.num_layers // pp)
                for sp, ring, fsdp, recompute in product((False, True), (False, True), (False, True), KEPT):
                    layout = Layout(tp, cp, pp, dp, sp, ring, fsdp, recompute, layers if recompute == "full" else 0)
                    if work.packs % dp == 0 and works(a, layout):
                        yield layout


def works(a: Architecture, layout: Layout) -> bool:
    """Whether training would accept the layout."""
    if (layout.ring and layout.cp == 1) or (layout.fsdp and layout.shards == 1):
        return False  # the same as without
    config = SimpleNamespace(
        num_attention_heads=a.num_attention_heads, num_layers=a.num_layers, ffn_hidden_size=a.ffn_hidden_size,
        recompute_modules=[], **layout.settings(),
    )  # fmt: skip
    try:
        check_layout(config)
        if layout.fsdp:
            check_fsdp(config)
    except ValueError:
        return False
    return True


def rank(work: Work) -> list[Estimate]:
    """Layouts that fit, fastest first (of equals to three digits the simplest); they recompute only where they have to.

    Full recomputation takes as few blocks as memory needs.
    """
    limit, fitting = work.device.memory_gib * GIB * (1 - MARGIN), {}
    for layout in layouts(work):
        same = replace(layout, recompute=None, recompute_layers=0)
        if same in fitting:
            continue  # `layouts` yields it before those that recompute
        counts = range(1, layout.recompute_layers + 1) if layout.recompute == "full" else (0,)
        found = (estimate(work, replace(layout, recompute_layers=count)) for count in counts)
        first = next((each for each in found if each.total_bytes <= limit), None)
        if first is not None:
            fitting[layout] = first
    # With few blocks made again, full recomputation may be slower than selective and yet take more memory.
    best = [each for each in fitting.values() if not any(_beats(other, each) for other in fitting.values())]
    return sorted(best, key=lambda each: (float(f"{each.seconds:.3g}"), each.layout.fsdp, each.seconds))


def _beats(one: Estimate, other: Estimate) -> bool:
    """Whether it is the same layout with a recomputation that is better in time and in memory."""
    same = replace(one.layout, recompute=None, recompute_layers=0) == replace(
        other.layout, recompute=None, recompute_layers=0
    )
    return same and one.seconds < other.seconds and one.total_bytes < other.total_bytes


def smallest(work: Work) -> Estimate:
    """The layout that needs the least memory, whether it fits or not."""
    found = (estimate(work, layout) for layout in layouts(work))
    return min(found, key=lambda each: each.total_bytes)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]

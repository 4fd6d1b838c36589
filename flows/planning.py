"""`wan plan`: the layouts of a cluster as a table."""

from __future__ import annotations

import sys
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from wan_core.architecture import Architecture
from wan_core.cluster import DEVICES, Layout, Work
from wan_core.config import check
from wan_core.costs import GIB
from wan_core.plan import MARGIN, Estimate, rank, smallest

PASTED = 3  # layouts whose overrides are printed


def work_of(
    model: str, gpus_per_node: int, nodes: int, device: str, memory: float | None, tokens: int, samples: int,
    packs: int | None,
) -> Work:  # fmt: skip
    """The command line as a Work.

    Raises:
        ValueError: the model or the device is unknown, or a number is below 1.
    """
    check(device in DEVICES, f"device {device!r} is unknown; choose one of {', '.join(DEVICES)}, and --memory")
    profile = DEVICES[device] if memory is None else replace(DEVICES[device], memory_gib=memory)
    ranks = gpus_per_node * nodes
    return Work(Architecture.named(model), profile, gpus_per_node, nodes, tokens, samples, packs or ranks)


def show(work: Work, rows: int) -> None:
    """Print the fastest layouts and how to ask for them.

    Raises:
        ValueError: no layout fits.
    """
    console = Console(file=sys.stdout, highlight=False)
    found = rank(work)
    if not found:
        least = smallest(work)
        raise ValueError(
            f"no layout fits {work.device.memory_gib:g} GiB a GPU and leaves {MARGIN:.0%} free; {name(least.layout)} "
            f"comes closest with {least.total_bytes / GIB:.0f} GiB: take more GPUs, or fewer tokens in a pack"
        )
    console.print(
        f"{work.packs} packs of {work.tokens:,} tokens a step, {work.nodes} x {work.gpus_per_node} GPUs of "
        f"{work.device.memory_gib:g} GiB: {len(found)} layouts fit and leave {MARGIN:.0%} free"
    )
    console.print(table(found[:rows]))
    for number, each in enumerate(found[: min(rows, PASTED)], 1):
        console.print(f"[bold]{number}[/]  {' '.join(each.layout.overrides(work.packs, work.tokens))}", soft_wrap=True)
    console.print("[dim]Estimates; docs/parallelism.md says how far they are from measurements.[/]")


def table(found: list[Estimate]) -> Table:
    result = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("", "tp", "sp", "cp", "pp", "dp"):
        result.add_column(heading, justify="right")
    for heading in ("sharded", "recompute"):
        result.add_column(heading, no_wrap=True)
    for heading in ("states", "act.", "GiB", "s/step", "TFLOP/s"):
        result.add_column(heading, justify="right", no_wrap=True)
    for number, each in enumerate(found, 1):
        layout = each.layout
        result.add_row(
            str(number), str(layout.tp), "yes" if layout.sequence_parallel else "", context(layout), str(layout.pp),
            str(layout.dp), "FSDP" if layout.fsdp else "optimizer", recomputation(layout),
            f"{each.state_bytes / GIB:.1f}", f"{each.activation_bytes / GIB:.1f}",
            f"[bold]{each.total_bytes / GIB:.1f}[/]", f"[bold]{each.seconds:.2f}[/]", f"{each.tflops:.0f}",
        )  # fmt: skip
    return result


def context(layout: Layout) -> str:
    return str(layout.cp) if layout.cp == 1 else f"{layout.cp} {'ring' if layout.ring else 'a2a'}"


def recomputation(layout: Layout) -> str:
    return f"full, {layout.recompute_layers}" if layout.recompute == "full" else layout.recompute or "none"


def name(layout: Layout) -> str:
    """A layout in words."""
    sizes = " ".join(f"{key}{getattr(layout, key)}" for key in ("tp", "cp", "pp", "dp") if getattr(layout, key) > 1)
    parts = (sizes or "one rank", "sp" * layout.sequence_parallel, "FSDP" * layout.fsdp, recomputation(layout))
    return " ".join(part for part in parts if part)

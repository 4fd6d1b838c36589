"""Train a few steps in many layouts, and keep losses, gradients and weights to compare them by.

    torchrun --nproc-per-node 4 -m tests.parallel.layouts --layouts one-long,tp2,tp2-sp,cp2-full,... --out DIR
    python -m tests.parallel.layouts --fork 4 --layouts ...    # the same on one host; imports Megatron only once

A layout is named by its parts: tp2, cp2, pp2, dp2 (sizes), sp (sequence parallelism), ring (instead of Ulysses), fsdp
(Megatron-FSDP, all sharded), packs2 (the step's samples in two packs), full or selective (recomputation), i2v
(image-to-video), single (one sample instead of four), long (all steps instead of half of them), save (a checkpoint
after half of them) and load:NAME (the second half, from the checkpoint that layout NAME saved). `one` is one rank.
Layouts of fewer ranks than were started leave the others idle. float32 on gloo without a GPU, bfloat16 on NCCL with.
The process groups are made anew for each layout in the same processes.
This module stays light, because Megatron writes checkpoints in spawned processes that import it anew.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PARTS = r"one|save|sp|ring|fsdp|i2v|full|selective|single|long|(tp|cp|pp|dp|packs)\d+"


# What tests compare, on one host without a GPU.
LAYOUTS = (
    "tp2", "tp2-sp", "tp2-sp-single", "cp2", "cp2-single", "pp2", "packs2", "dp2", "tp2-cp2",
    "tp2-pp2-long", "tp2-sp-cp2-long", "pp2-packs2", "pp2-dp2", "pp2-cp2", "cp2-ring", "cp3-ring",
)  # fmt: skip
SELECTIVE = (
    "selective", "cp2-selective", "pp2-selective", "dp2-selective", "cp2-ring-selective", "tp2-sp-cp2-selective",
    "pp2-packs2-selective",
)  # fmt: skip
RECOMPUTED = ("full", "cp2-full", "pp2-full", "dp2-full", "tp2-sp-cp2-full")
FSDP = ("dp2-fsdp", "dp2-fsdp-selective", "dp2-fsdp-full", "tp2-sp-dp2-fsdp-full")
SAVED = (
    "tp2-save", "tp2-sp-cp2-save", "pp2-dp2-save", "dp2-save", "dp2-fsdp-save", "cp2-fsdp-save",
    "cp2-ring-full-packs2-save", "dp2-i2v-selective-save",
)  # fmt: skip
LOADED = (
    "cp2-load:tp2-save", "load:tp2-save", "pp2-load:tp2-save", "load:tp2-sp-cp2-save", "dp2-load:tp2-sp-cp2-save",
    "load:pp2-dp2-save", "tp2-load:pp2-dp2-save",
    "load:dp2-fsdp-save", "dp2-fsdp-load:dp2-fsdp-save", "dp4-fsdp-load:dp2-fsdp-save", "dp2-fsdp-load:tp2-save",
    "dp2-fsdp-load:dp2-save", "load:cp2-fsdp-save",
    "tp2-sp-cp2-ring-full-packs2-load:cp2-ring-full-packs2-save", "cp2-i2v-selective-load:dp2-i2v-selective-save",
)  # fmt: skip
I2V = ("tp2-sp-i2v", "cp2-i2v", "pp2-i2v", "tp2-sp-cp2-ring-i2v-full")
BASES = ("one-long", "single", "one-i2v-long")
# Two parts of a layout that are right alone may be wrong together: no pair of parts may be missing in all of these.
PAIRED = (
    "tp2-sp-pp2-packs2", "cp2-dp2-packs4", "pp2-cp2-ring", "cp2-dp2-ring-fsdp-packs4", "dp2-fsdp-i2v-selective-packs4",
)  # fmt: skip
NAMES = (*BASES, *LAYOUTS, *SELECTIVE, *RECOMPUTED, *FSDP, *I2V, *PAIRED, *SAVED, *LOADED)


@dataclass(frozen=True)
class Layout:
    """How the same training steps are spread over ranks and packs."""

    name: str
    tp: int = 1
    cp: int = 1
    pp: int = 1
    dp: int = 1
    packs: int = 1  # per step
    sp: bool = False
    ring: bool = False
    fsdp: bool = False
    i2v: bool = False
    recompute: str | None = None
    single: bool = False
    long: bool = False
    save: bool = False
    load: str | None = None

    @classmethod
    def of(cls, name: str) -> Layout:
        """Read a name: parts joined by `-`, a load last."""
        head, _, load = name.partition("load:")
        values: dict[str, Any] = {"load": load} if load else {}
        for part in filter(None, head.split("-")):
            if not re.fullmatch(PARTS, part):
                raise ValueError(f"layout {name!r}: {part!r} is not a part of one; see the top of {__file__}")
            if part in ("full", "selective"):
                values["recompute"] = part
            elif part[-1].isdigit():
                values[part.rstrip("0123456789")] = int(re.sub(r"\D", "", part))
            elif part != "one":
                values[part] = True
        values["packs"] = max(values.get("packs", 1), values.get("dp", 1))
        return cls(name=name, **values)

    @property
    def folder(self) -> str:
        return self.name.replace(":", "_")

    @property
    def base(self) -> str:
        """The layout of one rank that this one must equal."""
        return "single" if self.single else "one-i2v-long" if self.i2v else "one-long"

    @property
    def parts(self) -> frozenset[str]:
        """What it is made of, without sizes."""
        sizes = {"tp": self.tp, "pp": self.pp, "dp": self.dp, "ring" if self.ring else "cp": self.cp}
        found = {part for part, size in sizes.items() if size > 1}
        found |= {part for part in ("sp", "fsdp", "i2v", "save") if getattr(self, part)}
        found |= {"load"} if self.load else set()
        found |= {"packs"} if self.packs > self.dp else set()
        return frozenset(found | ({self.recompute} if self.recompute else set()))

    @property
    def ranks(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    def overrides(self) -> list[str]:
        result = [
            f"model.tensor_model_parallel_size={self.tp}", f"model.context_parallel_size={self.cp}",
            f"model.pipeline_model_parallel_size={self.pp}", f"model.sequence_parallel={str(self.sp).lower()}",
            f"train.global_batch_size={self.packs}",
        ]  # fmt: skip
        if self.ring:
            result += ["model.cp_comm_type=p2p"]
        if self.recompute:
            result += [f"model.recompute_granularity={self.recompute}"]
        if self.recompute == "full":
            result += ["model.recompute_method=uniform", "model.recompute_num_layers=1"]
        if self.fsdp:
            result += ["dist.use_megatron_fsdp=true"]
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", required=True, help="names joined by commas")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--fork", type=int, metavar="RANKS", help="start the ranks here instead of by torchrun")
    parser.add_argument("--features", action="store_true", help="then the runs of tests.parallel.features")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    layouts = [Layout.of(name) for name in args.layouts.split(",")]
    ranks = args.fork or int(os.environ.get("WORLD_SIZE", 1))
    for layout in layouts:
        if layout.ranks > ranks:
            raise ValueError(f"layout {layout.name!r} needs {layout.ranks} ranks, but {ranks} were started")
    from tests.parallel import worker

    if not args.fork:
        worker.started(layouts, args.out, args.steps, args.overrides)
        return
    with tempfile.TemporaryDirectory() as folder:
        worker.fork(Path(folder), layouts, args.out, args.steps, args.overrides)
        if args.features:
            from tests.parallel import features

            features.fork(Path(folder), args.out / "features")


if __name__ == "__main__":
    main()

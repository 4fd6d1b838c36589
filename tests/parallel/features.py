"""Whole runs, as a user starts them, in several layouts: averages, validation, samples, adapters, counted samples.

Started by `tests.parallel.layouts --features`, in forks of its process, which has imported Megatron; light at the top,
as that is.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

LAYOUTS = {"one": 1, "dp2": 2, "tp2": 2, "cp2": 2, "pp2": 2, "fsdp": 2}  # name: ranks
RESUMED = ("dp2 from one", "fsdp from one")  # the second half of a run whose first half was on one rank
SIZES = {
    "tp2": ("model.tensor_model_parallel_size=2", "model.sequence_parallel=true"),
    "cp2": ("model.context_parallel_size=2",), "pp2": ("model.pipeline_model_parallel_size=2",),
    "fsdp": ("dist.use_megatron_fsdp=true",),
}  # fmt: skip
SETTINGS = (
    "train.train_iters=4", "checkpoint.save_interval=4", "logger.log_interval=1", "dataset.num_workers=0",
    "dataset.tokens_per_pack=40", "dataset.packing_buffer_size=12", "optimizer.lr=1e-3", "optimizer.weight_decay=0.01",
    "scheduler.lr_warmup_iters=0",
)  # fmt: skip
FEATURES = {
    "full": (
        "train.global_batch_size=2", "optimizer.ema_decay=0.9", "validation.eval_interval=2",
        "validation.max_samples=5", "validation.sigmas=[0.2,0.8]", "samples.interval=4", "samples.height=32",
        "samples.width=48", "samples.num_frames=5", "samples.num_steps=3", "samples.negative_prompt=a",
        "samples.prompts=[a red circle moving left, a blue square moving up, a green circle]",
    ),
    "adapted": (
        "dataset.batch_unit=samples", "train.global_batch_size=6", "lora.dim=4", "lora.alpha=8", "lora.magnitude=true",
    ),
    "counted": ("dataset.batch_unit=tokens", "train.global_batch_size=50", "checkpoint.save_interval=2"),
    "unclipped": ("optimizer.clip_grad=0", "train.global_batch_size=2"),
}  # fmt: skip
RUNS = [
    *(("full", layout) for layout in LAYOUTS),
    *(("adapted", layout) for layout in ("one", "dp2", "tp2", "cp2", "fsdp")),
    *(("counted", layout) for layout in ("one", "dp2", "fsdp", *RESUMED)),
    ("unclipped", "one"), ("unclipped", "fsdp"),
]  # fmt: skip


def fork(stores: Path, out: Path) -> None:
    """All runs, one after the other, each in `out/<features>-<layout>`."""
    from torch.multiprocessing.spawn import start_processes

    from tests.resume.data import make_dataset
    from tests.tiny import TEXT_DIM, make_tiny_model
    from tests.training.runs import cut_off

    model = make_tiny_model(out / "model")
    make_dataset(out / "data", 24, text_dim=TEXT_DIM)
    for features, layout in RUNS:
        since = time.perf_counter()
        if layout in RESUMED:
            cut_off(out / f"{features}-one", out / f"{features}-{layout}", 2)
        arguments = (stores / f"{features}-{layout}", model, out, features, layout)
        start_processes(_work, arguments, nprocs=LAYOUTS[layout.split()[0]], start_method="fork")
        print(f"{features}, {layout}: {time.perf_counter() - since:.1f} s", flush=True)


def _work(rank: int, store: Path, model: Path, out: Path, features: str, layout: str) -> None:
    import torch
    import torch.distributed as dist

    from tests.parallel.worker import process_group
    from wan_core.config import TrainConfig
    from wan_core.training import run

    torch.set_num_threads(1)
    ranks = LAYOUTS[layout.split()[0]]
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
    overrides = (
        *SETTINGS,
        *FEATURES[features],
        *SIZES.get(layout.split()[0], ()),
        f"dataset.path={out / 'data' / 'index'}",
    )
    with process_group(dist.FileStore(str(store), ranks), rank, ranks):
        run(TrainConfig("wan_demo", "finetune", overrides), model, None, out / f"{features}-{layout}", None, mock=False)

"""Reads a dataset of ours with Megatron-Bridge's own WAN task encoder, as its data module does; run by test_peer.py.

The packages' `__init__` files are left out, because they import all of Bridge: 20 s, and Transformer Engine. What
decodes, checks, packs and batches the samples is Bridge's code, unaltered.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

import megatron
import torch
from megatron.energon import WorkerConfig, get_savable_loader, get_train_dataset

EMPTY = (
    "megatron.bridge", "megatron.bridge.data", "megatron.bridge.data.energon", "megatron.bridge.diffusion.models",
    "megatron.bridge.training", "megatron.bridge.training.utils",
)  # fmt: skip


def main(dataset: Path, result: Path, num_batches: int) -> None:
    for name in EMPTY:
        package = types.ModuleType(name)
        package.__path__ = [f"{root}/{name.partition('.')[2].replace('.', '/')}" for root in megatron.__path__]
        sys.modules[name] = package
    from megatron.bridge.diffusion.data.wan.wan_taskencoder import WanTaskEncoder

    data = get_train_dataset(
        str(dataset), batch_size=1, packing_buffer_size=8,
        task_encoder=WanTaskEncoder(seq_length=40, packing_buffer_size=8),
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0), max_samples_per_sequence=None,
        shuffle_buffer_size=100, split_part="train", batch_drop_last=True,
        virtual_epoch_length=1000,  # it asks for a billion, of which Energon makes a list: 36 GB without workers
    )  # fmt: skip
    loader = iter(get_savable_loader(data))
    torch.save([next(loader) for _ in range(num_batches)], result)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))

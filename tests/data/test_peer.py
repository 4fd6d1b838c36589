import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from einops import rearrange

from tests.data.test_samples import INFO
from tests.data.test_shards import make_encoded, sample
from wan_core.config import IndexConfig, ShardConfig
from wan_core.data import index, shards


def test_megatron_bridges_own_wan_loader_reads_our_dataset_unchanged(tmp_path: Path) -> None:
    """Its samples are ours: latents, embeddings padded with zeros to 512, side-info."""
    encoded = make_encoded(tmp_path / "encode", 24)
    sharded = shards.run(ShardConfig(val_share=0.2, max_samples=5), encoded, tmp_path / "shard")
    dataset = index.run(IndexConfig(workers=1), sharded, tmp_path / "index")
    command = [sys.executable, "-m", "tests.data.peer_reader", str(dataset.path), str(tmp_path / "batches.pt"), "12"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    seen: set[int] = set()
    for batch in torch.load(tmp_path / "batches.pt", weights_only=True):
        lengths = batch["seq_len_q"].tolist()
        assert sum(lengths) <= 40 and batch["seq_len_kv"].tolist() == [512] * len(lengths)
        videos = batch["video_latents"][:, 0].split(lengths)
        texts = batch["context_embeddings"][:, 0].split(512)
        for video, text, grid, info in zip(videos, texts, batch["grid_sizes"], batch["video_metadata"], strict=True):
            i = int(info["caption"].removeprefix("caption "))
            ours = sample(i)
            seen.add(i)
            assert info == asdict(replace(INFO, caption=f"caption {i}"))
            assert grid.tolist() == [ours.latents.shape[1], ours.latents.shape[2] // 2, ours.latents.shape[3] // 2]
            assert torch.equal(video, rearrange(ours.latents, "c f (h p) (w q) -> (f h w) (p q c)", p=2, q=2))
            assert torch.equal(text[:3], ours.text_embeds) and not text[3:].any()
    assert len(seen) == sharded.num_samples["train"]

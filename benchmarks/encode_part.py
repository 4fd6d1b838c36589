"""Time a part of the encode stage on one GPU: files decoded in threads, encoded at full size, and written.

    python -m benchmarks.encode_part --clips 50      # about 3 minutes

The VAE has random weights in the published config. The text encoder is a tiny one: captions are encoded before the
first clip, and `benchmarks.encode` times that. One JSON line per row; `gpu_busy` is the VAE's time on the GPU over the
time from the first clip's end to the last one's.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from torch import Tensor

from benchmarks.encode import FRAMES, HEIGHT, WIDTH, published_vae, report
from tests.tiny import make_tiny_model
from wan_core.config import EncodeConfig
from wan_core.data.clips import Clip
from wan_core.encode.part import Encoders, encode_part, part_of
from wan_core.encode.text import load_text_encoder
from wan_core.encode.vae import Vae
from wan_core.encode.video import write_video
from wan_core.records import file_digest


def picture(height: int, width: int, frames: int, grain: int) -> np.ndarray:
    """A smooth moving picture with so many levels of noise: uint8 [T, H, W, 3]."""
    random, video = np.random.default_rng(0), np.empty((frames, height, width, 3), np.uint8)
    coarse = random.integers(0, 255, (13, 16, 24, 3), dtype=np.uint8)
    for t in range(frames):
        at, share = divmod(t * 12 / frames, 1)
        one, two = (Image.fromarray(c).resize((width, height), 3) for c in coarse[int(at) : int(at) + 2])
        noise = random.integers(0, grain + 1, (height, width, 3), dtype=np.uint8)
        video[t] = np.minimum(np.asarray(Image.blend(one, two, share)), 255 - grain) + noise
    return video


SOURCES = {  # five seconds each; and decoding threads
    "480p at 16 frames a second, grainy": ((480, 832, 81, 16), 16, 4),
    "1080p at 30 frames a second, smooth": ((1080, 1920, 152, 0), 30, 8),
}


class TimedVae(Vae):
    """Keeps when the GPU began and ended each clip."""

    def __init__(self, model: AutoencoderKLWan, precision: str) -> None:
        super().__init__(model, precision)
        self.spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def encode(self, video: Tensor) -> Tensor:
        span = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        span[0].record()
        latents = super().encode(video)
        span[1].record()
        self.spans.append(span)
        return latents


def _note(times: list[float], done: int) -> None:
    times.append(time.perf_counter())


def part_rows(model: AutoencoderKLWan, count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        text = load_text_encoder(make_tiny_model(root / "model"), torch.bfloat16, "cuda")
        for source, (shape, fps, threads) in SOURCES.items():
            write_video(root / "first" / "clip.mp4", picture(*shape), fps)
            content = (root / "first" / "clip.mp4").read_bytes()
            for number in range(count):
                (root / f"{number}.mp4").write_bytes(content)
            digest = file_digest(root / "0.mp4")
            clips = [Clip(f"{number}.mp4", digest, f"a circle {number}") for number in range(count)]
            for name in ("float16", "bfloat16"):
                config, vae = EncodeConfig(vae_dtype=name, decode_threads=threads), TimedVae(model, name)
                vae.encode(torch.zeros(1, 3, FRAMES, HEIGHT, WIDTH, dtype=torch.uint8))  # compiles
                vae.error(torch.zeros(1, 3, 17, HEIGHT, WIDTH, dtype=torch.uint8))
                vae.spans.clear()
                times = [time.perf_counter()]
                encoders = Encoders(vae, text, None, {})
                part, out = part_of(clips), root / f"{threads}-{name}"
                record = encode_part(config, part, root, out, encoders, partial(_note, times))
                inside = [begin.elapsed_time(end) / 1e3 for begin, end in vae.spans]
                steady = times[-1] - times[1]  # from the first clip's end to the last one's
                report(
                    row=f"a part by {name}, {source}", clips=record.num_clips, wall=time.perf_counter() - times[0],
                    seconds_per_clip=steady / (count - 1), gpu_busy=sum(inside[-count + 1 :]) / steady,
                    encode_seconds=float(np.median(inside)), decode_threads=threads, cores=len(os.sched_getaffinity(0)),
                    mbit_per_s=len(content) * 8e-6 / 5, error=record.vae_error,
                )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--clips", type=int, default=50)
    device = torch.cuda.get_device_name()
    report(row="device", device=device, torch=torch.__version__, cores=len(os.sched_getaffinity(0)))
    part_rows(published_vae(), parser.parse_args().clips)

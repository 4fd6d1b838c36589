"""Time the VAE's encoder and UMT5 at full size on one GPU, beside diffusers and the peer's loop.

    python -m benchmarks.encode                      # the tables: about 4 minutes
    python -m benchmarks.encode --only ours text     # without timing diffusers: about 1 minute
    python -m benchmarks.encode --only convs         # each convolution by itself, cuDNN and ours

No network is needed: weights are random in the published configs. One JSON line per row. `error` is |ours - reference|
/ |reference| of the posterior mean (not normalised: subtracting the latents' mean would hide some of it) over one clip;
the reference is diffusers in float32 with TF32 off. torch's default leaves TF32 on in convolutions.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from wan_core.encode.vae import Vae
from wan_core.encode.vae_encoder import FastEncoder
from wan_core.encode.vae_precision import PRECISIONS, allow_tf32, to_float

FRAMES, HEIGHT, WIDTH = 81, 480, 832


def report(**values: Any) -> None:
    print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()}), flush=True)


def clip() -> Tensor:
    """A smooth moving picture with some grain: uint8 [1, 3, T, H, W]."""
    generator = torch.Generator("cuda").manual_seed(0)
    coarse = torch.rand(3, 1, 12, 16, 24, device="cuda", generator=generator)
    video = torch.cat([F.interpolate(one[None], (FRAMES, HEIGHT, WIDTH), mode="trilinear") for one in coarse], 1)
    video += torch.rand(video.shape, device="cuda", generator=generator) / 16
    return (video.clamp(0, 1) * 255).to(torch.uint8)


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """Median, of work that has run once."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return float(np.median(times))


def measured(row: str, encode: Callable[[Tensor], Tensor], video: Tensor, reference: Tensor) -> None:
    """One row of the table."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        mean = encode(video)
        error = float((mean - reference).norm() / reference.norm())
        took = seconds(lambda: encode(video), 2)
    except Exception as failure:  # a row that fails must not cost the others their time on the machine
        report(row=row, failed=f"{type(failure).__name__}: {failure}"[:600])
    else:
        report(row=row, seconds=took, error=error, peak_gib=torch.cuda.max_memory_allocated() / 2**30)


def published_vae() -> AutoencoderKLWan:
    torch.manual_seed(0)
    with torch.device("cuda"):
        return AutoencoderKLWan().eval().requires_grad_(False)


def diffusers_mean(model: AutoencoderKLWan, video: Tensor) -> Tensor:
    return model.encode(to_float(video).to(model.dtype)).latent_dist.mode().float()


def reference_of(model: AutoencoderKLWan, video: Tensor) -> Tensor:
    with allow_tf32(False):
        return diffusers_mean(model, video)


def diffusers_rows(video: Tensor, reference: Tensor) -> None:
    model = published_vae()
    measured("diffusers float32", partial(reference_of, model), video, reference)
    with allow_tf32(True):
        measured("diffusers float32, TF32 (torch's default)", partial(diffusers_mean, model), video, reference)
    model.bfloat16()
    measured("diffusers bfloat16", partial(diffusers_mean, model), video, reference)
    model = published_vae().half()
    model.enable_tiling()
    measured("diffusers float16, tiled (the peer's loop)", partial(diffusers_mean, model), video, reference)


def our_rows(model: AutoencoderKLWan, reference: Tensor, video: Tensor) -> None:
    frames = video.permute(0, 2, 3, 4, 1).contiguous()
    for name in ("float16", "float16x3", "bfloat16"):
        encoder = FastEncoder(model, PRECISIONS[name])
        measured(f"ours {name}", encoder, frames, reference)
        kernels(f"ours {name}", partial(encoder, frames))


def kernels(row: str, work: Callable[[], Any]) -> None:
    """Where one clip's time on the GPU goes."""
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            started = time.perf_counter()
            work()
            torch.cuda.synchronize()
            wall = time.perf_counter() - started
        events = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
        events.sort(key=lambda event: -event.self_device_time_total)
        top = {event.key[:90]: [event.count, round(event.self_device_time_total / 1e3, 1)] for event in events[:14]}
        busy = sum(event.self_device_time_total for event in events) / 1e6
        report(row=f"kernels of {row}", busy_seconds=busy, wall_seconds=wall, count_and_ms=top)
    except Exception as failure:  # some hosts have no CUPTI
        report(row=f"kernels of {row}", failed=f"{type(failure).__name__}: {failure}"[:300])


def batch_rows(model: AutoencoderKLWan) -> None:
    """Images and small clips by themselves, and in the batches that the encode stage makes of them in 16 bits."""
    shapes = ((1, HEIGHT, WIDTH), (17, 256, 256))
    sizes = [Vae(model, "bfloat16").batch_size(shape) for shape in shapes]  # float32's own is 1
    for name in ("float32", "float16", "bfloat16"):
        vae = Vae(model, name)
        for shape, size in zip(shapes, sizes, strict=True):
            videos = torch.randint(0, 256, (size, *shape, 3), dtype=torch.uint8, device="cuda").permute(0, 4, 1, 2, 3)
            alone = torch.cat([vae.encode(video[None]) for video in videos])
            batch = vae.encode(videos)
            turned = vae.encode(videos.roll(1, 0)).roll(-1, 0)  # the same clips in other places, beside others
            report(
                row=f"{shape} by {name}", clips=size, alone=seconds(partial(vae.encode, videos[:1]), 5),
                together=seconds(partial(vae.encode, videos), 5) / size, same_elsewhere=torch.equal(batch, turned),
                apart=float((batch - alone).norm() / alone.norm()),
            )  # fmt: skip


def conv_rows() -> None:
    """One chunk's convolution at each width of the VAE, in TFLOP/s."""
    for channels, lines, pixels, frames in ((96, 480, 832, 16), (192, 240, 416, 16), (384, 120, 208, 8)):
        for dtype in (torch.bfloat16, torch.float16):
            padded = torch.randn(1, 1, frames + 2, lines + 2, pixels + 2, channels, device="cuda").to(dtype)
            compare_convs(padded, torch.randn(channels, channels, 3, 3, 3, device="cuda"))


def compare_convs(padded: Tensor, weight: Tensor) -> None:
    from triton.testing import do_bench

    from wan_core.encode.vae_kernels import conv3, conv_table

    channels, dtype = padded.shape[-1], padded.dtype
    work = 2 * 27 * channels**2 * (padded.shape[2] - 2) * (padded.shape[3] - 2) * (padded.shape[4] - 2) / 1e9
    table = conv_table(weight, dtype, 1)
    weight = weight.to(dtype, memory_format=torch.channels_last_3d)

    def cudnn() -> Tensor:
        return F.conv3d(padded[0].permute(0, 4, 1, 2, 3), weight).permute(0, 2, 3, 4, 1)

    expected = cudnn()

    def line(by: str, convolve: Callable[[], Tensor]) -> None:
        about = {"row": "conv", "by": by, "channels": channels, "dtype": str(dtype)}
        try:
            apart = float((convolve() - expected).float().norm() / expected.float().norm())
            report(**about, tflops=work / do_bench(convolve, 10, 40), apart=apart)
        except Exception as failure:  # the other choices are still worth their time
            report(**about, failed=f"{type(failure).__name__}: {failure}"[:300])

    line("cudnn", cudnn)
    choices: tuple[dict[str, Any], ...] = ({}, {"stages": 4}, {"warps": 4, "m": 128}, {"m": 128}, {"m": 256})
    for choice in choices:
        line(f"ours {choice}", partial(conv3, padded, table, dtype, **choice))


def text_rows(captions: int) -> None:
    from transformers import UMT5Config, UMT5EncoderModel

    from wan_core.encode.text import encode_ids

    config = UMT5Config(
        vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
        feed_forward_proj="gated-gelu", dropout_rate=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = UMT5EncoderModel(config).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(110), 0.5, captions).clip(4, 512).astype(int)
    ids = [rng.integers(2, 256000, n).tolist() for n in lengths]

    def whole(batch: int) -> list[Tensor]:
        out = []
        for start in range(0, captions, batch):
            rows = ids[start : start + batch]
            padded = torch.tensor([row + [0] * (512 - len(row)) for row in rows], device="cuda")
            with torch.no_grad():
                states = model(padded, (padded != 0).long()).last_hidden_state
            out += [state[: len(row)].clone() for state, row in zip(states, rows, strict=True)]
        return out

    encode_ids(model, ids)  # warms up
    reference: list[Tensor] = []
    for row, work in (
        ("one caption padded to 512 (WanPipeline)", lambda: whole(1)), ("32 captions padded to 512", lambda: whole(32)),
        ("ours", lambda: encode_ids(model, ids)),
    ):  # fmt: skip
        torch.cuda.synchronize()
        started = time.perf_counter()
        embeds = work()
        torch.cuda.synchronize()
        took = time.perf_counter() - started
        reference = reference or embeds
        pairs = zip(embeds, reference, strict=True)
        errors = [float((ours.float() - theirs.float()).norm() / theirs.float().norm()) for ours, theirs in pairs]
        report(
            row=f"UMT5-xxl bfloat16, {row}", captions_per_second=captions / took, largest_error=max(errors),
            mean_length=float(lengths.mean()), peak_gib=torch.cuda.max_memory_allocated() / 2**30,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parts = ("diffusers", "ours", "batches", "text", "convs")
    parser.add_argument("--only", nargs="*", choices=parts, default=parts[:4])
    parser.add_argument("--captions", type=int, default=256)
    arguments = parser.parse_args()
    device, cudnn = torch.cuda.get_device_name(), torch.backends.cudnn.version()
    report(row="device", device=device, torch=torch.__version__, cudnn=cudnn)
    chosen = set(arguments.only)
    if "convs" in chosen:
        conv_rows()
    if chosen & {"diffusers", "ours"}:
        video, model = clip(), published_vae()
        reference = reference_of(model, video)
        if "diffusers" in chosen:
            diffusers_rows(video, reference)
        if "ours" in chosen:
            our_rows(model, reference, video)
        del model, reference, video
        gc.collect()
        torch.cuda.empty_cache()
    if "batches" in chosen:
        batch_rows(published_vae())
    if "text" in chosen:
        text_rows(arguments.captions)


if __name__ == "__main__":
    main()

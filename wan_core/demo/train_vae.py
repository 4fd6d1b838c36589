"""Train the demo's small VAE on rendered clips: `python -m wan_core.demo.train_vae --output DIR --minutes 5`.

The demo's diffusion model has minutes to learn these latents, so they are made easy for it: every channel is held at
mean 0 and deviation 1, and the decoder is trained on latents with noise on them, so that an imperfect sample still
decodes to the right colour. Most batches are windows of 32x32 pixels and a few frames around the shape, an eighth of a
whole clip's cost and nearly all that there is to learn.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from wan_core.config import check
from wan_core.demo.videos import NUM_FRAMES, SIZES, ShapeScene, random_scene, render

WEIGHTS = Path(__file__).with_name("vae.safetensors")  # float16, to be loaded as float32
CONFIG = WEIGHTS.with_suffix(".json")  # the whole Diffusers config, latents_mean and latents_std included

WINDOW = 32  # pixels
WINDOW_JITTER = 18.0  # pixels from the shape's centre to the window's
WHOLE_SHARE = 0.3  # of the batches: whole clips


def new_vae() -> AutoencoderKLWan:
    """A small `AutoencoderKLWan`: strides (4, 8, 8), 16 latent channels, 1.9 million weights.

    Folding 2x2 pixels into channels (`patch_size`) replaces the first of WAN 2.1's three spatial strides: the blocks at
    full resolution are most of a small VAE's cost on a CPU.
    """
    return AutoencoderKLWan(
        base_dim=16, z_dim=16, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[True, True],
        in_channels=12, out_channels=12, patch_size=2,
    )  # fmt: skip


def load_vae(folder: Path = WEIGHTS.parent) -> AutoencoderKLWan:
    """The VAE in a folder, by default the committed one; float32, in evaluation mode."""
    vae = AutoencoderKLWan.from_config(json.loads((folder / CONFIG.name).read_text(encoding="utf-8")))
    vae.load_state_dict({name: tensor.float() for name, tensor in load_file(folder / WEIGHTS.name).items()})
    return vae.eval()


def to_model(frames: np.ndarray | Tensor, device: str = "cpu") -> Tensor:
    """uint8 [B, T, H, W, 3] to the VAE's float32 [B, 3, T, H, W] in [-1, 1]."""
    return torch.as_tensor(frames).to(device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def to_pixels(video: Tensor) -> np.ndarray:
    """[B, 3, T, H, W] in [-1, 1] to uint8 [B, T, H, W, 3]."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1).cpu().numpy()


def random_window(rng: np.random.Generator, scene: ShapeScene, num_frames: int) -> np.ndarray:
    """A window around the shape in a run of frames: uint8 [num_frames, 32, 32, 3]."""
    frames = render(scene)
    first = int(rng.integers(len(frames) - num_frames + 1))
    along = (first + num_frames / 2) / len(frames)
    centre = np.array(scene.start) + along * (np.array(scene.end) - np.array(scene.start))
    corner = centre + rng.uniform(-WINDOW_JITTER, WINDOW_JITTER, 2) - WINDOW / 2
    top, left = np.clip(corner, 0, (scene.height - WINDOW, scene.width - WINDOW)).astype(int)
    return frames[first : first + num_frames, top : top + WINDOW, left : left + WINDOW]


class Batches(IterableDataset[np.ndarray]):
    """Endless batches of clips of one shape, uint8 [B, T, H, W, 3]: windows, or a quarter as many whole clips."""

    def __init__(self, batch: int, seed: int) -> None:
        self.batch, self.seed = batch, seed

    def __iter__(self) -> Iterator[np.ndarray]:
        worker = get_worker_info()
        rng = np.random.default_rng((self.seed, worker.id if worker else 0))
        while True:
            if rng.random() < WHOLE_SHARE:
                size, frames = SIZES[rng.integers(len(SIZES))], int(rng.choice(NUM_FRAMES))
                scenes = (random_scene(rng, size=size, num_frames=frames) for _ in range(max(1, self.batch // 4)))
                yield np.stack([render(scene) for scene in scenes])
            else:
                frames = int(rng.choice(NUM_FRAMES, p=(0.7, 0.3)))
                scenes = (random_scene(rng, num_frames=max(NUM_FRAMES)) for _ in range(self.batch))
                yield np.stack([random_window(rng, scene, frames) for scene in scenes])


def vae_loss(
    vae: AutoencoderKLWan, video: Tensor, noise: float, kl_weight: float, moment_weight: float
) -> dict[str, Tensor]:
    """The parts of the loss on one batch.

    Args:
        video: [B, 3, T, H, W] in [-1, 1].
        noise: largest deviation of the noise on the latents, in theirs; each clip draws its own below it.
        kl_weight: of the divergence from a standard normal, per latent value.
        moment_weight: of every channel's mean and deviation over the batch, against 0 and 1.
    """
    posterior = vae.encode(video).latent_dist
    mean, logvar = posterior.mean, posterior.logvar
    deviation, centre = torch.std_mean(mean, dim=(0, 2, 3, 4))
    level = noise * torch.rand(len(video), 1, 1, 1, 1, device=video.device)
    spread = torch.exp(0.5 * logvar) + level * deviation.detach()[:, None, None, None]
    decoded = vae.decode(mean + spread * torch.randn_like(mean)).sample
    return {
        "l1": F.l1_loss(decoded, video),
        "mse": F.mse_loss(decoded, video),
        "kl": kl_weight * 0.5 * (mean.square() + logvar.exp() - logvar - 1).mean(),
        "moments": moment_weight * (centre.square() + (deviation - 1).square()).mean(),
    }


def train(vae: AutoencoderKLWan, args: argparse.Namespace) -> int:
    """Train for `args.minutes`; the learning rate falls to zero as a cosine of the time spent. Returns the steps."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    batches = iter(DataLoader(Batches(args.batch, args.seed), batch_size=None, num_workers=args.workers))
    begin, step, spent = time.monotonic(), 0, 0.0
    while spent < 1:
        rate = args.learning_rate * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * spent))
        for group in optimizer.param_groups:
            group["lr"] = rate
        video = to_model(next(batches), args.device)
        parts = vae_loss(vae, video, args.noise, args.kl, args.moments)
        loss = torch.stack(list(parts.values())).sum()
        check(bool(torch.isfinite(loss)), f"loss={loss.item()} at step {step} is not finite; lower --learning-rate")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        spent = (time.monotonic() - begin) / (60 * args.minutes)
        if step % args.log_every == 0 or spent >= 1:
            shown = " ".join(f"{name} {value.item():.5f}" for name, value in parts.items())
            print(f"step {step} {100 * spent:.0f}% {(time.monotonic() - begin) / step:.3f} s/step {shown}", flush=True)
    return step


@torch.no_grad()
def reconstruct(vae: AutoencoderKLWan, frames: np.ndarray) -> np.ndarray:
    """Encode and decode one clip, uint8 [T, H, W, 3], through the posterior's mean."""
    video = to_model(frames[None], str(vae.device))
    return to_pixels(vae.decode(vae.encode(video).latent_dist.mean).sample)[0]


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 clips, in dB."""
    mse = float(np.square(one.astype(np.float64) - other).mean())
    return 10 * math.log10(255**2 / max(mse, 1e-6))


@torch.no_grad()
def set_statistics(vae: AutoencoderKLWan, scenes: list[ShapeScene]) -> None:
    """Put each latent channel's mean and deviation over whole clips into the VAE's config."""
    clips = (to_model(render(scene)[None], str(vae.device)) for scene in scenes)
    latents = torch.cat([vae.encode(clip).latent_dist.mean[0].double().flatten(1) for clip in clips], dim=1)
    mean, std = (values.round(decimals=4).tolist() for values in (latents.mean(1), latents.std(1)))
    vae.register_to_config(latents_mean=mean, latents_std=std)


def save(vae: AutoencoderKLWan, folder: Path) -> None:
    """Write `vae.safetensors` (float16) and `vae.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().half().cpu().contiguous() for name, tensor in vae.state_dict().items()}
    save_file(state, folder / WEIGHTS.name)
    (folder / CONFIG.name).write_text(vae.to_json_string(), encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the demo's VAE on rendered clips.")
    parser.add_argument("--output", type=Path, required=True, help="folder for vae.safetensors and vae.json")
    parser.add_argument("--start", type=Path, help="folder of an earlier run's output to go on from")
    parser.add_argument("--minutes", type=float, default=5.0, help="length of the training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--workers", type=int, default=0, help="processes that render clips; 0: this one does")
    parser.add_argument("--batch", type=int, default=16, help="windows per step; a quarter as many whole clips")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--noise", type=float, default=0.25, help="largest noise on the latents, in their deviations")
    parser.add_argument("--kl", type=float, default=1e-5, help="weight of the KL divergence per latent value")
    parser.add_argument("--moments", type=float, default=0.05, help="weight of (mean, deviation) against (0, 1)")
    parser.add_argument("--statistics-clips", type=int, default=192, help="clips for latents_mean and latents_std")
    parser.add_argument("--log-every", type=int, default=50, help="steps between two lines of output")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    vae = (load_vae(args.start).train() if args.start else new_vae()).to(args.device)
    print(f"{sum(p.numel() for p in vae.parameters())} weights", flush=True)
    steps = train(vae, args)
    vae.eval()
    rng = np.random.default_rng(args.seed + 1)
    scenes = [random_scene(rng) for _ in range(args.statistics_clips)]
    set_statistics(vae, scenes)
    save(vae, args.output)
    clips = [render(scene) for scene in scenes]
    found = [psnr(clip, reconstruct(vae, clip)) for clip in clips]
    print(f"{steps} steps, held-out PSNR mean {np.mean(found):.2f} dB, lowest {min(found):.2f} dB")


if __name__ == "__main__":
    main()

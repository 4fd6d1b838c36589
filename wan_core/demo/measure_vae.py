"""Measure the demo's VAE and checker on clips that neither was made on: `python -m wan_core.demo.measure_vae`."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from wan_core.demo.checker import check_clip
from wan_core.demo.train_vae import WEIGHTS, load_vae, psnr, reconstruct
from wan_core.demo.videos import FPS, ShapeScene, random_scene, render
from wan_core.encode.video import load_video, write_video

PROPERTIES = ("colour", "shape", "direction")


def right(scene: ShapeScene, frames: np.ndarray) -> list[bool]:
    """Per property, whether the checker sees the scene's in uint8 [T, H, W, 3]."""
    seen = check_clip(frames)
    return [getattr(scene, name) == getattr(seen, name) for name in PROPERTIES]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure the demo's VAE and checker.")
    parser.add_argument("--vae", type=Path, default=WEIGHTS.parent, help="folder of vae.safetensors and vae.json")
    parser.add_argument("--clips", type=int, default=120)
    parser.add_argument("--seed", type=int, default=2024)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    vae, rng = load_vae(args.vae), np.random.default_rng(args.seed)
    ratios: dict[str, list[float]] = {"drawn": [], "H.264": []}
    marks: dict[str, list[list[bool]]] = {"H.264": [], "drawn, through the VAE": [], "H.264, through the VAE": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        for _ in range(args.clips):
            scene = random_scene(rng)
            drawn = render(scene)
            write_video(path, drawn, FPS)
            decoded, _ = load_video(path)
            marks["H.264"].append(right(scene, decoded))
            for name, clip in (("drawn", drawn), ("H.264", decoded)):
                reconstructed = reconstruct(vae, clip)
                ratios[name].append(psnr(clip, reconstructed))
                marks[f"{name}, through the VAE"].append(right(scene, reconstructed))
    for name, values in ratios.items():
        low = np.percentile(values, 5)
        print(f"PSNR, {name}: mean {np.mean(values):.2f} dB, 5th percentile {low:.2f} dB, lowest {min(values):.2f} dB")
    for name, rows in marks.items():
        shares = " ".join(f"{what} {share:.1%}" for what, share in zip(PROPERTIES, np.mean(rows, axis=0), strict=True))
        print(f"checker, {name}: {shares}")


if __name__ == "__main__":
    main()

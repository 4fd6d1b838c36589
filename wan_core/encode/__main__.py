"""`python -m wan_core.encode`: clips to WebDataset shards in one go."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from wan_core.config import EncodeConfig, ShardConfig, Size
from wan_core.data import shards
from wan_core.data.folder import checked_folder
from wan_core.encode import stage
from wan_core.records import ShardRecord


def main(argv: list[str] | None = None) -> ShardRecord:
    """Encode `--video_folder` into `--output_dir`, and write `--output_dir/shards/*.tar`."""
    args = _parser().parse_args(argv)
    if (args.height is None) != (args.width is None):
        raise ValueError(f"--height={args.height} and --width={args.width} go together; give both or neither")
    if args.height and args.sizes:
        raise ValueError("--height, --width and --sizes say the same; give the one or the other")
    sizes = (Size(args.height, args.width),) if args.height else args.sizes or EncodeConfig().sizes
    config = EncodeConfig(
        sizes=sizes, max_frames=args.max_frames, min_frames=min(args.min_frames, args.max_frames), fps=args.fps,
        mode=args.mode, center_crop=args.center_crop, tokens_per_sample=args.tokens_per_sample,
        bucket_frames=args.bucket_frames, window_frames=args.window_frames, window_stride=args.window_stride,
        scene_detector=args.scene_detector, scene_threshold=args.scene_threshold, vae_dtype=args.vae_dtype,
        text_dtype=args.text_dtype,
    )  # fmt: skip
    sharding = ShardConfig(max_samples=args.shard_maxcount, val_share=args.val_share)
    encoded = stage.run(config, checked_folder(args.video_folder), args.model, args.output_dir, args.device)
    record = shards.run(sharding, encoded, args.output_dir / "shards")
    counts = ", ".join(f"{n} {split}" for split, n in record.num_samples.items())
    print(f"{len(record.shards)} shards ({counts} samples) in {record.path}; {encoded.num_quarantined} quarantined")
    return record


def _parser() -> argparse.ArgumentParser:
    """Every option is accepted with underscores and with hyphens."""
    default, sharding = EncodeConfig(), ShardConfig()
    parser = argparse.ArgumentParser(prog="python -m wan_core.encode", description=main.__doc__)

    def add(name: str, **settings: object) -> None:
        spellings = sorted({f"--{name}", f"--{name.replace('_', '-')}"}, reverse=True)
        parser.add_argument(*spellings, dest=name, **settings)  # type: ignore[arg-type]

    add("video_folder", required=True, help="clips and their captions: a folder, or a URL (s3://bucket/clips)")
    add("output_dir", type=Path, required=True, help="encoded parts, and shards/*.tar below")
    add("model", type=Path, required=True, help="Diffusers folder with tokenizer, text_encoder and vae")
    add("height", type=int, help=f"pixels, a multiple of 16 (default {default.sizes[0].height})")
    add("width", type=int, help=f"pixels, a multiple of 16 (default {default.sizes[0].width})")
    add("sizes", type=_sizes, metavar="HxW,...", help="several: a clip goes to the one of nearest aspect ratio")
    add("center_crop", action="store_true", help="scale to cover the size and cut the centre; else stretch to it")
    add("mode", choices=("video", "frames"), default=default.mode, help="frames: images, or first frames of clips")
    add("max_frames", type=int, default=default.max_frames, help="4n+1 (default %(default)s)")
    add("min_frames", type=int, default=default.min_frames, help="shorter clips are quarantined (default %(default)s)")
    add("fps", type=float, default=default.fps, help="clips are resampled to it (default %(default)s)")
    add("tokens_per_sample", type=int, default=0, help="above 0: shapes from buckets of at most so many tokens")
    add(
        "bucket_frames", type=_lengths, default=default.bucket_frames, metavar="N,...",
        help=f"lengths of the buckets, 4n+1 each (default {','.join(map(str, default.bucket_frames))})",
    )  # fmt: skip
    add("window_frames", type=int, default=0, help="above 0: long videos are cut into windows of so many frames")
    add("window_stride", type=int, default=0, help="frames between the starts of windows (default: no overlap)")
    add("scene_detector", choices=("none", "content", "adaptive"), default="none", help="cut videos at scene changes")
    add("scene_threshold", type=float, default=0.0, help="of the detector (default: its own)")
    add("vae_dtype", choices=("float32", "float16x3", "float16", "bfloat16"), default=default.vae_dtype)
    add("text_dtype", choices=("float32", "bfloat16"), default=default.text_dtype)
    add("shard_maxcount", type=int, default=sharding.max_samples, help="samples per shard (default %(default)s)")
    add("val_share", type=float, default=sharding.val_share, help="share of validation files (default %(default)s)")
    add("device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s")
    return parser


def _sizes(text: str) -> tuple[Size, ...]:
    return tuple(Size.parse(part) for part in text.split(","))


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")

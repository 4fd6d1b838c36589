"""The sample stage: prompts, and first frames, to videos with UniPC and classifier-free guidance.

    python -m wan_core.sample --task t2v-1.3B --checkpoint_dir RUN_DIR/checkpoints --model DIFFUSERS_DIR \\
        --sizes 480*832 --frame_nums 81 --sample_steps 50 --prompts "a cat on a beach" --output_dir samples
    python -m wan_core.sample --task i2v-14B --model DIFFUSERS_DIR --image cat.png --prompts "a cat on a beach"
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from wan_core.architecture import Architecture
from wan_core.config import VAE_SPATIAL_STRIDE, VAE_TEMPORAL_STRIDE, SampleConfig, Size, check
from wan_core.digests import cached_file_digest, encoder_identity
from wan_core.encode.image import load_image_encoder, read_first_frame
from wan_core.encode.text import load_text_encoder
from wan_core.encode.vae import load_vae
from wan_core.first_frame import FirstFrame, behind, pack_first_frames
from wan_core.output import writing
from wan_core.packing import Packing, pack_text
from wan_core.patch import GridSize, patchify, unpatchify
from wan_core.records import SampleRecord, find_record, fingerprint


@dataclass(frozen=True)
class Condition:
    """What one video is made from: a prompt, what it is steered away from, and the first frame for image-to-video."""

    prompt: Tensor  # [n <= 512, text_dim]
    negative: Tensor  # [m <= 512, text_dim]
    first_frame: FirstFrame | None = None

    def to(self, device: torch.device) -> Condition:
        frame = self.first_frame.to(device) if self.first_frame else None
        return Condition(self.prompt.to(device), self.negative.to(device), frame)


def stage_fingerprint(config: SampleConfig, model: Path) -> str:
    """Identity of the samples of a Diffusers folder: its weights, the sampler's settings and the images.

    Raises:
        ValueError: images are missing, or are given to a text-to-video model.
    """
    Architecture.from_diffusers(model).check_images(config.images, len(config.prompts))
    weights = {p.name: cached_file_digest(p) for p in sorted((model / "transformer").glob("*.safetensors"))}
    images = [cached_file_digest(Path(name)) for name in config.images]
    return fingerprint("sample", config, weights=weights, encoder=encoder_identity(model), images=images)


def run(config: SampleConfig, model: Path, output_dir: Path, device: str | None = None) -> SampleRecord:
    """Sample every prompt from a Diffusers folder and write `<number>.mp4` and `contact_sheet.png`.

    Raises:
        ValueError: no prompts, no first frames for an image-to-video model, or the folder is not a WAN model.
    """
    check(bool(config.prompts), "sample.prompts is empty; give at least one prompt")
    wanted = stage_fingerprint(config, model)
    if found := find_record(SampleRecord, output_dir, wanted):
        return found
    from wan_core.encode.video import write_video  # PyAV, which a run's own samples do without

    with writing("sample", output_dir, config, wanted) as output:
        videos = []
        for number, frames in sample_videos(config, model, None, _device(device)):
            videos.append(output.path / f"{number:03d}.mp4")
            write_video(videos[-1], frames, config.fps)
        contact_sheet(videos, config.prompts, output.path / "contact_sheet.png")
        seeds = tuple(config.seed + i for i in range(len(videos)))
        return output.finish(SampleRecord, videos=tuple(videos), prompts=config.prompts, seeds=seeds)


def _device(name: str | None) -> torch.device:
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def sample_videos(
    config: SampleConfig, model: Path, checkpoint: Path | None, device: torch.device
) -> Iterator[tuple[int, Any]]:
    """Number and frames, uint8 [T, H, W, 3], of every prompt's video.

    Encoders, transformer and VAE are loaded one after the other, so that the largest alone has to fit.

    Args:
        model: Diffusers folder.
        checkpoint: an iteration folder whose weights replace the folder's transformer, or None.

    Raises:
        ValueError: an image-to-video model has no image for each prompt, or a text-to-video model has some.
    """
    from wan_core.inference import architecture_of, loaded_transformer

    architecture_of(model, checkpoint).check_images(config.images, len(config.prompts))
    conditions = encode_conditions(config, model, device)
    frames = (config.num_frames - 1) // VAE_TEMPORAL_STRIDE + 1
    shape = (frames, config.size.height // VAE_SPATIAL_STRIDE, config.size.width // VAE_SPATIAL_STRIDE)
    latents: list[Tensor] = []
    with loaded_transformer(model, checkpoint, getattr(torch, config.dtype), device) as transformer:
        tokens = GridSize(shape[0], shape[1] // 2, shape[2] // 2).num_tokens
        per_batch = max(1, config.batch_tokens // (2 * tokens))
        batches = [range(len(conditions))[i : i + per_batch] for i in range(0, len(conditions), per_batch)]
        channels = transformer.config.out_channels
        with tqdm(total=len(batches) * config.num_steps, desc="sample", unit="step", disable=None) as bar:
            for batch in batches:
                noise = torch.stack([initial_noise((channels, *shape), config.seed + i) for i in batch]).to(device)
                chosen = [conditions[i] for i in batch]
                latents += denoise(config, transformer, noise, chosen, model, bar.update).unbind()
    gc.collect()
    vae = load_vae(model, "float32", device)
    for number, sample in enumerate(latents):
        yield number, to_frames(vae.decode(sample.unsqueeze(0))[0])


def to_frames(video: Tensor) -> Any:
    """[3, T, H, W] in [-1, 1] to uint8 [T, H, W, 3]."""
    pixels = ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(1, 2, 3, 0).cpu().numpy()


def initial_noise(shape: Sequence[int], seed: int) -> Tensor:
    """float32 noise of a seed's own generator, drawn on the CPU: the same on every device."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def encode_conditions(config: SampleConfig, model: Path, device: torch.device) -> list[Condition]:
    """What each prompt's video is made from, encoded."""
    frames = encode_images(config, model, device) if config.images else [None] * len(config.prompts)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    *prompts, negative = load_text_encoder(model, dtype, device).encode([*config.prompts, config.negative_prompt])
    return [Condition(text, negative, frame).to(device) for text, frame in zip(prompts, frames, strict=True)]


def encode_images(config: SampleConfig, model: Path, device: torch.device) -> list[FirstFrame]:
    """First frames of the config's images."""
    images = [read_first_frame(Path(name), config.size) for name in config.images]
    encoder, vae = load_image_encoder(model, device), load_vae(model, "float32", device)
    return [
        FirstFrame(vae.encode_first_frame(torch.tensor(image), config.num_frames), encoder.encode(image))
        for image in images
    ]


@torch.no_grad()
def denoise(
    config: SampleConfig,
    transformer: Any,
    noise: Tensor,
    conditions: Sequence[Condition],
    model: Path,
    progress: Callable[[], Any] = lambda: None,
) -> Tensor:
    """Noise [n, C, T, H, W] to latents of the same shape, float32.

    Prompts and their negatives are packed into one sequence: one forward a step.

    Args:
        progress: called after each step.
    """
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler.from_pretrained(model / "scheduler", flow_shift=config.shift)
    scheduler.set_timesteps(config.num_steps, device=noise.device)
    guided = config.guidance_scale > 1
    text = [c.prompt for c in conditions] + [c.negative for c in conditions] * guided
    frames = [c.first_frame for c in conditions if c.first_frame] * (1 + guided)
    given, image_embeds = pack_first_frames(frames)
    grid = GridSize.of(noise[0])
    packing, rows = Packing.of([grid] * len(text), text), pack_text(text)
    latents = noise
    for timestep in scheduler.timesteps:
        patches = torch.cat([patchify(sample) for sample in latents])
        patches = torch.cat([patches, patches]) if guided else patches
        timesteps = timestep.double().expand(len(text))
        output = transformer(behind(patches, given), timesteps, rows, packing, image_embeds).float()
        velocity = torch.stack([unpatchify(tokens, grid) for tokens in output.split(grid.num_tokens)])
        if guided:
            conditional, unconditional = velocity.chunk(2)
            velocity = unconditional + config.guidance_scale * (conditional - unconditional)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        progress()
    return latents


def contact_sheet(videos: Sequence[Path], prompts: Sequence[str], path: Path, columns: int = 5) -> None:
    """A PNG with a row per video: frames from first to last, and the prompt."""
    from PIL import Image, ImageDraw

    from wan_core.encode.video import load_video

    thumb, caption = 128, 18
    rows = []
    for video, prompt in zip(videos, prompts, strict=True):
        frames, _ = load_video(video)
        picked = [frames[round(i * (len(frames) - 1) / max(columns - 1, 1))] for i in range(min(columns, len(frames)))]
        images = [Image.fromarray(frame) for frame in picked]
        images = [image.resize((round(image.width * thumb / image.height), thumb)) for image in images]
        row = Image.new("RGB", (sum(i.width for i in images), thumb + caption), "white")
        ImageDraw.Draw(row).text((4, 3), prompt[: row.width // 6], fill="black")
        left = 0
        for image in images:
            row.paste(image, (left, caption))
            left += image.width
        rows.append(row)
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    sheet.save(path)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="wan_core.sample", description="Sample videos from a checkpoint.")
    result.add_argument(
        "--task", help="t2v-1.3B, t2v-14B, i2v-14B, or t2v-custom, i2v-custom for other sizes: what the model must be"
    )
    result.add_argument(
        "--checkpoint_dir", type=Path, help="checkpoints of a training run (default: --model's own weights)"
    )
    result.add_argument("--checkpoint_step", type=int, help="which checkpoint (default: the latest)")
    result.add_argument("--model", type=Path, required=True, help="Diffusers folder: VAE, text encoder, scheduler")
    result.add_argument("--prompts", nargs="+", required=True, help="prompts, or one .txt file with a prompt per line")
    result.add_argument("--image", nargs="+", default=[], help="of an image-to-video model: the first frame per prompt")
    result.add_argument("--negative_prompt", help="what to steer away from (default: WAN 2.1's own)")
    result.add_argument("--sizes", type=Size.parse, nargs="+", default=[Size(480, 832)], help="HEIGHT*WIDTH")
    result.add_argument("--frame_nums", type=int, nargs="+", default=[81], help="frames, 4n+1; 1 makes an image")
    result.add_argument("--sample_steps", type=int, default=50)
    result.add_argument("--guidance_scale", type=float, default=5.0)
    result.add_argument("--sample_shift", type=float, default=5.0)
    result.add_argument("--base_seed", type=int, default=0)
    result.add_argument("--output_dir", type=Path, default=Path("samples"))
    return result


def main() -> None:
    args = parser().parse_args()
    try:
        prompts = args.prompts
        if len(prompts) == 1 and prompts[0].endswith(".txt"):
            prompts = [line for line in Path(prompts[0]).read_text(encoding="utf-8").splitlines() if line.strip()]
        device = _device(None)
        from wan_core.convert.checkpoint import iteration_dir
        from wan_core.inference import architecture_of, check_task

        checkpoint = iteration_dir(args.checkpoint_dir, args.checkpoint_step) if args.checkpoint_dir else None
        if args.task is not None:
            check_task(args.task, architecture_of(args.model, checkpoint))
        from wan_core.encode.video import write_video

        args.output_dir.mkdir(parents=True, exist_ok=True)
        for size in args.sizes:
            for num_frames in args.frame_nums:
                config = SampleConfig(
                    prompts=tuple(prompts), images=tuple(args.image), size=size, num_frames=num_frames,
                    num_steps=args.sample_steps, guidance_scale=args.guidance_scale, shift=args.sample_shift,
                    seed=args.base_seed, dtype="bfloat16" if device.type == "cuda" else "float32",
                    **({} if args.negative_prompt is None else {"negative_prompt": args.negative_prompt}),
                )  # fmt: skip
                for number, frames in sample_videos(config, args.model, checkpoint, device):
                    path = args.output_dir / f"{size}_{num_frames}_{number:03d}.mp4"
                    write_video(path, frames, config.fps)
                    print(json.dumps({"video": str(path), "prompt": prompts[number], "seed": config.seed + number}))
    except ValueError as error:
        sys.exit(f"wan_core.sample: {error}")


if __name__ == "__main__":
    main()

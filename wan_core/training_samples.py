"""Videos from fixed prompts and seeds while a run trains, from the very weights that it trains, in any layout."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

from wan_core import ema
from wan_core.architecture import Architecture
from wan_core.config import (
    NEGATIVE_PROMPT,
    PATCH_SIZE,
    VAE_SPATIAL_STRIDE,
    VAE_TEMPORAL_STRIDE,
    SampleConfig,
    Size,
    check,
)  # fmt: skip
from wan_core.packing import Packing
from wan_core.parallel import Parallel
from wan_core.sample import Condition, denoise, encode_conditions, initial_noise, to_frames


@dataclass
class SamplesConfig:
    """Which videos a run shows; they cost num_steps forwards of all prompts each time."""

    interval: int = 0  # steps from one time to the next; 0: never
    prompts: tuple[str, ...] = ()
    images: tuple[str, ...] = ()  # of an image-to-video model: the first frame of each prompt's video
    negative_prompt: str = NEGATIVE_PROMPT
    height: int = 480
    width: int = 832
    num_frames: int = 17
    num_steps: int = 20
    guidance_scale: float = 5.0
    shift: float = 5.0
    seed: int = 0  # prompt i uses seed + i
    batch_tokens: int = 32768  # prompts are packed into one forward up to this many tokens

    def check(self, architecture: Architecture) -> None:
        """Raises `ValueError` for what cannot be sampled."""
        if self.interval:
            check(bool(self.prompts), "samples.interval is set, but samples.prompts is empty; give some, or interval=0")
            architecture.check_images(self.images, len(self.prompts))
            self.sampler()

    def sampler(self) -> SampleConfig:
        return SampleConfig(
            prompts=self.prompts, images=self.images, negative_prompt=self.negative_prompt,
            size=Size(self.height, self.width), num_frames=self.num_frames, num_steps=self.num_steps,
            guidance_scale=self.guidance_scale, shift=self.shift, seed=self.seed, batch_tokens=self.batch_tokens,
        )  # fmt: skip


@dataclass
class LayoutTransformer:
    """The training model as `denoise` calls one: the whole sequence in, the whole velocity out, on every rank."""

    model: list[Any]
    parallel: Parallel = field(init=False)

    def __post_init__(self) -> None:
        self.parallel = Parallel.current(get_model_config(self.model[0]).sequence_parallel)

    def __call__(
        self, patches: Tensor, timesteps: Tensor, text_embeds: Tensor, packing: Packing,
        image_embeds: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As `WanModel.forward`, of whole sequences: [tokens, 4 * in_channels] -> [tokens, 4 * out_channels]."""
        ranks, parallel = self.parallel.sequence_ranks, self.parallel
        tokens = -(-packing.num_real_tokens // ranks) * ranks
        local = replace(packing, num_tokens=tokens, start=0, stop=-1).part(parallel.cp_rank, parallel.cp)
        padded = F.pad(patches, (0, 0, 0, tokens - packing.num_real_tokens))[local.start : local.stop]
        velocity = self._forward(padded, timesteps, text_embeds, local, image_embeds).contiguous()
        if parallel.cp > 1:
            shares = [torch.empty_like(velocity) for _ in range(parallel.cp)]
            dist.all_gather(shares, velocity, group=parallel.cp_group)
            velocity = torch.cat(shares)
        return velocity[: packing.num_real_tokens]

    def _forward(self, patches: Tensor, *others: Any) -> Tensor:
        """This context-parallel rank's share, through all pipeline stages."""
        if self.parallel.pp == 1:
            return self.model[0](patches, *others).float()

        def step(_: Any, model: Any) -> Any:
            return model(patches, *others), lambda output, non_loss_data: output

        outputs = get_forward_backward_func()(
            forward_step_func=step, data_iterator=None, model=self.model, num_microbatches=1,
            seq_length=len(patches), micro_batch_size=1, forward_only=True, collect_non_loss_data=True,
        )  # fmt: skip
        shape = len(patches), get_model_config(self.model[0]).out_channels * math.prod(PATCH_SIZE)
        velocity = outputs[0].float() if self.parallel.is_last_stage else patches.new_empty(shape).float()
        last = dist.get_global_rank(self.parallel.pp_group, self.parallel.pp - 1)  # type: ignore[arg-type]
        dist.broadcast(velocity, last, group=self.parallel.pp_group)
        return velocity


class SampleVideos(Callback):
    """Samples every `interval` steps; the last rank writes `<run_dir>/samples/iter_<n>/<i>.gif` and logs them."""

    def __init__(self, config: SamplesConfig, model_dir: Path | None, run_dir: Path, use_ema: bool) -> None:
        if model_dir is None:
            raise ValueError("samples.interval needs a text encoder and a VAE; give --model, or samples.interval=0")
        self.config, self.sampler, self.model_dir = config, config.sampler(), model_dir
        self.folder, self.use_ema = run_dir / "samples", use_ema
        self.conditions: list[Condition] = []
        self.vae: Any = None

    def on_train_start(self, context: CallbackContext) -> None:
        """Encode prompts and images once, on one rank: the text encoder may be larger than the model."""
        found: list[Any] = [None]
        if dist.get_rank() == 0:
            conditions = encode_conditions(self.sampler, self.model_dir, device())
            found = [[condition.to(torch.device("cpu")) for condition in conditions]]
        dist.broadcast_object_list(found, 0)
        self.conditions = [condition.to(device()) for condition in found[0]]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def on_train_step_end(self, context: CallbackContext) -> None:
        iteration = context.state.train_state.step + 1
        if iteration % self.config.interval == 0:
            frames = self.sample(context)
            if frames is not None:
                self.show(context, iteration, frames)

    @torch.no_grad()
    def sample(self, context: CallbackContext) -> list[np.ndarray] | None:
        """The videos, uint8 [T, H, W, 3] each, on the ranks that hold the last stage's last shard; None elsewhere."""
        parallel = Parallel.current()
        with evaluating(context.model), contextlib.ExitStack() as stack:
            if self.use_ema:
                stack.enter_context(ema.averaged(context.model, context.optimizer))
            latents = self._latents(context.model, parallel)
        if not (parallel.is_last_stage and parallel.tp_rank == parallel.tp - 1 and parallel.cp_rank == parallel.cp - 1):
            return None
        if self.vae is None:
            from wan_core.encode.vae import load_vae

            self.vae = load_vae(self.model_dir, "float32", device())
        mine = {index: to_frames(self.vae.decode(sample[None])[0]) for index, sample in latents.items()}
        shares: list[Any] = [None] * parallel.dp
        dist.all_gather_object(shares, mine, group=parallel.dp_group)
        every = {index: frames for share in shares for index, frames in share.items()}
        return [every[index] for index in range(len(self.conditions))]

    def _latents(self, model: list[Any], parallel: Parallel) -> dict[int, Tensor]:
        """Latents by prompt number: data-parallel rank r of d takes the prompts r, r + d, ..."""
        config = self.sampler
        shape = (
            get_model_config(model[0]).out_channels, (config.num_frames - 1) // VAE_TEMPORAL_STRIDE + 1,
            config.size.height // VAE_SPATIAL_STRIDE, config.size.width // VAE_SPATIAL_STRIDE,
        )  # fmt: skip
        share = -(-len(self.conditions) // parallel.dp)  # alike on all ranks, which may have to gather weights together
        mine = [(parallel.dp_rank + i * parallel.dp) % len(self.conditions) for i in range(share)]
        per_batch = max(1, config.batch_tokens // (2 * math.prod(shape[1:]) // 4))
        transformer = LayoutTransformer(model)
        latents: dict[int, Tensor] = {}
        for begin in range(0, share, per_batch):
            batch = mine[begin : begin + per_batch]
            noise = torch.stack([initial_noise(shape, config.seed + i) for i in batch]).to(device())
            conditions = [self.conditions[i] for i in batch]
            latents |= zip(batch, denoise(config, transformer, noise, conditions, self.model_dir), strict=True)
        return latents

    def show(self, context: CallbackContext, iteration: int, frames: list[np.ndarray]) -> None:
        """Write and log the videos, on the last rank, where Bridge's loggers live."""
        if dist.get_rank() != dist.get_world_size() - 1:
            return
        folder, state = self.folder / f"iter_{iteration:07d}", context.state
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "prompts.txt").write_text("\n".join(self.config.prompts) + "\n", encoding="utf-8")
        for index, video in enumerate(frames):
            path, tag = folder / f"{index:03d}.gif", f"samples/{index:03d}"
            path.write_bytes(gif(video, self.sampler.fps))
            if state.tensorboard_logger:
                add_gif(state.tensorboard_logger, tag, path.read_bytes(), iteration)
            if state.wandb_logger:
                caption = self.config.prompts[index]
                state.wandb_logger.log({tag: state.wandb_logger.Video(str(path), caption=caption)}, iteration)
            if state.mlflow_logger:
                state.mlflow_logger.log_artifact(str(path), f"samples/iter_{iteration:07d}")


@contextlib.contextmanager
def evaluating(model: list[Any]) -> Iterator[None]:
    """The chunks in evaluation mode, with whole weights and without the hooks that gather them piece by piece."""
    hooked = [chunk for chunk in model if getattr(chunk, "remove_forward_pre_hook_handles", None)]
    for chunk in hooked:
        chunk.disable_forward_pre_hook(param_sync=True)
    for chunk in model:
        chunk.eval()
    try:
        yield
    finally:
        for chunk in model:
            chunk.train()
        for chunk in hooked:
            chunk.enable_forward_pre_hook()


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def gif(frames: np.ndarray, fps: float) -> bytes:
    """An endless animation of uint8 frames [T, H, W, 3]."""
    from PIL import Image

    images, buffer = [Image.fromarray(frame) for frame in frames], BytesIO()
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
    return buffer.getvalue()


def add_gif(writer: Any, tag: str, data: bytes, iteration: int) -> None:
    """Log an animation to TensorBoard, as `add_video` does, which needs moviepy to make one."""
    from PIL import Image
    from tensorboard.compat.proto.summary_pb2 import Summary

    width, height = Image.open(BytesIO(data)).size
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
    writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), iteration)

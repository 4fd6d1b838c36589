"""diffusers' transformer with random weights, and ours with the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor

from wan_core.architecture import Architecture
from wan_core.convert.mapping import from_diffusers, to_diffusers
from wan_core.model.config import WanTransformerConfig
from wan_core.model.model import WanModel
from wan_core.packing import Packing, pack_text
from wan_core.patch import GridSize, patchify, unpatchify

SIZES = {
    "head_dim 16": Architecture(64, 160, 4, 2, text_dim=48, freq_dim=64),
    "head_dim 24": Architecture(96, 256, 4, 3, text_dim=32, freq_dim=256),
    "head_dim 32, one head": Architecture(32, 96, 1, 1, text_dim=48, freq_dim=64),
    "image to video": Architecture(64, 160, 4, 2, in_channels=36, text_dim=48, freq_dim=64, image_dim=40),
}


def reference_model(architecture: Architecture, seed: int = 0) -> WanTransformer3DModel:
    """Random weights, also where diffusers starts from zeros and ones: a swapped bias must show."""
    torch.manual_seed(seed)
    model = WanTransformer3DModel(**architecture.to_diffusers())
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.float()


def our_model(reference: WanTransformer3DModel, architecture: Architecture, **values: Any) -> WanModel:
    """WanModel with the reference's weights; call inside `parallel.layout()`."""
    defaults = {"params_dtype": torch.float32, "use_cpu_initialization": True, "transformer_impl": "local"}
    values = {**defaults, "pipeline_dtype": values.get("params_dtype", torch.float32), **values}
    model = WanModel(WanTransformerConfig.of(architecture, **values))
    model.load_state_dict(dict(from_diffusers(reference.state_dict(), architecture)), strict=False)  # TE: extra state
    return model


def our_weights(model: WanModel) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@dataclass(frozen=True)
class Inputs:
    latents: tuple[Tensor, ...]  # [16, T, H, W] each
    timesteps: Tensor  # [n]
    text_embeds: Tensor  # [n, 512, text_dim]
    image_embeds: Tensor | None = None  # [n, 257, image_dim]

    @classmethod
    def random(
        cls, architecture: Architecture, shapes: Sequence[tuple[int, int, int]], seed: int = 1, short_text: bool = True
    ) -> Inputs:
        """Latents of these (T, H, W), texts of different lengths with zeros behind them (or of all 512 positions)."""
        generator = torch.Generator().manual_seed(seed)
        text = torch.randn(len(shapes), 512, architecture.text_dim, generator=generator)
        for index in range(len(shapes) if short_text else 0):
            text[index, 11 * (index + 1) :] = 0
        return cls(
            tuple(torch.randn(architecture.in_channels, *shape, generator=generator) for shape in shapes),
            torch.rand(len(shapes), generator=generator) * 1000,
            text,
            torch.randn(len(shapes), 257, architecture.image_dim, generator=generator)
            if architecture.image_dim
            else None,
        )

    @property
    def texts(self) -> list[Tensor]:
        """Each text at its true length, [n, text_dim]."""
        return [text[: int(text.any(-1).sum())] for text in self.text_embeds]

    def to(self, dtype: torch.dtype) -> Inputs:
        """All but the timesteps."""
        image = None if self.image_embeds is None else self.image_embeds.to(dtype)
        return Inputs(tuple(x.to(dtype) for x in self.latents), self.timesteps, self.text_embeds.to(dtype), image)

    def requires_grad(self) -> Inputs:
        for latents in self.latents:
            latents.requires_grad_()
        return self


def run_ours(model: WanModel, inputs: Inputs, multiple: int = 1) -> list[Tensor]:
    """Every sample's velocity [16, T, H, W], from one pack."""
    packing = Packing.of([GridSize.of(latents) for latents in inputs.latents], inputs.texts, multiple)
    patches = torch.cat([patchify(latents) for latents in inputs.latents])
    patches = F.pad(patches, (0, 0, 0, packing.num_tokens - packing.num_real_tokens))
    image = None if inputs.image_embeds is None else inputs.image_embeds.flatten(0, 1)
    output = model(patches, inputs.timesteps.double(), pack_text(inputs.texts), packing, image)
    samples = output[: packing.num_real_tokens].split(packing.lengths)
    return [unpatchify(tokens, grid) for tokens, grid in zip(samples, packing.grids, strict=True)]


def run_reference(model: WanTransformer3DModel, inputs: Inputs) -> list[Tensor]:
    """The same, one sample at a time."""
    images = [None] * len(inputs.latents) if inputs.image_embeds is None else [x[None] for x in inputs.image_embeds]
    rows = zip(inputs.latents, inputs.timesteps, inputs.text_embeds, images, strict=True)
    return [model(x[None], t[None], text[None], image, return_dict=False)[0][0] for x, t, text, image in rows]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def gradients(model: WanModel, architecture: Architecture) -> dict[str, Tensor]:
    """Our gradients under diffusers' names."""
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(grad is not None for grad in grads.values()), [n for n, g in grads.items() if g is None]
    return to_diffusers({name: grad for name, grad in grads.items() if grad is not None}, architecture)

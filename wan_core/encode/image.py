"""Images to what an image-to-video model attends to, through CLIP."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from wan_core.architecture import Architecture
from wan_core.config import IMAGE_LENGTH, Size, check
from wan_core.encode.vae_precision import allow_tf32

if TYPE_CHECKING:  # imported where it is used: it takes seconds, and a run whose stages are all cached needs none
    from transformers import CLIPVisionModel


class ImageEncoder:
    """CLIP's vision model and its preprocessing, float32."""

    def __init__(self, processor: Any, model: CLIPVisionModel) -> None:
        self.processor, self.model = processor, model.eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, image: np.ndarray) -> Tensor:
        """uint8 [H, W, 3] to the hidden states before the last layer, float32 [257, image_dim], on CLIP's device."""
        from PIL import Image

        pixels = self.processor(images=Image.fromarray(image), return_tensors="pt").pixel_values
        with allow_tf32(False):
            states = self.model(pixels.to(self.model.device), output_hidden_states=True).hidden_states
        return states[-2][0]


def load_image_encoder(model_dir: Path, device: torch.device | str) -> ImageEncoder:
    """The image encoder of a Diffusers folder.

    Raises:
        ValueError: it gives another number or size of embeddings than the transformer attends to.
    """
    from transformers import CLIPImageProcessor, CLIPVisionModel

    processor = CLIPImageProcessor.from_pretrained(model_dir / "image_processor", local_files_only=True)
    model = CLIPVisionModel.from_pretrained(model_dir / "image_encoder", dtype=torch.float32, local_files_only=True)
    config, image_dim = model.config, Architecture.from_diffusers(model_dir).image_dim
    found = (config.image_size // config.patch_size) ** 2 + 1, config.hidden_size
    check(
        found == (IMAGE_LENGTH, image_dim),
        f"{model_dir / 'image_encoder'} gives {found[0]} embeddings of {found[1]}, but the transformer attends to "
        f"{IMAGE_LENGTH} of {image_dim}; give the image encoder that belongs to the model",
    )
    return ImageEncoder(processor, model.to(device))


def read_first_frame(path: Path, size: Size) -> np.ndarray:
    """An image file, upright, scaled to cover a size and cut in the middle: uint8 [H, W, 3].

    Raises:
        ValueError: it is no image.
    """
    from PIL import Image, ImageOps

    from wan_core.encode.picture import upright_rgb

    try:
        with Image.open(path) as image:
            upright = upright_rgb(image)
    except Exception as error:  # Pillow meets damaged files with errors of any type
        raise ValueError(f"image {path} cannot be read ({error}); give a .png, .jpg or .webp file") from error
    return np.asarray(ImageOps.fit(upright, (size.width, size.height), Image.Resampling.BICUBIC))

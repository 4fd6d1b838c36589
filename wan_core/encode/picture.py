"""Image files as a viewer shows them."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps


def upright_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB: turned as its EXIF tag says, 16-bit grey scaled to 8 bits, what is transparent over white."""
    upright = ImageOps.exif_transpose(image)  # cameras store the sensor's picture and, in a tag, how it was held
    if upright.mode.startswith("I;16"):  # Pillow would clip it: nearly all of it to white
        grey = (np.asarray(upright, np.uint32) + 128) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if upright.has_transparency_data:
        picture = upright.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return upright.convert("RGB")

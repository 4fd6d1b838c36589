"""What all configs share: sizes of WAN 2.1, what bears identity, and refusals in a sentence."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated, Any, Literal

from pydantic import ConfigDict

from wan_core.config.ranges import Range
from wan_core.described import described

VAE_TEMPORAL_STRIDE = 4
VAE_SPATIAL_STRIDE = 8
PATCH_SIZE = (1, 2, 2)  # frames, height, width, in latents
SIZE_MULTIPLE = VAE_SPATIAL_STRIDE * PATCH_SIZE[1]
TEXT_LENGTH = 512  # positions that cross-attention sees, see encode/text.py
IMAGE_LENGTH = 257  # tokens of CLIP ViT-H, one of them for the whole image: what image-to-video models attend to

# Text embeddings that a dataset holds beside its samples: what may stand in the place of a dropped caption.
STORED_TEXTS = ("empty_text.pt", "negative_text.pt")

Stage = Literal["encode", "shard", "index", "train", "convert", "sample", "evaluate"]
STAGES: tuple[Stage, ...] = ("encode", "shard", "index", "train", "convert", "sample", "evaluate")

STRICT = ConfigDict(extra="forbid")  # a misspelt key is an error, also in Prefect's form


def place(default: Any) -> Any:
    """A field that says where or how the work runs, never what it computes: left out of fingerprints."""
    return field(default=default, metadata={"identity": False})


def identity(config: Any) -> Any:
    """The part of a config that bears its identity, as plain JSON values."""
    if is_dataclass(config) and not isinstance(config, type):
        kept = [f for f in fields(config) if f.metadata.get("identity", True)]
        return {f.name: identity(getattr(config, f.name)) for f in kept}
    if isinstance(config, (list, tuple)):
        return [identity(value) for value in config]
    return config if isinstance(config, (str, int, float, bool, type(None))) else str(config)


def check(holds: bool, sentence: str) -> None:
    """Raise `ValueError(sentence)` unless `holds`; the sentence names value, rule and remedy."""
    if not holds:
        raise ValueError(sentence)


def check_num_frames(name: str, num_frames: int) -> None:
    below = max(1, (num_frames - 1) // 4 * 4 + 1)
    check(
        num_frames >= 1 and num_frames % VAE_TEMPORAL_STRIDE == 1,
        f"{name}={num_frames} is not 4n+1, which the VAE's temporal stride of 4 needs; choose {below} or {below + 4}",
    )


Side = Annotated[int, Range(SIZE_MULTIPLE, step=SIZE_MULTIPLE)]


@described
@dataclass(frozen=True)
class Size:
    """Pixels of a video; both sides are multiples of 16 (VAE stride 8 x patch 2)."""

    height: Side
    """Pixels, a multiple of 16."""
    width: Side
    """Pixels, a multiple of 16."""
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            value = getattr(self, name)
            low = max(SIZE_MULTIPLE, value // SIZE_MULTIPLE * SIZE_MULTIPLE)
            check(
                value >= SIZE_MULTIPLE and value % SIZE_MULTIPLE == 0,
                f"{name}={value} is not a positive multiple of {SIZE_MULTIPLE} (VAE stride 8 x patch 2); "
                f"choose {low} or {low + SIZE_MULTIPLE}",
            )

    @classmethod
    def parse(cls, text: str) -> Size:
        """Read `480x832` or `480*832` (height first)."""
        parts = text.lower().replace("*", "x").split("x")
        check(
            len(parts) == 2 and all(p.strip().isdigit() for p in parts),
            f"size {text!r} is not HEIGHTxWIDTH; write for example 480x832",
        )
        return cls(int(parts[0]), int(parts[1]))

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


def num_tokens(num_frames: int, size: Size) -> int:
    """Tokens of a video: patches of its latents."""
    patches = size.height // SIZE_MULTIPLE * (size.width // SIZE_MULTIPLE)
    return ((num_frames - 1) // VAE_TEMPORAL_STRIDE + 1) * patches

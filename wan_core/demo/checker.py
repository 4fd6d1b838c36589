"""What a demo clip shows, read from its pixels alone: colour, shape and direction of the one thing that stands out."""

from __future__ import annotations

import colorsys
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from wan_core.config import check
from wan_core.demo.videos import COLOURS, DIRECTIONS, PALETTE, SHAPES

MIN_CONTRAST = 40.0  # 0 to 255: what differs less from the background is no shape
MIN_AREA = 16.0  # pixels
MIN_DRIFT = 3.0  # pixels from the first to the last frame
TRIANGLE_MOMENT, SQUARE_MOMENT, CORNERS_SEEN = 0.66, 0.43, 0.33  # see _shape
MAX_WHITE_SATURATION = 0.4  # HSV; the demo's colours have 0.77 and more


@dataclass(frozen=True)
class Seen:
    """What the checker saw; None where nothing can be told."""

    colour: str | None
    shape: str | None
    direction: str | None


def parse_caption(text: str) -> Seen:
    """The colour, shape and direction that a caption asks for: its first word of each kind.

    Raises:
        ValueError: the caption lacks one of them.
    """
    words = text.lower().replace(",", " ").replace(".", " ").split()
    found = {}
    for kind, known in (("colour", tuple(PALETTE)), ("shape", SHAPES), ("direction", tuple(DIRECTIONS))):
        match = [word for word in words if word in known]
        check(
            bool(match),
            f"prompt {text!r} names no {kind}; checker=shapes needs one of {', '.join(known)}, "
            "for other prompts choose checker=none",
        )
        found[kind] = match[0]
    return Seen(**found)


def check_clip(frames: np.ndarray, colours: Collection[str] = tuple(COLOURS)) -> Seen:
    """Read a clip.

    The background is the median colour of the border; the foreground is the largest connected region that differs from
    it by half of the strongest difference. Its mean colour, its corners and the drift of its centre decide.

    Args:
        frames: uint8 [T, H, W, 3].
        colours: names in `PALETTE` to choose from.
    """
    assert frames.ndim == 4 and frames.shape[-1] == 3, f"frames are {frames.shape}, not [T, H, W, 3]"
    masks, pixels = _foreground(frames.astype(np.float32))
    areas = masks.sum(axis=(1, 2))
    present = areas >= MIN_AREA
    if not present.any():
        return Seen(None, None, None)
    masks, pixels, areas = masks[present], pixels[present], areas[present]
    y, x = np.mgrid[0 : masks.shape[1], 0 : masks.shape[2]].astype(np.float32)
    centres = np.stack([(masks * y).sum(axis=(1, 2)), (masks * x).sum(axis=(1, 2))], axis=1) / areas[:, None]
    mean = (pixels * masks[..., None]).sum(axis=(0, 1, 2)) / areas.sum()
    return Seen(_colour(mean, colours), _shape(masks, areas, centres), _direction(centres))


def _foreground(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Soft masks [T, H, W] of the largest region of each frame, and the frames with their borders' median taken off."""
    border = np.concatenate(
        [frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1]], axis=1
    )  # [T, 2 (H + W), 3]
    difference = frames - np.median(border, axis=1)[:, None, None]
    contrast = np.abs(difference).max(axis=-1)
    # The 98th percentile, not the maximum: a single bright pixel must not decide what counts as bright.
    strongest = np.maximum(np.percentile(contrast, 98, axis=(1, 2)), MIN_CONTRAST)[:, None, None]
    # Steeper than the contrast itself: blur moves an outline's half-way level far less than its foot.
    soft = np.clip(2 * contrast / strongest - 0.5, 0.0, 1.0)
    return np.stack([mask * _largest_region(mask > 0) for mask in soft]), difference


def _largest_region(mask: np.ndarray) -> np.ndarray:
    """The largest 4-connected region of a boolean mask [H, W]."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:  # each pixel takes the highest label around it until nothing changes
        padded = np.pad(labels, 1)
        around = np.maximum.reduce([padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:], labels])
        spread = np.where(mask, around, 0)
        if np.array_equal(spread, labels):
            break
        labels = spread
    counts = np.bincount(labels.ravel())
    counts[0] = 0
    return (labels == counts.argmax()) & mask


def _colour(mean: np.ndarray, colours: Collection[str]) -> str:
    """The known colour of nearest hue, or white where there is hardly any."""
    hue, saturation, _ = colorsys.rgb_to_hsv(*np.clip(mean / 255, 0, 1))
    if saturation < MAX_WHITE_SATURATION:
        return "white"

    def distance(name: str) -> float:
        apart = abs(hue - colorsys.rgb_to_hsv(*(value / 255 for value in PALETTE[name]))[0])
        return min(apart, 1 - apart)

    return min((name for name in colours if name != "white"), key=distance)


def _shape(masks: np.ndarray, areas: np.ndarray, centres: np.ndarray) -> str:
    """The shape of masks [T, H, W], from two moments about their centres that a circle lacks.

    Three corners show in r^3 cos 3a, four in r^4 cos 4a, each relative to r^3 or r^4 (a: angle from the upward axis).
    A whole triangle has 0.66 of the first, a whole square 0.43 of the second; a third of that is enough, because blur
    and an imperfect VAE round corners off, but give a circle none.
    """
    y, x = np.mgrid[0 : masks.shape[1], 0 : masks.shape[2]].astype(np.float32)
    up, across = centres[:, 0, None, None] - y, x - centres[:, 1, None, None]
    radius = np.hypot(up, across)
    weights = masks / areas[:, None, None] ** 2.5  # every frame counts alike, however large its shape
    three = (weights * (up**3 - 3 * up * across**2)).sum() / (weights * radius**3).sum()
    four = -(weights * (up**4 - 6 * up**2 * across**2 + across**4)).sum() / (weights * radius**4).sum()
    if three / TRIANGLE_MOMENT > max(four / SQUARE_MOMENT, CORNERS_SEEN):
        return "triangle"
    return "square" if four / SQUARE_MOMENT > CORNERS_SEEN else "circle"


def _direction(centres: np.ndarray) -> str | None:
    """The direction nearest to the drift of the centres [T, 2] (y, x): slope of a line through all of them."""
    if len(centres) < 2:
        return None
    time = np.arange(len(centres)) - (len(centres) - 1) / 2
    drift = (time[:, None] * centres).sum(axis=0) / np.square(time).sum() * (len(centres) - 1)
    if np.abs(drift).max() < MIN_DRIFT:
        return None
    return max(DIRECTIONS, key=lambda name: float(np.dot(drift, DIRECTIONS[name])))

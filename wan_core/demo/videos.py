"""Videos of one coloured shape that moves over a dark background, drawn from a seed.

`render()` needs numpy only, so that the VAE's training and the checker's tests draw clips without any file.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from wan_core.config import check

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (230, 45, 45),
    "green": (45, 195, 70),
    "blue": (55, 90, 240),
    "yellow": (240, 210, 45),
    "white": (238, 238, 238),
}
NEW_COLOURS: dict[str, tuple[int, int, int]] = {"orange": (240, 130, 35)}  # in no demo clip; finetuning adds it
PALETTE = COLOURS | NEW_COLOURS
SHAPES = ("circle", "square", "triangle")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # (y, x)
# Combinations that no clip shows: prompts for them ask the trained model to compose what it saw apart.
HELD_OUT: tuple[tuple[str, str, str], ...] = (
    ("red", "circle", "down"),
    ("red", "triangle", "left"),
    ("green", "square", "up"),
    ("green", "circle", "right"),
    ("blue", "triangle", "down"),
    ("yellow", "square", "left"),
    ("yellow", "triangle", "up"),
    ("white", "circle", "right"),
)
SIZES = ((48, 48), (48, 64))  # (height, width) in pixels: 9 and 12 patches a latent frame, little enough for two cores
NUM_FRAMES = (5, 9)
FPS = 16.0
MARGIN = 2.0  # pixels that stay free between the shape and the frame
BACKGROUND = np.array([24.0, 26.0, 34.0])


def caption(colour: str, shape: str, direction: str) -> str:
    return f"a {colour} {shape} moving {direction}"


def held_out_prompts() -> tuple[str, ...]:
    """One prompt for each combination that the training clips leave out."""
    return tuple(caption(*combination) for combination in HELD_OUT)


def extents(shape: str, radius: float) -> tuple[float, float, float, float]:
    """How far a shape reaches from its centre: up, down, left, right, in pixels."""
    if shape == "triangle":
        around = 1.25 * radius  # the circumscribed circle; the centre is the centre of mass
        return around, around / 2, around * 3**0.5 / 2, around * 3**0.5 / 2
    reach = radius if shape == "circle" else 0.88 * radius
    return reach, reach, reach, reach


@dataclass(frozen=True)
class ShapeScene:
    """One clip: the shape's centre goes from `start` to `end` at constant speed."""

    colour: str
    shape: str
    direction: str
    height: int
    width: int
    num_frames: int
    radius: float  # pixels; circle, square and triangle of one radius look about equally large
    start: tuple[float, float]  # centre in the first frame, (y, x) in pixels
    end: tuple[float, float]
    brightness: float = 1.0  # multiplies the colour
    background: tuple[float, float, float] = (24.0, 26.0, 34.0)  # RGB, 0 to 255
    slope: float = 0.0  # brightness that the background gains from top to bottom

    def __post_init__(self) -> None:
        check(self.colour in PALETTE, f"colour={self.colour!r} is unknown; choose one of {', '.join(PALETTE)}")
        check(self.shape in SHAPES, f"shape={self.shape!r} is unknown; choose one of {', '.join(SHAPES)}")
        check(
            self.direction in DIRECTIONS,
            f"direction={self.direction!r} is unknown; choose one of {', '.join(DIRECTIONS)}",
        )
        up, down, left, right = extents(self.shape, self.radius)
        for y, x in (self.start, self.end):
            check(
                up <= y <= self.height - down and left <= x <= self.width - right,
                f"centre ({y:.1f}, {x:.1f}) puts a {self.shape} of radius {self.radius:.1f} outside the frame of "
                f"{self.height}x{self.width}; move it inside",
            )

    @property
    def caption(self) -> str:
        return caption(self.colour, self.shape, self.direction)


def random_scene(
    rng: np.random.Generator,
    combination: tuple[str, str, str] | None = None,
    size: tuple[int, int] | None = None,
    num_frames: int | None = None,
) -> ShapeScene:
    """A scene with random place, size, speed and background; what is not given is random too."""
    if combination is None:
        every = tuple(product(COLOURS, SHAPES, DIRECTIONS))
        combination = every[rng.integers(len(every))]
    colour, shape, direction = combination
    height, width = size or SIZES[rng.integers(len(SIZES))]
    frames = num_frames or int(rng.choice(NUM_FRAMES))
    radius = rng.uniform(10.0, 13.0)
    up, down, left, right = extents(shape, radius)
    low = np.array([up + MARGIN, left + MARGIN])
    high = np.array([height - down - MARGIN, width - right - MARGIN])
    step = np.array(DIRECTIONS[direction])
    room = float((np.abs(step) * (high - low)).sum())
    travel = rng.uniform(min(11.0, room), min(room, 40.0, 3.5 * (frames - 1)))
    # The whole path is placed at random: its first point lies between the borders, shortened by the travel.
    begin = rng.uniform(low + travel * (step < 0), high - travel * (step > 0))
    finish = begin + travel * step
    return ShapeScene(
        colour, shape, direction, height, width, frames, float(radius),
        start=(float(begin[0]), float(begin[1])), end=(float(finish[0]), float(finish[1])),
        brightness=float(rng.uniform(0.94, 1.04)),
        background=tuple(float(value) for value in BACKGROUND * rng.uniform(0.7, 1.3)),  # type: ignore[arg-type]
        slope=float(rng.uniform(-8, 8)),
    )  # fmt: skip


def render(scene: ShapeScene) -> np.ndarray:
    """Draw a scene, antialiased: uint8 [T, H, W, 3]."""
    y, x = np.mgrid[0 : scene.height, 0 : scene.width].astype(np.float32) + 0.5
    along = np.linspace(0.0, 1.0, scene.num_frames, dtype=np.float32)[:, None, None]
    (y0, x0), (y1, x1) = scene.start, scene.end
    inside = coverage(scene.shape, y - (y0 + along * (y1 - y0)), x - (x0 + along * (x1 - x0)), scene.radius)[..., None]
    tilt = scene.slope * (y / scene.height - 0.5)
    ground = np.asarray(scene.background, np.float32) + tilt[..., None]
    colour = np.asarray(PALETTE[scene.colour], np.float32) * scene.brightness
    return np.clip(ground * (1 - inside) + colour * inside + 0.5, 0, 255).astype(np.uint8)


def coverage(shape: str, y: np.ndarray, x: np.ndarray, radius: float) -> np.ndarray:
    """Share of each pixel that a shape covers, from its distance to the outline; y, x relative to its centre."""
    if shape == "circle":
        distance = np.hypot(y, x) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(y), np.abs(x)) - 0.88 * radius
    else:  # the triangle's three sides lie half a circumscribed radius from its centre of mass
        sides = (y, -0.5 * y + 3**0.5 / 2 * np.abs(x))
        distance = np.maximum(*sides) - 0.625 * radius
    return np.clip(0.5 - distance, 0.0, 1.0)


def training_scenes(count: int, seed: int = 0) -> list[ShapeScene]:
    """Scenes of a demo set: every combination but the held-out ones equally often, in random order."""
    rng = np.random.default_rng(seed)
    seen = [combination for combination in product(COLOURS, SHAPES, DIRECTIONS) if combination not in HELD_OUT]
    check(
        count >= len(seen),
        f"count={count} clips cannot show all {len(seen)} combinations of the demo; choose at least {len(seen)}",
    )
    rounds = -(-count // len(seen))
    combinations = [seen[i] for _ in range(rounds) for i in rng.permutation(len(seen))][:count]
    return [random_scene(rng, combination) for combination in combinations]


def write_clips(folder: Path, scenes: list[ShapeScene]) -> None:
    """Write `clip_<number>.mp4` (H.264) with its caption beside it for every scene."""
    from wan_core.encode.video import write_video

    folder.mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(scenes):
        write_video(folder / f"clip_{number:03d}.mp4", render(scene), FPS)
        (folder / f"clip_{number:03d}.txt").write_text(scene.caption + "\n", encoding="utf-8")


def make_videos(folder: Path, seed: int = 0, count: int = 208) -> None:
    """Write a demo set: `count` good H.264 clips with a caption beside each, and three broken ones.

    The same seed gives the same bytes. `broken_truncated.mp4` ends in mid-file, `broken_short.mp4` has two frames and
    `broken_captionless.mp4` has no caption.

    Raises:
        ValueError: `count` is too small to show every combination.
    """
    from wan_core.encode.video import write_video  # PyAV, which rendering does without

    scenes = training_scenes(count + 3, seed)
    write_clips(folder, scenes[:count])
    truncated, short, captionless = scenes[count:]
    write_video(folder / "broken_truncated.mp4", render(truncated), FPS)
    whole = (folder / "broken_truncated.mp4").read_bytes()
    (folder / "broken_truncated.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "broken_truncated.txt").write_text(truncated.caption + "\n", encoding="utf-8")
    write_video(folder / "broken_short.mp4", render(short)[:2], FPS)
    (folder / "broken_short.txt").write_text(short.caption + "\n", encoding="utf-8")
    write_video(folder / "broken_captionless.mp4", render(captionless), FPS)

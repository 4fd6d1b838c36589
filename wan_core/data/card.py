"""The dataset card: what is in a dataset, on one page with pictures, before anybody trains on it.

<folder>/card.md             counts, encoders, what was left out
         histograms.png      resolution, duration, tokens, caption length
         contact_sheet.png   first frames, decoded from latents, where the model's VAE is at hand
"""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from wan_core.data.catalogue import CATALOGUE_NAME
from wan_core.data.clips import kinds
from wan_core.data.samples import decode_member
from wan_core.pictures import ACCENT, GREY, INK, SOFT, font, plain_axes, shortened

if TYPE_CHECKING:
    from wan_core.encode.vae import Vae

CARD_NAME, HISTOGRAMS_NAME, SHEET_NAME = "card.md", "histograms.png", "contact_sheet.png"
NAMES = (CARD_NAME, HISTOGRAMS_NAME, SHEET_NAME)
SHEET_CLIPS, COLUMNS, CELL = 12, 4, (300, 190)  # pixels of a picture: width, height
CPU_PIXELS = 1 << 20  # decoded at most without a GPU, where the full VAE takes a minute per million
REASONS = 20  # that the card lists, the most common
SETTINGS = ("mode", "fps", "center_crop", "tiled", "vae_dtype", "text_dtype")


@dataclass(frozen=True)
class Statistics:
    """Columns of the catalogue, a value per sample."""

    split: np.ndarray
    frames: np.ndarray
    fps: np.ndarray
    height: np.ndarray
    width: np.ndarray
    num_tokens: np.ndarray
    caption_length: np.ndarray  # characters

    @classmethod
    def of(cls, folder: Path) -> Statistics:
        import pyarrow.compute
        import pyarrow.parquet

        names = ["split", "frames", "fps", "height", "width", "num_tokens"]
        table = pyarrow.parquet.read_table(folder / CATALOGUE_NAME, columns=[*names, "caption"])
        lengths = pyarrow.compute.utf8_length(table["caption"])
        return cls(**{name: table[name].to_numpy() for name in names}, caption_length=lengths.to_numpy())

    @property
    def seconds(self) -> np.ndarray:
        return self.frames / self.fps


def write(folder: Path, name: str, encoder: dict[str, str], vae: Vae | None = None) -> None:
    """Write the card of an indexed folder.

    Args:
        vae: the one that made the latents; without it there is no contact sheet.
    """
    statistics = Statistics.of(folder)
    plot(statistics, folder / HISTOGRAMS_NAME)
    shown = contact_sheet(folder, vae, folder / SHEET_NAME) if vae else 0
    (folder / CARD_NAME).write_text(page(folder, name, encoder, statistics, shown), encoding="utf-8")


def page(folder: Path, name: str, encoder: dict[str, str], statistics: Statistics, shown: int) -> str:
    """The card's Markdown."""
    splits = [split for split in ("train", "val", "test") if (statistics.split == split).any()]
    rows: dict[str, list[str]] = {"": splits, "---": ["--:"] * len(splits)}
    rows |= {label: [] for label in ("clips", "duration", "tokens", "shards", "bytes")}
    for split in splits:
        inside, files = statistics.split == split, list(folder.glob(f"{split}-*.tar"))
        rows["clips"].append(f"{inside.sum():,}")
        rows["duration"].append(duration(statistics.seconds[inside].sum()))
        rows["tokens"].append(f"{statistics.num_tokens[inside].sum():,}")
        rows["shards"].append(f"{len(files):,}")
        rows["bytes"].append(f"{sum(file.stat().st_size for file in files):,}")
    counts = "\n".join(f"| {label} | {' | '.join(cells)} |" for label, cells in rows.items())
    sizes = len(set(zip(statistics.height.tolist(), statistics.width.tolist(), strict=True)))
    text = (
        f"# {name}\n\n{len(statistics.split):,} clips of {sizes} {'size' if sizes == 1 else 'sizes'}, "
        f"{duration(statistics.seconds.sum())}. `samples.parquet` lists them.\n\n{counts}\n\n"
        f"![resolution, duration, tokens and caption length]({HISTOGRAMS_NAME})\n\n"
    )
    if shown:
        text += f"![first frames of {shown} clips]({SHEET_NAME})\n\nFirst frames of {shown} training clips, decoded "
        text += "from their latents.\n\n"
    made = first_info(folder) | encoder
    settings = {key: made[key] for key in (*SETTINGS, *encoder)}
    table = "\n".join(f"| {key.replace('_', ' ')} | {str(value)[:16]} |" for key, value in settings.items())
    return text + f"## How it was encoded\n\n| | |\n|---|---|\n{table}\n\n{left_out(folder)}"


def duration(seconds: float) -> str:
    """In the unit that suits it."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} seconds"


def left_out(folder: Path) -> str:
    """The part of the card about quarantined inputs."""
    rows = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()]
    if not rows:
        return "## Left out\n\nNothing.\n"
    reasons = kinds(row["reason"] for row in rows)
    shown = [(reason.replace("|", "\\|"), count) for reason, count in reasons[:REASONS]]
    if others := reasons[REASONS:]:
        shown.append((f"{len(others):,} other reasons", sum(count for _, count in others)))
    table = "\n".join(f"| {reason} | {count:,} |" for reason, count in shown)
    return f"## Left out\n\n`quarantine.jsonl` lists each of {len(rows):,}.\n\n| reason | files |\n|---|--:|\n{table}\n"


def first_info(folder: Path) -> dict[str, Any]:
    """Side-info of the first training sample; what of it is a setting is every sample's."""
    with tarfile.open(min(folder.glob("train-*.tar"))) as tar:
        member = tar.next()
        assert member is not None
        return json.loads(tar.extractfile(member).read())  # type: ignore[union-attr]


def plot(statistics: Statistics, path: Path) -> None:
    """Four panels on a transparent page."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.6), layout="constrained")
    panels = figure.subplots(2, 2)
    figure.get_layout_engine().set(hspace=0.08, wspace=0.05)  # type: ignore[union-attr, call-arg]
    sizes = Counter(zip(statistics.height.tolist(), statistics.width.tolist(), strict=True))
    bars = {f"{height}x{width}": count for (height, width), count in sizes.most_common(8)}
    _bars(panels[0, 0], "resolution, height x width", bars, sizes.total())
    _histogram(panels[0, 1], "duration, seconds", statistics.seconds)
    _histogram(panels[1, 0], "tokens per clip", statistics.num_tokens)
    _histogram(panels[1, 1], "caption length, characters", statistics.caption_length)
    figure.savefig(path, dpi=160, transparent=True)


def _bars(axes: Any, title: str, counts: dict[str, int], total: int) -> None:
    """Horizontal bars with their numbers; what is not among them is one more bar."""
    if rest := total - sum(counts.values()):
        counts = {**counts, "other": rest}
    labels, values = list(counts), list(counts.values())
    plain_axes(axes, title)
    bars = axes.barh(labels, values, color=ACCENT, height=0.62)
    axes.bar_label(bars, [f"{value:,}" for value in values], padding=4, fontsize=9, color=GREY)
    axes.set_xlim(right=max(values) * 1.15)
    axes.set_ylim(max(len(labels), 3) - 0.5, -0.5)  # few bars stay slim; the first is on top
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)


def _histogram(axes: Any, title: str, values: np.ndarray) -> None:
    plain_axes(axes, title)
    low, high = float(values.min()), float(values.max())
    spread = (low, high) if low < high else (low - 0.5 * (low or 1), high + 0.5 * (high or 1))
    axes.hist(values, bins=min(40, max(10, len(np.unique(values)))), range=spread, color=ACCENT, rwidth=0.88)
    axes.set_ylabel("clips", fontsize=9, color=GREY)
    axes.locator_params(axis="y", integer=True, nbins=5)
    axes.xaxis.set_major_formatter("{x:,.10g}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    middle = float(np.median(values))
    text = f"median {middle:,.0f}" if middle >= 100 else f"median {middle:.3g}"
    axes.annotate(text, (1, 1.04), xycoords="axes fraction", ha="right", fontsize=9, color=GREY)


def contact_sheet(folder: Path, vae: Vae, path: Path) -> int:
    """First frames of clips spread over the training split, with captions; returns how many."""
    from PIL import Image, ImageDraw, ImageOps

    rows = _spread(folder, CPU_PIXELS if vae.model.device.type == "cpu" else None)
    gap, line, (width, height) = 16, 20, CELL
    columns = min(COLUMNS, len(rows))
    size = columns * (width + gap) + gap, -(-len(rows) // columns) * (height + 2 * line + 8 + gap) + gap
    sheet, plain, small = Image.new("RGB", size, "white"), font(13), font(12)
    draw = ImageDraw.Draw(sheet)
    for number, row in enumerate(rows):
        left = gap + number % columns * (width + gap)
        top = gap + number // columns * (height + 2 * line + 8 + gap)
        frame = Image.fromarray(_first_frame(vae, _latents(folder / row["shard"], row["key"])))
        picture = ImageOps.contain(frame, CELL, Image.Resampling.LANCZOS)
        sheet.paste(picture, (left, top + height - picture.height))
        draw.text((left, top + height + 8), shortened(row["caption"], width, plain), font=plain, fill=INK)
        about = f"{row['height']}x{row['width']}, {row['frames']} {'frame' if row['frames'] == 1 else 'frames'}"
        draw.text((left, top + height + 8 + line), about, font=small, fill=SOFT)
    sheet.save(path, optimize=True)
    return len(rows)


def _spread(folder: Path, max_pixels: int | None) -> list[dict[str, Any]]:
    """Rows of the catalogue at even distances, as many as may be decoded, at least one."""
    import pyarrow.parquet

    names = ["key", "shard", "caption", "frames", "height", "width"]
    table = pyarrow.parquet.read_table(folder / CATALOGUE_NAME, columns=names, filters=[("split", "=", "train")])
    places = np.unique(np.linspace(0, len(table) - 1, SHEET_CLIPS).round().astype(int))
    rows = table.take(places).to_pylist()
    pixels = np.cumsum([row["height"] * row["width"] for row in rows])
    return rows if max_pixels is None else rows[: max(1, int((pixels <= max_pixels).sum()))]


def _latents(shard: Path, key: str) -> Tensor:
    with tarfile.open(shard) as tar:
        file = tar.extractfile(f"{key}.pth")
        assert file is not None, key
        return decode_member(f"{key}.pth", file.read())


def _first_frame(vae: Vae, latents: Tensor) -> np.ndarray:
    """uint8 [H, W, 3]: the VAE is causal, so the first frame needs the first latent alone."""
    video = vae.decode(latents[None, :, :1])  # [1, 3, 1, H, W]
    return ((video[0, :, 0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()

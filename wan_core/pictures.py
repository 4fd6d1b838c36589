"""What the pictures of reports and dataset cards share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import ImageFont

INK, SOFT = "#1c2230", "#667085"
GREY, ACCENT = "#8590a6", "#4f7cf0"  # legible on white and on near-black: a plot has no background of its own


def plain_axes(axes: Any, title: str) -> None:
    """Matplotlib axes with a title, light horizontal lines and no frame."""
    axes.set_title(title, loc="left", fontsize=11, color=GREY)
    axes.tick_params(colors=GREY, labelsize=9)
    axes.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.set_facecolor("none")


def font(size: int, bold: bool = False) -> Any:
    """DejaVu Sans, which matplotlib brings along."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / f"DejaVuSans{'-Bold' if bold else ''}.ttf"), size)


def shortened(text: str, width: float, font: Any) -> str:
    """As much of a text as fits into a width."""
    if font.getlength(text) <= width:
        return text
    return next(text[:end] + "…" for end in range(len(text), -1, -1) if font.getlength(text[:end] + "…") <= width)

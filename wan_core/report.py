"""The report's page and pictures; what they show comes from `wan_core.evaluate`."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from wan_core.demo.checker import Seen
from wan_core.demo.videos import COLOURS, DIRECTIONS, SHAPES
from wan_core.pictures import ACCENT, GREY, INK, font, plain_axes, shortened
from wan_core.records import EncodeRecord, SampleRecord, TrainRecord

CHANCE = {"colour": 1 / len(COLOURS), "shape": 1 / len(SHAPES), "direction": 1 / len(DIRECTIONS)}
GOOD, BAD = "#14804a", "#b3261e"

HELD_OUT = "#e08a1e"  # beside pictures' ACCENT


@dataclass(frozen=True)
class SampleResult:
    """One sample as measured."""

    number: int
    prompt: str
    seed: int
    video: Path
    frames: np.ndarray  # uint8 [T, H, W, 3]
    fps: float
    brightness: float  # mean pixel value, 0 to 255
    motion: float  # mean absolute difference of successive frames, 0 to 255
    asked: Seen | None = None
    seen: Seen | None = None

    @property
    def marks(self) -> dict[str, bool]:
        """Per property, whether what was asked for is seen; empty where nothing was checked."""
        if self.asked is None or self.seen is None:
            return {}
        return {name: getattr(self.asked, name) == getattr(self.seen, name) for name in CHANCE}


@dataclass(frozen=True)
class Report:
    """All that the page shows."""

    metrics: dict[str, float]
    samples: tuple[SampleResult, ...]
    sampled: SampleRecord
    trained: TrainRecord | None
    encoded: EncodeRecord | None
    curve: list[dict[str, Any]]  # rows of metrics.jsonl
    quarantine: list[dict[str, Any]]  # rows of quarantine.jsonl


def contact_sheet(samples: Sequence[SampleResult], path: Path) -> None:
    """A PNG with first, middle and last frame of every sample, its prompt, and marks where it was checked."""
    side = 128  # pixels of a frame's height
    thumbs = []
    for sample in samples:
        frames = sample.frames[[0, len(sample.frames) // 2, len(sample.frames) - 1]]
        width = round(side * frames.shape[2] / frames.shape[1])
        thumbs.append([Image.fromarray(frame).resize((width, side), Image.Resampling.LANCZOS) for frame in frames])
    gap, text_height = 16, 54 if any(sample.marks for sample in samples) else 32
    cell = max(sum(image.width for image in row) + 8 for row in thumbs), side + text_height
    columns = min(len(samples), max(1, 1400 // (cell[0] + gap)))
    rows = -(-len(samples) // columns)
    sheet = Image.new("RGB", (columns * (cell[0] + gap) + gap, rows * (cell[1] + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    plain, bold = font(14), font(14, bold=True)
    for index, (sample, row) in enumerate(zip(samples, thumbs, strict=True)):
        left = gap + index % columns * (cell[0] + gap)
        top = gap + index // columns * (cell[1] + gap)
        x = left
        for image in row:
            sheet.paste(image, (x, top))
            x += image.width + 4
        draw.text((left, top + side + 6), shortened(sample.prompt, cell[0], plain), font=plain, fill=INK)
        cursor = float(left)
        for name, right in sample.marks.items():
            text = f"{'✓' if right else '✗'} {getattr(sample.seen, name) or 'none'}"
            draw.text((cursor, top + side + 28), text, font=bold, fill=GOOD if right else BAD)
            cursor += draw.textlength(text, font=bold) + 14
    sheet.save(path, optimize=True)


def plot_training(curve: Sequence[dict[str, Any]], path: Path, validation: Sequence[dict[str, Any]] = ()) -> None:
    """Loss over steps, with validations where there are any, and beside it the gradient norm and the speed.

    Args:
        curve: rows of metrics.jsonl.
        validation: rows of validation.jsonl.
    """
    iterations = np.array([row["iteration"] for row in curve])
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    grid = figure.add_gridspec(2, 3)
    panels = (
        (figure.add_subplot(grid[:, :2]), "loss", "loss"),
        (figure.add_subplot(grid[0, 2]), "grad_norm", "gradient norm"),
        (figure.add_subplot(grid[1, 2]), "tokens_per_second", "tokens per second"),
    )
    for axes, key, title in panels:
        values = np.array([row[key] for row in curve], dtype=np.float64)
        axes.plot(iterations, values, color=ACCENT, linewidth=1, alpha=0.35)
        axes.plot(iterations, _smoothed(values), color=ACCENT, linewidth=2, label="training")
        if key == "loss" and validation:
            places, losses = [row["iteration"] for row in validation], [row["loss"] for row in validation]
            axes.plot(places, losses, color=HELD_OUT, linewidth=1.5, marker="o", markersize=4, label="validation")
            axes.legend(frameon=False, fontsize=9, labelcolor=GREY)
        plain_axes(axes, title)
        axes.set_ylim(bottom=0)
        if key != "grad_norm":
            axes.set_xlabel("step", fontsize=9, color=GREY)
    figure.savefig(path, dpi=160, transparent=True)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Mean over a window of a twentieth of the curve; towards both ends it shrinks, so that it stays centred."""
    reach, last = max(1, len(values) // 40), len(values) - 1
    spans = (min(reach, i, last - i) for i in range(len(values)))
    return np.array([values[i - span : i + span + 1].mean() for i, span in enumerate(spans)])


def render(report: Report, folder: Path) -> str:
    """The page, self-contained: pictures (from `folder`) and videos are embedded."""
    sections = [_tiles(report), "<h2>Samples</h2>", _gallery(report.samples), _sample_table(report.samples)]
    if report.trained:
        sections += ["<h2>Training</h2>", _training(report, folder)]
    if report.encoded:
        sections += ["<h2>Data</h2>", _data(report.encoded, report.quarantine)]
    sections += ["<h2>Settings</h2>", _settings(report), "<h2>Contact sheet</h2>"]
    sections.append(f'<div class="panel">{_image(folder / "contact_sheet.png", "contact sheet")}</div>')
    css = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(_title(report))}</title><style>\n{css}</style></head><body><main>\n"
        f'<h1>{escape(_title(report))}</h1><p class="lead">{escape(_lead(report))}</p>\n'
        + "\n".join(sections)
        + "\n</main></body></html>\n"
    )


def _title(report: Report) -> str:
    return f"{report.sampled.path.name.rsplit('-', 1)[0]}: {len(report.samples)} samples"


def _lead(report: Report) -> str:
    sentences = []
    if report.encoded:
        sentences.append(f"{report.encoded.num_clips} clips were encoded, {report.encoded.num_quarantined} set aside.")
    if report.trained:
        sentences.append(
            f"The model trained for {report.trained.iteration} steps on {report.trained.num_samples} samples."
        )
    if "colour_accuracy" in report.metrics:
        sentences.append("A checker read colour, shape and direction from the pixels of each sample.")
    return " ".join(sentences)


def _tiles(report: Report) -> str:
    metrics, tiles = report.metrics, []
    for name, chance in CHANCE.items():
        if f"{name}_accuracy" in metrics:
            tiles.append(_tile(f"{name} right", metrics[f"{name}_accuracy"], f"chance {chance:.0%}"))
    if "all_three_accuracy" in metrics:
        every = float(np.prod(list(CHANCE.values())))
        tiles.append(_tile("all three right", metrics["all_three_accuracy"], f"chance {every:.1%}"))
    else:
        tiles.append(_tile("mean motion", f"{metrics['mean_motion']:.1f}", "per frame, of 255"))
        tiles.append(_tile("mean brightness", f"{metrics['mean_brightness']:.0f}", "of 255"))
    if report.trained:
        tiles.append(_tile("final loss", f"{report.trained.final_loss:.3f}", f"step {report.trained.iteration}"))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _tile(name: str, value: float | str, note: str) -> str:
    bar = f'<div class="bar"><i style="width:{value:.1%}"></i></div>' if isinstance(value, float) else ""
    shown = f"{value:.0%}" if isinstance(value, float) else escape(value)
    return (
        f'<div class="tile"><span class="name">{escape(name)}</span><b>{shown}</b>{bar}'
        f'<span class="note">{escape(note)}</span></div>'
    )


def _gallery(samples: Iterable[SampleResult]) -> str:
    cards, card_width = [], 240
    for sample in samples:
        height, width = sample.frames.shape[1:3]
        card_width = max(card_width, min(420, width))
        video = base64.b64encode(sample.video.read_bytes()).decode()
        controls = "controls " if width >= 320 else ""  # on a small picture they would hide what it shows
        cards.append(
            f'<div class="sample"><video autoplay loop muted playsinline {controls}width="{width}" height="{height}" '
            f'style="aspect-ratio:{width}/{height};height:auto" src="data:video/mp4;base64,{video}"></video>'
            f'<div class="text"><div class="prompt">{escape(sample.prompt)}</div>{_chips(sample)}'
            f'<div class="fine">seed {sample.seed} · {len(sample.frames)} frames · {height}x{width}</div></div></div>'
        )
    return f'<div class="samples" style="--card-width:{card_width}px">{"".join(cards)}</div>'


def _chips(sample: SampleResult) -> str:
    chips = []
    for name, right in sample.marks.items():
        seen = getattr(sample.seen, name) or f"no {name}"
        mark = f"✓ {seen}" if right else f"✗ {seen}"
        chips.append(f'<span class="chip {"good" if right else "bad"}">{escape(mark)}</span>')
    return f'<div class="chips">{"".join(chips)}</div>' if chips else ""


def _sample_table(samples: Sequence[SampleResult]) -> str:
    checked = list(CHANCE) if any(sample.marks for sample in samples) else []
    rows = []
    for sample in samples:
        cells = [escape(sample.prompt), str(sample.seed)]
        for name in checked:
            kind = "good" if sample.marks[name] else "bad"
            cells.append(f'<span class="{kind}">{escape(getattr(sample.seen, name) or "none")}</span>')
        rows.append([*cells, f"{sample.brightness:.1f}", f"{sample.motion:.2f}"])
    table = _table(["prompt", "seed", *(f"{name} seen" for name in checked), "brightness", "motion"], rows, numbers=2)
    return f'<div class="panel after"><details><summary>All samples as a table</summary>{table}</details></div>'


def _training(report: Report, folder: Path) -> str:
    assert report.trained is not None
    values: dict[str, Any] = {
        "steps": report.trained.iteration, "samples": report.trained.num_samples,
        "final loss": f"{report.trained.final_loss:.4f}", "seconds": f"{report.trained.seconds:.0f}",
    }  # fmt: skip
    picture = ""
    if report.curve:
        picture = f'<div class="panel">{_image(folder / "loss.png", "loss curve")}</div>'
        values["first loss"] = f"{report.curve[0]['loss']:.4f}"
        values["median seconds per step"] = f"{np.median([row['step_seconds'] for row in report.curve]):.3f}"
        values["median tokens per second"] = f"{np.median([row['tokens_per_second'] for row in report.curve]):.0f}"
    return f'{picture}<div class="panel">{_key_values(values)}</div>'


def _data(encoded: EncodeRecord, quarantine: list[dict[str, Any]]) -> str:
    values = {"clips encoded": encoded.num_clips, "set aside": encoded.num_quarantined, **encoded.encoder}
    rows = [[f"<code>{escape(str(row['path']))}</code>", escape(str(row["reason"]))] for row in quarantine]
    table = f'<div class="panel">{_table(["clip set aside", "reason"], rows)}</div>' if rows else ""
    return f'<div class="panel">{_key_values(values)}</div>{table}'


def _settings(report: Report) -> str:
    parts = []
    for record in (report.encoded, report.trained, report.sampled):
        if record is not None:
            values = {**record.config, "output": record.path, "fingerprint": record.fingerprint[:16]}
            parts.append(
                f'<div class="panel"><details><summary>{record.stage}</summary>{_key_values(values)}</details></div>'
            )
    versions = _key_values(dict(report.sampled.versions))
    return "".join(parts) + f'<div class="panel"><details><summary>versions</summary>{versions}</details></div>'


def _key_values(values: dict[str, Any]) -> str:
    def shown(value: Any) -> str:
        if isinstance(value, (dict, list, tuple)):
            return f"<code>{escape(json.dumps(value, ensure_ascii=False, default=str))}</code>"
        return escape(str(value))

    rows = "".join(f"<tr><td>{escape(name)}</td><td>{shown(value)}</td></tr>" for name, value in values.items())
    return f'<table class="settings">{rows}</table>'


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: int = 0) -> str:
    """A table whose cells are HTML; its last `numbers` columns are set as numbers."""

    def cells(kind: str, row: Sequence[str]) -> str:
        marked = [' class="number"' if index >= len(row) - numbers else "" for index in range(len(row))]
        return "".join(f"<{kind}{mark}>{cell}</{kind}>" for mark, cell in zip(marked, row, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f"<table><thead><tr>{cells('th', [escape(head) for head in heads])}</tr></thead><tbody>{body}</tbody></table>"
    )


def _image(path: Path, name: str) -> str:
    return f'<img alt="{escape(name)}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'

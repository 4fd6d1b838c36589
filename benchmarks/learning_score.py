"""The scoring side of `benchmarks.learning`: sample, read the pixels, keep the curve."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from megatron.bridge.training.callbacks import CallbackContext
from PIL import Image, ImageDraw

from wan_core.demo.checker import check_clip, parse_caption
from wan_core.demo.videos import PALETTE
from wan_core.pictures import ACCENT, GREY, plain_axes
from wan_core.sample import Condition
from wan_core.training_run import METRICS_NAME, read_lines
from wan_core.training_samples import SamplesConfig, SampleVideos, device

KINDS = ("colour", "shape", "direction")
ZOOM, COLUMNS = 2, 5


class Score(SampleVideos):
    """Samples from the averaged weights at the start, every `interval` steps and when the time is up, and scores it."""

    def __init__(
        self, data: Path, model: Path, run_dir: Path, prompts: dict[str, tuple[str, ...]], interval: int, minutes: float
    ) -> None:
        self.data, self.groups, self.minutes = data, prompts, minutes
        config = SamplesConfig(
            interval=interval, prompts=tuple(prompt for group in prompts.values() for prompt in group),
            negative_prompt="", height=48, width=48, num_frames=9, num_steps=24, guidance_scale=4.0, shift=3.0,
        )  # fmt: skip
        super().__init__(config, model, run_dir, use_ema=True)
        self.curve: list[dict[str, Any]] = []
        self.frames: list[np.ndarray] = []
        self.since = self.spent = 0.0

    def on_train_start(self, context: CallbackContext) -> None:
        embeds = {prompt: text.to(device()) for prompt, text in torch.load(self.data / "prompts.pt").items()}
        self.conditions = [Condition(embeds[prompt], embeds[""]) for prompt in self.config.prompts]
        self.measure(context, 0)
        self.since = time.monotonic()

    def on_train_step_end(self, context: CallbackContext) -> None:
        iteration, train = context.state.train_state.step + 1, context.state.cfg.train
        if time.monotonic() - self.since > 60 * self.minutes:
            train.train_iters = iteration
        if iteration % self.config.interval == 0 or iteration == train.train_iters:
            self.measure(context, iteration)

    def measure(self, context: CallbackContext, iteration: int) -> None:
        spent = time.monotonic() - self.since if iteration else 0.0
        frames = self.sample(context)
        assert frames is not None, "this benchmark runs on one rank"
        self.frames = frames
        row: dict[str, Any] = {"iteration": iteration, "seconds": round(spent, 1)}
        if context.loss_dict:
            row["loss"] = round(float(context.loss_dict["loss"]), 4)
        start = 0
        for name, prompts in self.groups.items():
            row[name] = accuracy(prompts, frames[start : start + len(prompts)])
            start += len(prompts)
        self.curve.append(row)
        print("score " + json.dumps(row), flush=True)
        self.show(context, iteration, frames[:: max(1, len(frames) // 16)])

    def write(self, out: Path, name: str) -> None:
        """`results-<name>.json`, `curves-<name>.png`, and each prompt's first video in `samples-<name>.png`."""
        prompts = self.config.prompts
        name_of_device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        result = {"device": name_of_device, "torch": torch.__version__, "final": self.curve[-1], "curve": self.curve}
        (out / f"results-{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        curves(self.curve, list(read_lines(self.folder.parent / METRICS_NAME)), out / f"curves-{name}.png")
        first = [prompts.index(prompt) for prompt in dict.fromkeys(prompts)]
        sheet([prompts[i] for i in first], [self.frames[i] for i in first], out / f"samples-{name}.png")


def accuracy(prompts: tuple[str, ...], frames: list[np.ndarray]) -> dict[str, float]:
    """Shares of videos that show what their prompts ask for."""
    marks = []
    for prompt, video in zip(prompts, frames, strict=True):
        asked, seen = parse_caption(prompt), check_clip(video, tuple(PALETTE))
        marks.append([getattr(asked, kind) == getattr(seen, kind) for kind in KINDS])
    shares = np.mean(marks, axis=0)
    return {kind: round(float(share), 4) for kind, share in zip(KINDS, shares, strict=True)} | {"videos": len(marks)}


def curves(scores: list[dict[str, Any]], metrics: list[dict[str, Any]], path: Path) -> None:
    """The loss over the steps, and beside it the accuracies of each group of prompts."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    groups = [name for name, value in scores[0].items() if isinstance(value, dict)]
    loss, *panels = figure.subplots(1, 1 + len(groups))
    loss.plot([line["iteration"] for line in metrics], [line["loss"] for line in metrics], color=ACCENT)
    plain_axes(loss, "loss")
    loss.set_ylim(bottom=0)
    for axes, group in zip(panels, groups, strict=True):
        for kind, colour in zip(KINDS, (ACCENT, "#e0813a", "#2f9e6e"), strict=True):
            shares = [100 * row[group][kind] for row in scores]
            axes.plot([row["iteration"] for row in scores], shares, color=colour, marker="o", markersize=4, label=kind)
        plain_axes(axes, f"{group}: % right")
        axes.set_ylim(0, 104)
        axes.legend(frameon=False, fontsize=9, labelcolor=GREY, loc="lower right")
    for axes in (loss, *panels):
        axes.set_xlabel("step", fontsize=9, color=GREY)
    figure.savefig(path, dpi=110, facecolor="white")


def sheet(prompts: list[str], frames: list[np.ndarray], path: Path) -> None:
    """A row per video: frames from first to last, the prompt above."""
    rows = []
    for prompt, video in zip(prompts, frames, strict=True):
        picked = [video[round(i * (len(video) - 1) / (COLUMNS - 1))] for i in range(COLUMNS)]
        strip = Image.fromarray(np.concatenate(picked, axis=1))
        row = Image.new("RGB", (strip.width * ZOOM, strip.height * ZOOM + 14), "white")
        ImageDraw.Draw(row).text((2, 1), prompt, fill="black")
        row.paste(strip.resize((strip.width * ZOOM, strip.height * ZOOM), Image.Resampling.NEAREST), (0, 14))
        rows.append(np.asarray(row))
    Image.fromarray(np.concatenate(rows)).save(path)

"""evaluate: metrics over samples, and a report that shows samples, training and data on one page.

<output_dir>/metrics.json       {"metrics": {...}, "samples": [...]}
             contact_sheet.png  first, middle and last frame of every sample
             loss.png           the loss curve, when a training run is given
             report.html        all of it in one file that needs no other
             record.json        EvaluateRecord, written last
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from wan_core import records, report
from wan_core.config import EvaluateConfig, check
from wan_core.demo.checker import Seen, check_clip, parse_caption
from wan_core.encode.video import load_video
from wan_core.output import writing
from wan_core.records import EncodeRecord, EvaluateRecord, SampleRecord, TrainRecord
from wan_core.report import Report, SampleResult
from wan_core.training_run import VALIDATION_NAME


def stage_fingerprint(
    config: EvaluateConfig, sampled: SampleRecord, trained: TrainRecord | None, encoded: EncodeRecord | None
) -> str:
    """The identity of the report: its config and every record that it shows."""
    inputs = {"sampled": sampled, "trained": trained, "encoded": encoded}
    return records.fingerprint("evaluate", config, **{name: r and r.fingerprint for name, r in inputs.items()})


def run(
    config: EvaluateConfig,
    sampled: SampleRecord,
    trained: TrainRecord | None,
    encoded: EncodeRecord | None,
    output_dir: Path,
) -> EvaluateRecord:
    """Measure the samples and write the report.

    Raises:
        ValueError: checker=shapes, and a prompt names no colour, shape or direction of the demo.
        ClipError: a sample's video is damaged.
    """
    wanted = stage_fingerprint(config, sampled, trained, encoded)
    found = records.find_record(EvaluateRecord, output_dir, wanted)
    if found is not None:
        return found
    check(len(sampled.videos) > 0, f"no samples in {sampled.path}; give at least one prompt to the sample stage")
    asked: Iterable[Seen | None] = [None] * len(sampled.prompts)
    if config.checker == "shapes":
        asked = [parse_caption(prompt) for prompt in sampled.prompts]  # before any work: a prompt may not parse
    rows = zip(sampled.videos, sampled.prompts, sampled.seeds, asked, strict=True)
    samples = tuple(measure(number, *row) for number, row in enumerate(rows))
    metrics = summarise(samples, trained)
    with writing("evaluate", output_dir, config, wanted) as output:
        values = {"metrics": metrics, "samples": [plain(sample) for sample in samples]}
        (output.path / "metrics.json").write_text(json.dumps(values, indent=1, ensure_ascii=False), encoding="utf-8")
        report.contact_sheet(samples, output.path / "contact_sheet.png")
        curve = read_lines(trained.metrics) if trained else []
        if trained and curve:
            validation = trained.path / VALIDATION_NAME
            held_out = read_lines(validation) if validation.exists() else []
            report.plot_training(curve, output.path / "loss.png", held_out)
        quarantine = encoded.path / "quarantine.jsonl" if encoded else None
        page = Report(
            metrics=metrics, samples=samples, sampled=sampled, trained=trained, encoded=encoded, curve=curve,
            quarantine=read_lines(quarantine) if quarantine and quarantine.exists() else [],
        )  # fmt: skip
        (output.path / "report.html").write_text(report.render(page, output.path), encoding="utf-8")
        return output.finish(EvaluateRecord, metrics=metrics, report=output.path / "report.html")


def measure(number: int, video: Path, prompt: str, seed: int, asked: Seen | None) -> SampleResult:
    """Read one sample's video and, where a prompt was parsed, what its pixels show."""
    frames, fps = load_video(video)
    steps = np.abs(np.diff(frames.astype(np.float32), axis=0))
    return SampleResult(
        number=number, prompt=prompt, seed=seed, video=video, frames=frames, fps=fps,
        brightness=float(frames.mean()), motion=float(steps.mean()) if len(steps) else 0.0,
        asked=asked, seen=check_clip(frames) if asked else None,
    )  # fmt: skip


def summarise(samples: tuple[SampleResult, ...], trained: TrainRecord | None) -> dict[str, float]:
    """The numbers of the record: accuracies in [0, 1], brightness and motion on the scale of 0 to 255."""
    metrics: dict[str, float] = {"num_samples": len(samples)}
    checked = [sample.marks for sample in samples if sample.marks]
    if checked:
        for name in ("colour", "shape", "direction"):
            metrics[f"{name}_accuracy"] = float(np.mean([marks[name] for marks in checked]))
        metrics["all_three_accuracy"] = float(np.mean([all(marks.values()) for marks in checked]))
    metrics["mean_brightness"] = float(np.mean([sample.brightness for sample in samples]))
    metrics["mean_motion"] = float(np.mean([sample.motion for sample in samples]))
    if trained:
        metrics["train_iterations"] = trained.iteration
        metrics["train_samples"] = trained.num_samples
        metrics["final_loss"] = trained.final_loss
    return {name: round(value, 6) for name, value in metrics.items()}


def plain(sample: SampleResult) -> dict[str, Any]:
    """A sample's row of metrics.json."""
    return {
        "prompt": sample.prompt, "seed": sample.seed, "video": sample.video.name, "frames": list(sample.frames.shape),
        "brightness": round(sample.brightness, 3), "motion": round(sample.motion, 3),
        "asked": sample.asked and asdict(sample.asked), "seen": sample.seen and asdict(sample.seen),
    }  # fmt: skip


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]

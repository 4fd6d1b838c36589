"""A training run's identity, its metrics and its record; needs no Megatron, so the orchestration reads it, too."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan_core.architecture import Architecture
from wan_core.checkpoints import write_whole
from wan_core.config import TrainConfig, check, identity
from wan_core.digests import cached_file_digest, encoder_identity
from wan_core.records import (
    RECORD_NAME,
    IndexRecord,
    TrainRecord,
    digest,
    fingerprint,
    load_record,
    save_record,
    versions,
)

METRICS_NAME = "metrics.jsonl"
VALIDATION_NAME = "validation.jsonl"
IDENTITY_NAME = "identity.json"


@dataclass(frozen=True)
class Metrics:
    """One logged step; throughput is averaged since the line before."""

    iteration: int
    train_iters: int
    loss: float
    learning_rate: float
    grad_norm: float
    step_seconds: float
    tokens_per_second: float  # real tokens, all ranks
    tflops_per_rank: float  # model FLOPs of forward and backward
    consumed_samples: int  # clips since the run began
    packing_efficiency: float  # real tokens / tokens of the packs' budget
    peak_memory_gib: float  # of this rank's GPU, since the run began
    tokens_per_second_per_rank: float = 0.0
    mfu: float | None = None  # tflops_per_rank / the GPU's bfloat16 peak; None where that is not known
    data_wait_share: float = 0.0  # of the time, this rank waited for packs
    skipped_steps: int = 0  # bad steps without an update, since the run began


@dataclass(frozen=True)
class Validation:
    """One validation, see `wan_core.validation`."""

    iteration: int
    loss: float
    losses: dict[str, float]  # per noise level
    seconds: float


def model_identity(model: Path, mode: str) -> str:
    """What a run takes from a Diffusers folder: the architecture, and when finetuning the weights."""
    values: dict[str, Any] = {"architecture": identity(Architecture.from_diffusers(model))}
    if mode == "finetune":
        files = sorted((model / "transformer").glob("*.safetensors"))
        values["weights"] = {path.name: cached_file_digest(path) for path in files}
    return digest(values)


def run_identity(config: TrainConfig, dataset: Path, model: Path) -> dict[str, Any]:
    """Everything that makes a run this run, field by field."""
    return {
        **identity(config.resumable()),
        "dataset": load_record(IndexRecord, dataset).fingerprint,
        "model": model_identity(model, config.mode),
    }


def noise_identity(flow_matching: Any) -> dict[str, Any]:
    """How noise levels are drawn, field by field, whichever of mode, recipe, file or override set them."""
    return {f"flow_matching.{name}": value for name, value in identity(flow_matching).items()}


def fingerprints(config: TrainConfig, dataset: Path, model: Path) -> tuple[str, str]:
    """Fingerprint of the run (names its folder, free of what resuming may change) and of its finished record."""
    base = run_identity(config, dataset, model)
    inputs = {"dataset": base["dataset"], "model": base["model"]}
    return fingerprint("train", config.resumable(), **inputs), fingerprint("train", config, **inputs)


def check_encoders(dataset: Path, model: Path) -> None:
    """Refuse a dataset that was encoded with another VAE, text encoder or tokenizer than the model's.

    Raises:
        ValueError: they differ; names which.
    """
    made_with, ours = load_record(IndexRecord, dataset).encoder, encoder_identity(model)
    differing = sorted(key for key in ours if made_with.get(key) != ours[key])
    check(
        not differing,
        f"dataset {dataset} was encoded with another {', '.join(key.removesuffix('_digest') for key in differing)} "
        f"than {model} has; encode the videos with this model, or train the model that the dataset was made for",
    )


def claim(run_dir: Path, wanted: dict[str, Any]) -> None:
    """Make a run folder this run's, or find that it is already.

    Raises:
        ValueError: the folder belongs to a run that differs; names the field, both values and the remedy.
    """
    path = run_dir / IDENTITY_NAME
    if not path.exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(wanted, indent=1))  # the other ranks look, too
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    for key in (key for key in wanted if key in found):
        check(
            found[key] == wanted[key],
            f"{run_dir} was started with {key}={found[key]!r}, now it is {wanted[key]!r}; "
            "resume with the same value, or choose another run folder",
        )


def read_metrics(path: Path) -> Iterator[Metrics]:
    """The lines of a metrics file, of each iteration the last (a resumed run repeats some)."""
    lines = (Metrics(**values) for values in read_lines(path))
    yield from (line for _, line in sorted({line.iteration: line for line in lines}.items()))


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Values of the whole lines of a file of JSON lines; the last one lacks its end while it is written."""
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def write_record(run_dir: Path, config: TrainConfig, wanted: str, seconds: float) -> TrainRecord:
    """Record a run that has reached its last iteration."""
    lines = list(read_metrics(run_dir / METRICS_NAME))
    checkpoint = run_dir / "checkpoints" / f"iter_{lines[-1].iteration:07d}"
    files = {p.relative_to(run_dir).as_posix(): p.stat().st_size for p in sorted(checkpoint.iterdir()) if p.is_file()}
    record = TrainRecord(
        stage="train", path=run_dir, fingerprint=wanted, config=identity(config), files=files,
        seconds=round(seconds, 3), versions=versions(), iteration=lines[-1].iteration,
        num_samples=lines[-1].consumed_samples, final_loss=lines[-1].loss, metrics=run_dir / METRICS_NAME,
    )  # fmt: skip
    save_record(record, run_dir)
    return record


def forget_record(run_dir: Path) -> None:
    """A run that trains on is not finished."""
    (run_dir / RECORD_NAME).unlink(missing_ok=True)


def append_line(path: Path, values: Any) -> None:
    """Add a dataclass to a file of JSON lines. A line that a killed run left without its end is dropped first."""
    with path.open("ab+") as file:
        file.seek(0)
        text = file.read()
        if not text.endswith(b"\n"):
            file.truncate(text.rfind(b"\n") + 1)
        file.write(json.dumps(dataclasses.asdict(values)).encode() + b"\n")

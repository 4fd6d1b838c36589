"""evaluate on real clips whose right and wrong samples are known."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wan_core import evaluate, records
from wan_core.config import EncodeConfig, EvaluateConfig, SampleConfig, TrainConfig, identity
from wan_core.demo.videos import FPS, caption, random_scene, render
from wan_core.encode.video import write_video
from wan_core.records import EncodeRecord, EvaluateRecord, SampleRecord, TrainRecord

SHAPES = EvaluateConfig(checker="shapes")
SHOWN = (
    ("red", "circle", "left"),
    ("blue", "square", "up"),
    ("green", "triangle", "right"),
    ("white", "circle", "down"),
)
ASKED = (("red", "circle", "left"), ("blue", "square", "down"), ("green", "circle", "up"), ("yellow", "circle", "down"))


def make_samples(folder: Path, prompts: tuple[str, ...] | None = None) -> SampleRecord:
    """Four samples: all right; wrong direction; wrong shape and direction; wrong colour."""
    videos = tuple(folder / f"{number:03d}.mp4" for number in range(len(SHOWN)))
    for number, (path, shown) in enumerate(zip(videos, SHOWN, strict=True)):
        write_video(path, render(random_scene(np.random.default_rng(number), shown, (64, 64), 9)), FPS)
    return SampleRecord(
        stage="sample", path=folder, fingerprint="5a" * 32, config=identity(SampleConfig()), videos=videos,
        prompts=prompts or tuple(caption(*asked) for asked in ASKED), seeds=(0, 1, 2, 3), versions=records.versions(),
    )  # fmt: skip


def make_training(folder: Path, steps: int = 60) -> TrainRecord:
    folder.mkdir(parents=True)
    rows = [
        {
            "iteration": step, "loss": 1.2 / step**0.3, "learning_rate": 1e-3, "grad_norm": 1 / step,
            "step_seconds": 0.12, "tokens_per_second": 8000.0, "consumed_samples": 13 * step,
        }
        for step in range(1, steps + 1)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return TrainRecord(
        stage="train", path=folder, fingerprint="7b" * 32, config=identity(TrainConfig()), iteration=steps,
        num_samples=13 * steps, final_loss=rows[-1]["loss"], metrics=folder / "metrics.jsonl", seconds=7.2,
    )  # fmt: skip


def make_encoded(folder: Path) -> EncodeRecord:
    folder.mkdir(parents=True)
    row = {"path": "clips/<broken>.mp4", "reason": "not a readable video: moov atom not found"}
    (folder / "quarantine.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    return EncodeRecord(
        stage="encode", path=folder, fingerprint="9c" * 32, config=identity(EncodeConfig()), parts=(), num_clips=192,
        num_quarantined=1, encoder={"vae": "AutoencoderKLWan"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> EvaluateRecord:
    folder = tmp_path_factory.mktemp("evaluate")
    sampled = make_samples(folder / "demo-5a5a5a5a")
    trained, encoded = make_training(folder / "run"), make_encoded(folder / "encode")
    return evaluate.run(SHAPES, sampled, trained, encoded, folder / "out")


def test_accuracies_count_what_the_pixels_show(evaluated: EvaluateRecord):
    assert evaluated.metrics["num_samples"] == 4
    assert evaluated.metrics["colour_accuracy"] == 0.75
    assert evaluated.metrics["shape_accuracy"] == 0.75
    assert evaluated.metrics["direction_accuracy"] == 0.5
    assert evaluated.metrics["all_three_accuracy"] == 0.25
    assert evaluated.metrics["train_iterations"] == 60


def test_metrics_json_tells_each_sample(evaluated: EvaluateRecord):
    found = json.loads((evaluated.path / "metrics.json").read_text(encoding="utf-8"))
    assert found["metrics"] == evaluated.metrics
    for row, asked, shown in zip(found["samples"], ASKED, SHOWN, strict=True):
        assert (row["asked"]["colour"], row["asked"]["shape"], row["asked"]["direction"]) == asked
        assert (row["seen"]["colour"], row["seen"]["shape"], row["seen"]["direction"]) == shown
        assert row["motion"] > 0.5


def test_the_report_needs_no_other_file(evaluated: EvaluateRecord):
    page = evaluated.report.read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', page)
    assert sources and all(source.startswith("data:") for source in sources)
    assert page.count("<video") == 4
    assert "@import" not in page and "url(" not in page
    assert "&lt;broken&gt;" in page and "<broken>" not in page  # what clips are called is text, never markup
    assert page.count('class="chip good"') == 8 and page.count('class="chip bad"') == 4


def test_pictures_are_whole(evaluated: EvaluateRecord):
    sheet = Image.open(evaluated.path / "contact_sheet.png").convert("RGB")
    colours = set(sheet.get_flattened_data() if hasattr(sheet, "get_flattened_data") else sheet.getdata())
    assert any(red > 200 and green < 80 and blue < 80 for red, green, blue in colours)  # the red circle is on it
    with Image.open(evaluated.path / "loss.png") as loss:
        assert loss.size[0] > 1000


def test_the_record_is_found_again_and_follows_its_inputs(evaluated: EvaluateRecord, tmp_path: Path):
    sampled = make_samples(tmp_path / "demo-1")
    first = evaluate.run(SHAPES, sampled, None, None, tmp_path / "out")
    written = (tmp_path / "out" / "report.html").stat().st_mtime_ns
    assert evaluate.run(SHAPES, sampled, None, None, tmp_path / "out") == first
    assert (tmp_path / "out" / "report.html").stat().st_mtime_ns == written
    assert not (tmp_path / "out" / "loss.png").exists()
    assert evaluate.stage_fingerprint(SHAPES, sampled, None, None) != evaluated.fingerprint
    assert evaluate.stage_fingerprint(EvaluateConfig(), sampled, None, None) != first.fingerprint


def test_prompts_of_any_kind_are_measured_without_the_checker(tmp_path: Path):
    prompts = ("a dog runs", "an <b>old</b> man", "二 cats", "x")
    sampled = make_samples(tmp_path / "mine-1", prompts)
    record = evaluate.run(EvaluateConfig(), sampled, None, None, tmp_path / "out")
    assert set(record.metrics) == {"num_samples", "mean_brightness", "mean_motion"}
    frames = [render(random_scene(np.random.default_rng(n), shown, (64, 64), 9)) for n, shown in enumerate(SHOWN)]
    brightness = np.mean([clip.mean() for clip in frames])
    assert record.metrics["mean_brightness"] == pytest.approx(brightness, abs=2)
    assert "an &lt;b&gt;old&lt;/b&gt; man" in record.report.read_text(encoding="utf-8")


def test_a_prompt_that_the_checker_cannot_read_stops_it_before_any_work(tmp_path: Path):
    sampled = make_samples(tmp_path / "mine-1", ("a dog runs", *(caption(*asked) for asked in ASKED[1:])))
    with pytest.raises(ValueError, match="'a dog runs' names no colour"):
        evaluate.run(SHAPES, sampled, None, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()

"""Whole training runs on one rank: averaged weights, samples on the way, adapters, frozen weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from PIL import Image
from safetensors.torch import load_file, save_file

from wan_core.architecture import Architecture
from wan_core.config import SampleConfig, Size
from wan_core.convert import stage
from wan_core.convert.adapters import LORA_NAME, export_lora, read_adapters
from wan_core.convert.checkpoint import EMA, iteration_dir, read_tensors, read_weights, tensor_names
from wan_core.convert.mapping import from_diffusers, parameter_names
from wan_core.convert.weights import DiffusersWeights
from wan_core.sample import initial_noise, sample_videos

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the runs of `tests.training.runs`."""
    out = tmp_path_factory.mktemp("runs")
    with (out / "log.txt").open("w") as log:
        result = subprocess.run(
            [sys.executable, "-m", "tests.training.runs", str(out)], cwd=ROOT, stdout=log, stderr=log, timeout=900,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    assert result.returncode == 0, (out / "log.txt").read_text()[-6000:]
    return out


def checkpoint(runs: Path, name: str, iteration: int) -> Path:
    return iteration_dir(runs / name / "checkpoints", iteration)


def losses(runs: Path, name: str) -> dict[int, float]:
    lines = map(json.loads, (runs / name / "metrics.jsonl").read_text().splitlines())
    return {line["iteration"]: line["loss"] for line in lines}


def test_average_is_its_recurrence(runs: Path) -> None:
    """It starts at the weights after the first step; the decay of step n, from 0, is min(0.9, (1 + n) / (10 + n))."""
    name = "layers.0.mlp.linear_fc1.weight"
    first = read_tensors(checkpoint(runs, "plain", 1), [name, EMA + name])
    second = read_tensors(checkpoint(runs, "plain", 2), [name, EMA + name])
    assert torch.equal(first[EMA + name], first[name])
    expected = torch.lerp(first[EMA + name], second[name], 1 - 2 / 11)
    torch.testing.assert_close(second[EMA + name], expected, rtol=1e-6, atol=1e-7)


def test_average_is_exported(runs: Path, tmp_path: Path) -> None:
    folder = checkpoint(runs, "plain", 4)
    stage.export(folder, runs / "model", tmp_path / "ema", weights="ema")
    architecture = Architecture.from_diffusers(tmp_path / "ema")
    found = dict(from_diffusers(DiffusersWeights(tmp_path / "ema"), architecture))
    expected = read_weights(folder, "ema")
    assert found.keys() == expected.keys() == parameter_names(architecture)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not torch.equal(read_weights(folder)["head.linear.weight"], expected["head.linear.weight"])


@pytest.mark.parametrize("other", ["resumed", "sampled"])
def test_training_is_the_same_to_the_bit(runs: Path, other: str) -> None:
    """Whether the run was stopped in between, or showed samples from its averaged weights on the way."""
    one, two = checkpoint(runs, "plain", 4), checkpoint(runs, other, 4)
    names = [name for name in tensor_names(one) if name.startswith(EMA) or not name.startswith("optimizer.")]
    assert len(names) == 2 * len(parameter_names(Architecture.from_diffusers(runs / "model")))
    first, second = read_tensors(one, names), read_tensors(two, names)
    assert all(torch.equal(first[name], second[name]) for name in names)
    assert losses(runs, other).items() <= losses(runs, "plain").items()


def test_samples_are_animations(runs: Path) -> None:
    folder = runs / "sampled" / "samples" / "iter_0000004"
    assert sorted(path.name for path in folder.iterdir()) == ["000.gif", "001.gif", "002.gif", "prompts.txt"]
    for number in range(3):
        with Image.open(folder / f"{number:03d}.gif") as animation:
            assert (animation.size, animation.n_frames) == ((32, 32), 5)
    events = next((runs / "sampled" / "tensorboard").glob("events*")).read_bytes()
    assert b"samples/002" in events and b"wan/tokens_per_second" in events


def test_metrics_have_what_a_reader_asks(runs: Path) -> None:
    last = json.loads((runs / "plain" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["tokens_per_second_per_rank"] == last["tokens_per_second"] > 0  # one rank
    assert last["mfu"] is None  # no GPU, no peak
    assert 0 <= last["data_wait_share"] < 1
    assert last["packing_efficiency"] == pytest.approx((12 + 12 + 4) / 64, abs=1e-3)


def test_adapters_alone_are_saved(runs: Path) -> None:
    folder = checkpoint(runs, "lora", 4)
    names = [name for name in tensor_names(folder) if not name.startswith("optimizer.")]
    assert names and all(".adapter." in name for name in names)
    one, two = (read_tensors(checkpoint(runs, run, 4), names) for run in ("lora", "lora-resumed"))
    assert all(torch.equal(one[name], two[name]) for name in names)


@pytest.mark.parametrize("run", ["lora", "dora"])
def test_merged_weights_equal_peft_on_diffusers(runs: Path, run: str, tmp_path: Path) -> None:
    """The LoRA file in diffusers' transformer, and the merged folder: they agree, and differ from the base."""
    folder = checkpoint(runs, run, 4 if run == "lora" else 2)
    export_lora(folder, tmp_path)
    stage.export(folder, runs / "model", tmp_path / "merged")
    adapted = WanTransformer3DModel.from_pretrained(runs / "model" / "transformer")
    base = WanTransformer3DModel.from_pretrained(runs / "model" / "transformer")
    merged = WanTransformer3DModel.from_pretrained(tmp_path / "merged" / "transformer")
    adapted.load_lora_adapter(load_file(tmp_path / LORA_NAME), prefix="transformer")
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 16, 3, 4, 4, generator=generator), "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 512, 32, generator=generator),
    }  # fmt: skip
    with torch.no_grad():
        one, two, plain = (model(**inputs, return_dict=False)[0] for model in (adapted, merged, base))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert (one - plain).abs().max() > 100 * (one - two).abs().max()


def test_adapters_scale(runs: Path) -> None:
    """alpha / dim = 2 is part of the exported B."""
    folder, name = checkpoint(runs, "lora", 4), "layers.0.self_attention.linear_qkv"
    stored = read_tensors(folder, [f"{name}.adapter.linear_out.weight"])[f"{name}.adapter.linear_out.weight"]
    assert torch.equal(read_adapters(folder)[name].up, 2 * stored.float())


def test_frozen_and_undecayed_parameters_stay(runs: Path) -> None:
    """What is frozen has no moments. Two steps at lr 1e-3 and decay 100 shrink what is decayed to 0.9 ** 2 of itself;
    elsewhere each number moves by Adam's two steps of at most 1e-3."""
    folder = checkpoint(runs, "frozen", 2)
    moments = {name for name in tensor_names(folder) if name.startswith("optimizer.state.exp_avg.")}
    trained = {name.removeprefix("optimizer.state.exp_avg.") for name in moments}
    names = parameter_names(Architecture.from_diffusers(runs / "model"))
    frozen = {name for name in names if name.startswith(("layers.0.", "text_embedding."))}
    assert frozen and trained == names - frozen
    before = dict(from_diffusers(DiffusersWeights(runs / "model"), Architecture.from_diffusers(runs / "model")))
    after = read_weights(folder)
    for name in names:
        if name in frozen:
            assert torch.equal(before[name], after[name]), name
        elif name.endswith("bias") or "norm" in name or "modulation" in name:
            assert (after[name] - before[name]).abs().max() < 2.1e-3, name
        else:
            assert float(after[name].norm() / before[name].norm()) == pytest.approx(0.81, abs=0.02), name


def test_no_averages_to_export(runs: Path) -> None:
    with pytest.raises(ValueError, match="holds no averaged weights; train with"):
        read_weights(checkpoint(runs, "frozen", 2), "ema")


def test_no_adapters_to_export(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no adapters"):
        export_lora(checkpoint(runs, "plain", 4), tmp_path / "lora.safetensors")


def test_lora_file_is_what_the_pipeline_reads(runs: Path, tmp_path: Path) -> None:
    from diffusers import WanPipeline

    export_lora(checkpoint(runs, "lora", 4), tmp_path)
    state, extra = WanPipeline.lora_state_dict(tmp_path, return_lora_metadata=True)
    assert state.keys() == load_file(tmp_path / LORA_NAME).keys() and extra is None
    save_file(state, tmp_path / "again.safetensors")


def test_image_to_video_trains_and_converts(runs: Path, tmp_path: Path) -> None:
    """On a dataset of first frames; what is exported is a pipeline whose videos are those of the checkpoint."""
    folder = checkpoint(runs, "i2v", 2)
    stage.export(folder, runs / "i2v-model", tmp_path / "exported")
    pipeline = WanImageToVideoPipeline.from_pretrained(tmp_path / "exported")
    before = DiffusersWeights(runs / "i2v-model")
    for name, weight in pipeline.transformer.state_dict().items():  # all of it was trained
        assert not torch.equal(weight, before[name]), name
    assert all(0 < loss < 10 for loss in losses(runs, "i2v").values())
    with Image.open(runs / "i2v" / "samples" / "iter_0000002" / "002.gif") as animation:
        assert animation.n_frames == 5
    assert json.loads((runs / "i2v" / "validation.jsonl").read_text().splitlines()[-1])["iteration"] == 2

    config = SampleConfig(
        prompts=("a red circle moving left",), images=(str(runs / "red.png"),), negative_prompt="a", size=Size(32, 32),
        num_frames=5, num_steps=2, guidance_scale=4.0, shift=3.0, dtype="float32",
    )  # fmt: skip
    frames = next(sample_videos(config, runs / "i2v-model", folder, torch.device("cpu")))[1]
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        image=Image.open(runs / "red.png"), prompt=config.prompts[0], negative_prompt="a", height=32, width=32,
        num_frames=5, num_inference_steps=2, guidance_scale=4.0, latents=initial_noise((1, 16, 2, 4, 4), 0),
    ).frames[0]  # fmt: skip
    assert abs(frames / 255 - expected).max() < 0.02


def test_image_adapters_are_exported(runs: Path, tmp_path: Path) -> None:
    export_lora(checkpoint(runs, "i2v-lora", 1), tmp_path)
    names = load_file(tmp_path / LORA_NAME)
    assert "transformer.blocks.1.attn2.add_v_proj.lora_A.weight" in names


def test_what_image_to_video_lacks_is_refused_before_work_starts(runs: Path) -> None:
    kind, images = (runs / "refusals.txt").read_text().splitlines()
    assert "was encoded for image-to-video (it holds first frames), but the model is text-to-video" in kind
    assert "0 images are given for 3 videos of an image-to-video model" in images
    assert not (runs / "refused").exists()


def test_logged_flops_of_image_to_video_are_its_own(runs: Path) -> None:
    logged, expected = json.loads((runs / "flops.json").read_text())
    assert logged == expected


@pytest.mark.gpu
def test_runs_on_a_gpu(runs: Path) -> None:
    """Transformer Engine's Adam keeps, saves and resumes the average; bfloat16 samples and adapters come out."""
    names = parameter_names(Architecture.from_diffusers(runs / "model"))
    one, two = (read_tensors(checkpoint(runs, run, 4), [EMA + name for name in names]) for run in ("plain", "resumed"))
    for name in names:
        torch.testing.assert_close(one[EMA + name], two[EMA + name], rtol=1e-3, atol=1e-3)
    assert losses(runs, "resumed")[4] == pytest.approx(losses(runs, "plain")[4], rel=1e-2)
    assert (runs / "sampled" / "samples" / "iter_0000004" / "002.gif").is_file()
    assert read_adapters(checkpoint(runs, "lora", 4)).keys() == read_adapters(checkpoint(runs, "dora", 2)).keys()

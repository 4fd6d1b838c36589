"""Whole training runs on one rank: averaged weights, samples on the way, adapters, frozen weights."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from wan_core.architecture import Architecture
from wan_core.config import SampleConfig, Size
from wan_core.convert import stage
from wan_core.convert.adapters import LORA_NAME, export_lora, read_adapters
from wan_core.convert.checkpoint import EMA, iteration_dir, read_tensors, read_weights, tensor_names
from wan_core.convert.mapping import from_diffusers, parameter_names
from wan_core.convert.weights import DiffusersWeights
from wan_core.flow_matching import FlowMatchingConfig
from wan_core.sample import initial_noise, sample_videos
from wan_core.trainer_keys import trainer_keys
from wan_core.training_run import read_lines

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


def test_the_list_of_keys_is_what_the_trainer_has(runs: Path) -> None:
    """Here because it needs a process with Megatron in it."""
    written = (runs / "keys.txt").read_text().split()
    assert set(written) == trainer_keys(), "a config has changed: run `python -m wan_core.trainer_schema`"


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


def test_gradients_are_clipped_together(runs: Path) -> None:
    """Adam's first moment after one step is 0.1 times the gradient, whose norm over all weights is cut to 0.5."""
    line = json.loads((runs / "plain" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["grad_norm"] > 0.6, "logged as it was before"
    first = checkpoint(runs, "plain", 1)
    moments = read_tensors(first, [name for name in tensor_names(first) if ".exp_avg." in name])
    norm = math.sqrt(sum(float(moment.double().square().sum()) for moment in moments.values()))
    assert norm / (1 - 0.9) == pytest.approx(0.5, rel=1e-4)


def test_average_is_exported(runs: Path, tmp_path: Path) -> None:
    folder = checkpoint(runs, "plain", 2)
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
    one, two = checkpoint(runs, "plain", 2), checkpoint(runs, other, 2)
    names = [name for name in tensor_names(one) if name.startswith(EMA) or not name.startswith("optimizer.")]
    assert len(names) == 2 * len(parameter_names(Architecture.from_diffusers(runs / "model")))
    first, second = read_tensors(one, names), read_tensors(two, names)
    assert all(torch.equal(first[name], second[name]) for name in names)
    assert losses(runs, other).items() <= losses(runs, "plain").items()


def test_samples_are_animations(runs: Path) -> None:
    folder = runs / "sampled" / "samples" / "iter_0000002"
    assert sorted(path.name for path in folder.iterdir()) == ["000.gif", "001.gif", "002.gif", "prompts.txt"]
    for number in range(3):
        with Image.open(folder / f"{number:03d}.gif") as animation:
            assert (animation.size, animation.n_frames) == ((32, 32), 5)
    events = next((runs / "sampled" / "tensorboard").glob("events*")).read_bytes()
    assert b"samples/002" in events and b"wan/tokens_per_second" in events


def test_the_last_to_set_a_field_wins(runs: Path) -> None:
    assert json.loads((runs / "layers.json").read_text()) == {
        "optimizer.adam_beta2": 0.999, "flow_matching.density": "logit_normal", "optimizer.weight_decay": 0.1,
        "optimizer.lr": 2e-5, "flow_matching.logit_std": 0.9, "flow_matching.shift": 9.0,
    }  # fmt: skip


def test_noise_levels_lie_in_the_checkpoint(runs: Path) -> None:
    stored = yaml.safe_load((checkpoint(runs, "frozen", 2) / "run_config.yaml").read_text())["flow_matching"]
    recipe = {"stratified": True}  # of wan_demo.yaml
    expected = asdict(replace(FlowMatchingConfig.for_mode("finetune"), shift=4.5, **recipe))
    assert {name: value for name, value in stored.items() if name != "_target_"} == expected


@pytest.mark.parametrize(
    ("name", "after_warmup"),
    [
        ("cosine", [1e-4 + 9e-4 * (1 + math.cos(math.pi * n / 9)) / 2 for n in range(9)]),
        ("constant", [1e-3] * 9),
        ("WSD", [1e-3] * 5 + [1e-4 + 9e-4 * (1 - n / 4) for n in range(4)]),
    ],
)
def test_learning_rates_are_their_closed_forms(runs: Path, name: str, after_warmup: list[float]) -> None:
    found = json.loads((runs / "rates.json").read_text())[name]
    assert found == pytest.approx([0, 1e-3 / 3, 2e-3 / 3, *after_warmup], rel=1e-9)


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows, by name and step."""
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]}


def test_tensorboard_has_what_a_reader_asks(runs: Path) -> None:
    curves, last = scalars(runs / "plain"), list(read_lines(runs / "plain" / "metrics.jsonl"))[-1]
    for name in (
        "step_seconds", "tokens_per_second", "tokens_per_second_per_rank", "tflops_per_rank", "packing_efficiency",
        "peak_memory_gib", "data_wait_share", "consumed_samples", "skipped_steps",
    ):  # fmt: skip
        assert curves[f"wan/{name}"].keys() == {1, 2}
        assert curves[f"wan/{name}"][2] == pytest.approx(last[name], rel=1e-6)
    for name, other in (("loss", "loss"), ("learning-rate", "learning_rate"), ("grad-norm", "grad_norm")):
        assert curves[name][2] == pytest.approx(last[other], rel=1e-6)


def test_a_step_is_a_readable_line(runs: Path) -> None:
    number = r"[\d.]+"
    line = (
        rf"^iteration 2/2 \| loss {number} \| grad norm {number} \| lr 1.00e-02 \| {number} s/step \| {number} tokens/s"
        rf" and {number} TFLOP/s per rank \| packs 43.8% full \| {number} GiB \| data wait {number}%$"
    )
    assert re.search(line, (runs / "log.txt").read_text(), re.MULTILINE)


def test_weights_and_biases_and_mlflow_get_the_same(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are installed (docs/recipes.md): numbers as curves, samples as animations, named as the run folder."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow")
    run = runs / "sampled"
    assert len(list((run / "wandb").glob("offline-run-*/files/media/videos/samples/*.gif"))) == 6
    client = mlflow.MlflowClient(f"file://{runs}/mlruns")
    (found,) = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert found.info.run_name == "sampled" and found.info.status == "FINISHED"
    assert found.data.params["optimizer.ema_decay"] == "0.9"
    last = list(read_lines(run / "metrics.jsonl"))[-1]
    for name, key in (("wan/tokens_per_second", "tokens_per_second"), ("loss", "loss")):
        assert found.data.metrics[name] == pytest.approx(last[key], rel=1e-6)
    assert [item.path for item in client.list_artifacts(found.info.run_id, "samples/iter_0000002")] == [
        f"samples/iter_0000002/{number:03d}.gif" for number in range(3)
    ]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("unknown", "optimizer.lrr is no key of the trainer; did you mean optimizer.lr?"),
        ("type", "train.train_iters='many' is str, but the field takes "),
        ("choice", "stability.on_bad_steps='hope' is none of skip, rollback, stop; the present value is 'skip'"),
        ("value", "flow_matching.shift=-1.0 is not positive; choose 3.0"),
        ("recipe", "recipe 'wan_2b' does not exist; choose one of wan_14b, "),
        ("none", "no dataset: give dataset.path=DIR (the index stage's output), or --mock"),
        ("missing", "dataset.path=FOLDER/missing does not exist; give the folder that the index stage wrote"),
        ("empty", "dataset.path=FOLDER is empty; give the folder that the index stage wrote"),
        ("unindexed", "dataset.path=FOLDER/.. holds no Energon metadata (.nv-meta/dataset.yaml); run the index stage"),
        ("counted", "dataset.batch_unit=samples needs a dataset; --mock makes whole packs, so set packs"),
        ("micro", "train.micro_batch_size=2, but a micro-batch is one pack; set it to 1"),
        ("batch", "train.global_batch_size=0 packs do not divide over 1 data-parallel ranks; choose 1 or 2"),
        ("file", "--config-file FOLDER/none.yaml does not exist; give a YAML file"),
        ("section", "FOLDER/../../section.yaml: train=5 is no section; write fields below it"),
        ("size", "architecture='t2v-3B' is unknown; choose one of t2v-1.3B, t2v-14B, i2v-14B"),
        ("layout", "num_attention_heads=12 is not divisible by tensor_model_parallel_size=5; choose one of 1, 2, 3, 4"),
        (
            "ring",
            "cp_comm_type=p2p needs FlashAttention 4 on GPUs, which is not installed here; run uv sync --extra gpu",
        ),
        (
            "heads",
            "cp_comm_type=p2p needs heads of 32 features or more on GPUs, and these have 16: FlashAttention 4's ",
        ),
        ("recompute", "recompute_granularity=full needs recompute_method (block or uniform), which is None, and "),
        ("ranks", "1 ranks (nodes x processes_per_node) are no multiple of tensor_model_parallel_size=2; start 2, or "),
        ("async", "checkpoint.async_save=true needs a GPU"),
        ("adapters", "lora.dim=4 needs weights to adapt; give --training-mode finetune and --model"),
        ("encoders", "samples.interval needs a text encoder and a VAE; give --model, or samples.interval=0"),
        ("prompts", "samples.interval is set, but samples.prompts is empty; give some, or interval=0"),
        ("load", "FOLDER/none holds no checkpoint; give the folder of checkpoint.save"),
        ("package", "logger.wandb_project=a needs the package wandb, which is not installed; install it"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_a_sentence(runs: Path, name: str, sentence: str) -> None:
    said = json.loads((runs / "refusals.json").read_text()).get(name)
    if said is None:
        pytest.skip("works here: wandb and mlflow are installed, or there is a GPU")
    assert said.startswith("wan_core.train: " + sentence.replace("FOLDER", str(runs / "bad" / name)))
    assert "\n" not in said


def test_metrics_have_what_a_reader_asks(runs: Path) -> None:
    last = json.loads((runs / "plain" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["tokens_per_second_per_rank"] == last["tokens_per_second"] > 0  # one rank
    assert last["mfu"] is None  # no GPU, no peak
    assert 0 <= last["data_wait_share"] < 1
    assert last["packing_efficiency"] == pytest.approx((12 + 12 + 4) / 64, abs=1e-3)


def test_adapters_alone_are_saved(runs: Path) -> None:
    folder = checkpoint(runs, "lora", 2)
    names = [name for name in tensor_names(folder) if not name.startswith("optimizer.")]
    assert names and all(".adapter." in name for name in names)
    one, two = (read_tensors(checkpoint(runs, run, 2), names) for run in ("lora", "lora-resumed"))
    assert all(torch.equal(one[name], two[name]) for name in names)


@pytest.mark.parametrize("run", ["lora", "dora"])
def test_merged_weights_equal_peft_on_diffusers(runs: Path, run: str, tmp_path: Path) -> None:
    """The LoRA file in diffusers' transformer, and the merged folder: they agree, and differ from the base."""
    folder = checkpoint(runs, run, 2)
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
    folder, name = checkpoint(runs, "lora", 2), "layers.0.self_attention.linear_qkv"
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
        export_lora(checkpoint(runs, "plain", 2), tmp_path / "lora.safetensors")


def test_lora_file_is_what_the_pipeline_reads(runs: Path, tmp_path: Path) -> None:
    from diffusers import WanPipeline

    export_lora(checkpoint(runs, "lora", 2), tmp_path)
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
    one, two = (read_tensors(checkpoint(runs, run, 2), [EMA + name for name in names]) for run in ("plain", "resumed"))
    for name in names:
        torch.testing.assert_close(one[EMA + name], two[EMA + name], rtol=1e-3, atol=1e-3)
    last = list(read_lines(runs / "plain" / "metrics.jsonl"))[-1]
    assert last["peak_memory_gib"] > 0 and last["mfu"] is not None
    assert losses(runs, "resumed")[2] == pytest.approx(losses(runs, "plain")[2], rel=1e-2)
    assert (runs / "sampled" / "samples" / "iter_0000002" / "002.gif").is_file()
    assert read_adapters(checkpoint(runs, "lora", 2)).keys() == read_adapters(checkpoint(runs, "dora", 2)).keys()

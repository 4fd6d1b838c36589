"""Several small training runs one after the other in this process: importing Megatron is what takes time.

    python -m tests.training.runs OUT

Light at the top, because Megatron's checkpoint writers are spawned processes that import the main module anew.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

PROMPTS = "[a red circle moving left, a blue square moving up, a green circle]"
SETTINGS = (
    "dataset.mock_shapes=[3x4x4,2x4x6,1x4x4]", "dataset.tokens_per_pack=64", "logger.log_interval=1",
    "optimizer.lr=1e-2", "scheduler.lr_decay_style=constant", "scheduler.lr_warmup_iters=0", "dataset.num_workers=0",
)  # fmt: skip
AVERAGED = (*SETTINGS, "optimizer.ema_decay=0.9", "optimizer.clip_grad=0.5")
SAMPLED = (
    "samples.interval=1", f"samples.prompts={PROMPTS}", "samples.height=32", "samples.width=32", "samples.num_frames=5",
    "samples.num_steps=2", "samples.negative_prompt=a",
)  # fmt: skip
LOGGED = (
    "validation.eval_interval=2", "validation.max_samples=2", "validation.sigmas=[0.5]",
    "logger.wandb_project=tiny", "logger.mlflow_experiment=tiny",
)  # fmt: skip
REFUSED = {  # what a user may get wrong, behind the name of a folder that it may use
    "unknown": ("--mock", "optimizer.lrr=1"),
    "type": ("--mock", "train.train_iters=many"),
    "choice": ("--mock", "stability.on_bad_steps=hope"),
    "value": ("--mock", "flow_matching.shift=-1"),
    "recipe": ("--mock", "--recipe", "wan_2b"),
    "none": (),
    "missing": ("dataset.path=FOLDER/missing",),
    "empty": ("dataset.path=FOLDER",),
    "unindexed": ("dataset.path=FOLDER/..",),
    "counted": ("--mock", "dataset.batch_unit=samples"),
    "micro": ("--mock", "train.micro_batch_size=2"),
    "batch": ("--mock", "train.global_batch_size=0"),
    "file": ("--mock", "--config-file", "FOLDER/none.yaml"),
    "section": ("--mock", "--config-file", "FOLDER/../../section.yaml"),
    "size": ("--mock", "--config-file", "FOLDER/../../size.yaml"),
    "layout": ("--mock", "model.tensor_model_parallel_size=5"),
    "recompute": ("--mock", "model.recompute_granularity=full"),
    "ranks": ("--mock", "model.tensor_model_parallel_size=2"),
    "async": ("--mock", "checkpoint.async_save=true"),
    "adapters": ("--mock", "lora.dim=4"),
    "encoders": ("--mock", "samples.interval=2", "samples.prompts=[a]"),
    "prompts": ("--mock", "samples.interval=2"),
    "load": ("--mock", "checkpoint.load=FOLDER/none"),
    "package": ("--mock", "logger.wandb_project=a", "logger.mlflow_experiment=b"),  # where they are not installed
}
SCHEDULES = {  # 12 steps, 3 of them warming up
    "cosine": ("scheduler.lr_decay_style=cosine",),
    "constant": ("scheduler.lr_decay_style=constant",),
    "WSD": ("scheduler.lr_decay_style=WSD", "scheduler.lr_wsd_decay_style=linear", "scheduler.lr_wsd_decay_iters=4"),
}
ADAPTED = (*SETTINGS, "lora.dim=4", "lora.alpha=8")


def main(out: Path) -> None:
    import torch

    torch.set_num_threads(1)
    from tests.tiny import make_tiny_model
    from wan_core.trainer_schema import present_keys

    model = make_tiny_model(out / "model")
    (out / "keys.txt").write_text("\n".join(present_keys()))
    loggers = find_spec("wandb") and find_spec("mlflow")
    here = {"package": not loggers, "async": not torch.cuda.is_available()}
    refused = [name for name in REFUSED if here.get(name, True)]
    (out / "section.yaml").write_text("train: 5")
    (out / "size.yaml").write_text("architecture: t2v-3B")
    said = {name: refusal(out / "bad" / name, *REFUSED[name]) for name in refused}
    ring = ("--mock", "model.context_parallel_size=2", "model.cp_comm_type=p2p")
    with mock.patch("wan_core.recipes.attention_backend", return_value="cudnn"):  # as on a GPU without FlashAttention 4
        said["ring"] = refusal(out / "bad" / "ring", *ring)
    with mock.patch("wan_core.recipes.attention_backend", return_value="flash_attention_4"):
        said["heads"] = refusal(out / "bad" / "heads", *ring, "model.num_attention_heads=96")
    (out / "refusals.json").write_text(json.dumps(said))
    (out / "layers.json").write_text(json.dumps(layers(out / "user.yaml")))
    (out / "rates.json").write_text(json.dumps({name: rates(*SCHEDULES[name]) for name in SCHEDULES}))
    gc.freeze()  # else Bridge's collections in each run walk through all that was imported
    train(out / "plain", model, (*AVERAGED, "train.train_iters=2", "checkpoint.save_interval=1"))
    sampled = (*AVERAGED, *SAMPLED, "train.train_iters=2", "checkpoint.save_interval=2")
    if loggers:
        os.environ.update(
            WANDB_MODE="offline", MLFLOW_ALLOW_FILE_STORE="true", MLFLOW_TRACKING_URI=f"file://{out}/mlruns"
        )
        sampled = (*sampled, *LOGGED)
    train(out / "sampled", model, sampled)
    cut_off(out / "plain", out / "resumed", 1)
    train(out / "resumed", model, (*AVERAGED, "train.train_iters=2", "checkpoint.save_interval=2"))
    train(out / "lora", model, (*ADAPTED, "train.train_iters=2", "checkpoint.save_interval=1"))
    cut_off(out / "lora", out / "lora-resumed", 1)
    train(out / "lora-resumed", model, (*ADAPTED, "train.train_iters=2", "checkpoint.save_interval=2"))
    train(out / "dora", model, (*ADAPTED, "lora.magnitude=true", "train.train_iters=2", "checkpoint.save_interval=2"))
    frozen = (
        "flow_matching.shift=4.5",
        "model.freeze=[layers.0.*, text_embedding.*]",
        "optimizer.weight_decay=100.0",
        "optimizer.lr=1e-3",
    )
    train(out / "frozen", model, (*SETTINGS, *frozen, "train.train_iters=2", "checkpoint.save_interval=2"))
    image_to_video(out)


def image_to_video(out: Path) -> None:
    """A run on a dataset with first frames, with adapters on the image's branch, too, and a dataset that is refused."""
    from PIL import Image

    from tests.resume.data import make_dataset
    from tests.tiny import IMAGE_DIM, TEXT_DIM, make_tiny_model
    from wan_core.digests import encoder_identity

    model = make_tiny_model(out / "i2v-model", image_to_video=True)
    data = make_dataset(
        out / "i2v-data", 12, text_dim=TEXT_DIM, image_dim=IMAGE_DIM, encoder=encoder_identity(model)
    )  # fmt: skip
    Image.new("RGB", (32, 32), "red").save(out / "red.png")
    iterations = ("train.train_iters=2", "checkpoint.save_interval=2", "validation.eval_interval=2")
    shown = (*SAMPLED, f"samples.images=[{', '.join([str(out / 'red.png')] * 3)}]")
    train(out / "i2v", model, (*SETTINGS, *iterations, *shown), data)
    train(out / "i2v-lora", model, (*ADAPTED, "train.train_iters=1", "checkpoint.save_interval=1"))
    refusals = []
    for path, overrides in ((out / "model", SETTINGS), (model, (*SETTINGS, *SAMPLED))):
        try:
            train(out / "refused", path, overrides, data)
        except ValueError as error:
            refusals.append(f"{error}\n")
    (out / "refusals.txt").write_text("".join(refusals))
    (out / "flops.json").write_text(json.dumps(logged_and_expected_flops()))


def logged_and_expected_flops() -> list[int]:
    """Of a step of two clips: what the log's formula makes of the step's sums, and the architecture's own count."""
    from wan_core.architecture import I2V_14B
    from wan_core.config import TEXT_LENGTH
    from wan_core.model.provider import WanProvider

    lengths, provider = (32760, 1560), WanProvider.of_architecture(I2V_14B)
    squares, text = sum(length**2 for length in lengths), TEXT_LENGTH * len(lengths)
    logged = provider._get_num_floating_point_operations_with_runtime_stats(1, sum(lengths), squares, text, None)
    return [logged, sum(map(I2V_14B.training_flops, lengths))]


def train(run_dir: Path, model: Path, overrides: tuple[str, ...], dataset: Path | None = None) -> None:
    """One run, in process groups of its own, on a dataset or on random data."""
    import torch
    import torch.distributed as dist

    from wan_core.config import TrainConfig
    from wan_core.runtime import cpu

    cpu.install()
    from wan_core.training import run

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        run(TrainConfig("wan_demo", "finetune", overrides), model, dataset, run_dir, None, mock=dataset is None)
    finally:
        dist.destroy_process_group()


def layers(file: Path) -> dict[str, object]:
    """Fields that the defaults, the mode, the recipe, the user's file and an override set, each the last to do so."""
    from wan_core.config import TrainConfig
    from wan_core.recipes import build

    file.write_text("{flow_matching: {shift: 7.0, logit_std: 0.9}, optimizer: {lr: 2.0e-5}}")
    config = TrainConfig("wan_1_3b", "pretrain", ("flow_matching.shift=9",))
    found = build(config, model_dir=None, dataset_dir=None, run_dir=None, config_file=file, mock=True)
    return {
        "optimizer.adam_beta2": found.optimizer.adam_beta2, "flow_matching.density": found.flow_matching.density,
        "optimizer.weight_decay": found.optimizer.weight_decay, "optimizer.lr": found.optimizer.lr,
        "flow_matching.logit_std": found.flow_matching.logit_std, "flow_matching.shift": found.flow_matching.shift,
    }  # fmt: skip


def rates(*overrides: str) -> list[float]:
    """The learning rate of each step."""
    import torch
    from megatron.bridge.training.optim import _get_scheduler

    from wan_core.config import TrainConfig
    from wan_core.recipes import build

    settings = (
        "train.train_iters=12", "train.global_batch_size=6", "scheduler.lr_warmup_iters=3", "optimizer.lr=1e-3",
        "optimizer.min_lr=1e-4",
    )  # fmt: skip
    config = TrainConfig("wan_demo", "pretrain", (*settings, *overrides))
    container = build(config, model_dir=None, dataset_dir=None, run_dir=None, mock=True)
    container.validate()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = _get_scheduler(container.optimizer, container.scheduler, optimizer)
    found = []
    for _ in range(12):
        found.append(optimizer.param_groups[0]["lr"])
        scheduler.step(increment=6)  # as Bridge does after a step
    return found


def refusal(folder: Path, *arguments: str) -> str:
    """What `python -m wan_core.train` says of these arguments."""
    from wan_core import train

    folder.mkdir(parents=True)
    sys.argv = ["wan_core.train", "--run-dir", str(folder / "run")]
    sys.argv += [argument.replace("FOLDER", str(folder)) for argument in arguments]
    try:
        train.main()
    except SystemExit as end:
        return str(end.code)
    return "nothing"


def cut_off(source: Path, target: Path, iteration: int) -> None:
    """A run that was stopped after a checkpoint: a copy of another one without what came later."""
    shutil.copytree(source, target)
    (target / "metrics.jsonl").unlink()
    for folder in (target / "checkpoints").glob("iter_*"):
        if int(folder.name.removeprefix("iter_")) > iteration:
            shutil.rmtree(folder)
    folder = target / "checkpoints" / f"iter_{iteration:07d}"
    (target / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    shutil.copyfile(folder / "train_state.pt", target / "checkpoints" / "latest_train_state.pt")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]))

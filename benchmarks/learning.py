"""Does a WAN transformer learn? A 50M-parameter one from the demo's clips, minutes on one GPU; then LoRA on a colour.

    python -m benchmarks.learning prepare     # on a machine with PyAV: .dev/learning.tar.gz, 25 MB to carry along
    python -m benchmarks.learning train       # on the GPU host: pretrain for --minutes, sample, score
    python -m benchmarks.learning lora        # there, after train: finetune adapters on a sixth colour, score again

`train` sees every combination of colour, shape and direction but the eight that the demo holds out. It samples those
with guidance from the EMA weights now and then, and lets the demo's checker read the pixels. Results go to --out:
results-train.json, results-lora.json, a contact sheet beside each, and the run folders with metrics and TensorBoard.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
from itertools import product
from pathlib import Path

DATA, OUT = Path(".dev/learning"), Path(".dev/learning-out")
CLIPS, COLOUR_CLIPS = 2080, 240  # 40 of each combination; of the new colour, and as many of the old ones beside them
COLOUR_HELD_OUT = (("circle", "left"), ("square", "down"), ("triangle", "right"))  # never shown in the new colour


def prepare(folder: Path, clips: int, colour_clips: int, hidden: int, layers: int) -> None:
    """Write `model/` (all of a Diffusers folder but the transformer's weights), `shapes/` and `colour/` (indexed)."""
    import numpy as np
    import torch

    from wan_core.architecture import Architecture
    from wan_core.demo import model, videos

    torch.set_num_threads(1)
    model.make_model(folder / "model")
    shutil.rmtree(folder / "model" / "transformer")
    (folder / "model" / "transformer").mkdir()
    architecture = Architecture(hidden, 4 * hidden, hidden // 64, layers, text_dim=model.TEXT_DIM)
    config = {"_class_name": "WanTransformer3DModel", **architecture.to_diffusers()}
    (folder / "model" / "transformer" / "config.json").write_text(json.dumps(config, indent=1))
    rng = np.random.default_rng(1)
    colour = next(iter(videos.NEW_COLOURS))
    moves = [m for m in product(videos.SHAPES, videos.DIRECTIONS) if m not in COLOUR_HELD_OUT]
    new = [videos.random_scene(rng, (colour, *moves[i % len(moves)])) for i in range(colour_clips)]
    encode(folder, "shapes", videos.training_scenes(clips))
    encode(folder, "colour", new + videos.training_scenes(colour_clips, seed=2))
    embed_prompts(folder)
    with tarfile.open(f"{folder}.tar.gz", "w:gz") as archive:
        archive.add(folder, folder.name)


def embed_prompts(folder: Path) -> None:
    """Embeddings of all prompts, in `prompts.pt`: the GPU host may lack what cleaning a caption needs."""
    import torch

    from wan_core.demo import held_out_prompts
    from wan_core.encode.text import load_text_encoder

    prompts = ["", *new_colour_prompts(), *held_out_prompts()]
    encoder = load_text_encoder(folder / "model", torch.float32, "cpu")
    torch.save(dict(zip(prompts, encoder.encode(prompts), strict=True)), folder / "prompts.pt")


def new_colour_prompts() -> tuple[str, ...]:
    """One for each combination of the new colour."""
    from wan_core.demo import videos

    colour = next(iter(videos.NEW_COLOURS))
    return tuple(videos.caption(colour, *move) for move in product(videos.SHAPES, videos.DIRECTIONS))


def encode(folder: Path, name: str, scenes: list) -> None:
    """The pipeline's first stages over rendered scenes: `<folder>/<name>` is what `dataset.path` takes."""
    from wan_core.config import IndexConfig, ShardConfig
    from wan_core.data import index, shards
    from wan_core.demo.videos import write_clips
    from wan_core.encode import stage
    from wan_core.presets import wan_demo

    work = folder.with_name(f"{folder.name}-work") / name
    if not (work / "videos").exists():
        write_clips(work / "videos", scenes)
    encoded = stage.run(wan_demo().encode, work / "videos", folder / "model", work / "encoded")
    sharded = shards.run(ShardConfig(max_samples=100, val_share=0.02), encoded, work / "shards")
    index.run(IndexConfig(), sharded, folder / name)


def train(data: Path, out: Path, minutes: float, interval: int, overrides: list[str]) -> None:
    """Pretrain on `shapes`, score on held-out combinations, export the averaged weights to `<out>/model`."""
    from wan_core.demo import held_out_prompts

    prompts = {"held out": held_out_prompts() * 8}
    settings = [
        "optimizer.lr=8e-4", "optimizer.adam_beta2=0.99", "optimizer.ema_decay=0.998", "scheduler.lr_warmup_iters=200",
        "scheduler.lr_decay_style=constant", "dataset.tokens_per_pack=16384", "dataset.packing_buffer_size=6400",
        "model.embedder_init_std=0.05", *overrides,
    ]  # fmt: skip
    run(data, data / "model", "shapes", out, "train", "pretrain", minutes, interval, prompts, settings)
    source, target = f"--megatron-path={out / 'train' / 'checkpoints'}", f"--hf-path={out / 'model'}"
    command = [sys.executable, "-m", "wan_core.convert", "export", f"--hf-model={data / 'model'}", source, target]
    shutil.rmtree(out / "model", ignore_errors=True)  # of an earlier run
    subprocess.run([*command, "--ema"], check=True)


def lora(data: Path, out: Path, minutes: float, interval: int, overrides: list[str]) -> None:
    """Finetune adapters on `colour`: its accuracy, and that of the colours from before, over the steps."""
    from wan_core.demo import held_out_prompts

    prompts = {"new colour": new_colour_prompts() * 4, "held out": held_out_prompts() * 6}
    settings = [
        "lora.dim=32", "optimizer.lr=5e-4", "optimizer.adam_beta2=0.99", "optimizer.ema_decay=0.98",
        "scheduler.lr_warmup_iters=20", "scheduler.lr_decay_style=constant", "dataset.tokens_per_pack=8192",
        "dataset.packing_buffer_size=3200", "train.train_iters=400", *overrides,
    ]  # fmt: skip
    run(data, out / "model", "colour", out, "lora", "finetune", minutes, interval, prompts, settings)


def run(
    data: Path, model: Path, dataset: str, out: Path, name: str, mode: str, minutes: float, interval: int,
    prompts: dict[str, tuple[str, ...]], overrides: list[str],
) -> None:  # fmt: skip
    """One training run of `wan_core.train`'s, stopped after some minutes, scored on its way and at its end."""
    from wan_core.runtime import cpu

    cpu.install()
    from benchmarks import learning_score
    from wan_core import training
    from wan_core.config import TrainConfig

    shared = (
        f"dataset.path={data / dataset}", "train.train_iters=1000000", "checkpoint.save_interval=1000000",
        "logger.log_interval=50", "flow_matching.stratified=true", "dataset.num_workers=8",
    )  # fmt: skip
    config = TrainConfig("wan_demo", mode, (*shared, *overrides))  # type: ignore[arg-type]
    score = learning_score.Score(data, model, out / name, prompts, interval, minutes)
    training.run(config, model, None, out / name, None, False, extra=[score])
    score.write(out, name)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = result.add_subparsers(dest="command", required=True)
    preparing, training, adapting = (commands.add_parser(name) for name in ("prepare", "train", "lora"))
    preparing.add_argument("--clips", type=int, default=CLIPS)
    preparing.add_argument("--colour-clips", type=int, default=COLOUR_CLIPS)
    preparing.add_argument("--hidden", type=int, default=512, help="width of the transformer; heads have 64 each")
    preparing.add_argument("--layers", type=int, default=12)
    training.add_argument("--minutes", type=float, default=9.0, help="of training, start and end apart")
    adapting.add_argument("--minutes", type=float, default=3.0)
    for command in (preparing, training, adapting):
        command.add_argument("--data", type=Path, default=DATA)
    training.add_argument("--interval", type=int, default=500, help="steps from one scoring to the next")
    adapting.add_argument("--interval", type=int, default=100)
    for command in (training, adapting):
        command.add_argument("--out", type=Path, default=OUT)
        command.add_argument("overrides", nargs="*", metavar="key=value")
    return result


def main() -> None:
    args = parser().parse_args()
    if args.command == "prepare":
        prepare(args.data, args.clips, args.colour_clips, args.hidden, args.layers)
    else:
        if not args.data.exists():
            with tarfile.open(f"{args.data}.tar.gz") as archive:
                archive.extractall(args.data.parent, filter="data")
        (train if args.command == "train" else lora)(args.data, args.out, args.minutes, args.interval, args.overrides)


if __name__ == "__main__":
    main()

"""Train a WAN transformer: `torchrun -m wan_core.train ...` around Megatron-Bridge's `pretrain()`.

    torchrun --nproc-per-node 8 -m wan_core.train --recipe wan_1_3b --training-mode finetune \\
        --model DIFFUSERS_DIR --dataset INDEXED_DIR --run-dir RUN_DIR train.train_iters=2000 optimizer.lr=1e-5

This module stays light: checkpoint writers are spawned processes that import it anew.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

from wan_core.config import TrainConfig


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="wan_core.train", description="Train a WAN transformer under torchrun. key=value overrides any field of "
        "the recipe, in the names of Megatron-Bridge's ConfigContainer.",
    )  # fmt: skip
    result.add_argument("--recipe", default="wan_1_3b", help="a file of wan_core/conf (default: wan_1_3b)")
    result.add_argument("--config-file", type=Path, help="YAML over the recipe: a copy of wan_core/conf/*.yaml, edited")
    result.add_argument("--training-mode", choices=("pretrain", "finetune"), default="pretrain",
                        help="noise-level preset; finetune also starts from the model's weights")  # fmt: skip
    result.add_argument("--model", type=Path, help="Diffusers folder: architecture, and weights to finetune")
    result.add_argument("--dataset", type=Path, help="folder of the index stage; the same as dataset.path=DIR")
    result.add_argument("--run-dir", type=Path, help="checkpoints, metrics and logs go here; a run there is resumed")
    result.add_argument("--mock", action="store_true", help="random data of the shapes in dataset.mock_shapes")
    result.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.train_iters=1000")
    return result


def main() -> None:
    args = parser().parse_intermixed_args()
    try:
        config = TrainConfig(args.recipe, args.training_mode, tuple(args.overrides))
        from wan_core.runtime import cpu

        cpu.install()  # before megatron.bridge is imported
        from wan_core.training import run

        run(config, args.model, args.dataset, args.run_dir, args.config_file, args.mock)
        gc.freeze()  # the interpreter's last collection would walk through all of Megatron, for 3 s
    except ValueError as error:
        sys.exit(f"wan_core.train: {error}")


if __name__ == "__main__":
    main()

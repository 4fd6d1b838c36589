"""Convert between Diffusers folders and Megatron checkpoints.

python -m wan_core.convert import --hf-model DIFFUSERS_DIR --megatron-path CHECKPOINTS
python -m wan_core.convert export --hf-model DIFFUSERS_DIR --megatron-path CHECKPOINTS --hf-path NEW_DIFFUSERS_DIR
python -m wan_core.convert lora --megatron-path CHECKPOINTS --hf-path FOLDER_OR_FILE.safetensors
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from wan_core.config import check


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="wan_core.convert", description="Convert between Diffusers folders and Megatron checkpoints, bit for bit."
    )
    commands = result.add_subparsers(dest="command", required=True)
    importing = commands.add_parser("import", help="Diffusers transformer to a Megatron checkpoint")
    exporting = commands.add_parser("export", help="Megatron checkpoint to a complete Diffusers folder")
    adapting = commands.add_parser("lora", help="adapters of a checkpoint to a LoRA file for WanPipeline")
    for command in (importing, exporting):
        command.add_argument(
            "--hf-model", type=Path, required=True, help="Diffusers folder, also the source of all parts"
        )
    for command in (importing, exporting, adapting):
        command.add_argument("--megatron-path", type=Path, required=True, help="checkpoints (checkpoint.save)")
    for command in (exporting, adapting):
        command.add_argument("--hf-path", type=Path, required=True, help="the Diffusers folder, or LoRA file, to write")
        command.add_argument("--iteration", type=int, help="which checkpoint (default: the latest)")
        command.add_argument("--ema", action="store_true", help="the weights' moving averages (optimizer.ema_decay)")
    return result


def main() -> None:
    args = parser().parse_args()
    try:
        if args.command == "import":
            from wan_core.runtime import cpu

            cpu.install()
            from wan_core.convert.bridge import import_checkpoint

            count = import_checkpoint(args.hf_model, args.megatron_path)
            print(f"{count:,} parameters -> {args.megatron_path}")
        else:
            from wan_core.convert.adapters import export_lora
            from wan_core.convert.checkpoint import EMA, iteration_dir
            from wan_core.convert.stage import export

            check(not args.hf_path.exists(), f"{args.hf_path} exists; choose a new folder")
            checkpoint = iteration_dir(args.megatron_path, args.iteration)
            if args.command == "lora":
                count = export_lora(checkpoint, args.hf_path, EMA if args.ema else "")
            else:
                count = export(
                    checkpoint, args.hf_model, args.hf_path, weights="ema" if args.ema else "model"
                )  # fmt: skip
            print(f"{count} tensors -> {args.hf_path}")
    except ValueError as error:
        sys.exit(f"wan_core.convert: {error}")


if __name__ == "__main__":
    main()

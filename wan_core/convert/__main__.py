"""Convert between Diffusers folders and Megatron checkpoints.

python -m wan_core.convert import --hf-model DIFFUSERS_DIR --megatron-path CHECKPOINTS
python -m wan_core.convert export --hf-model DIFFUSERS_DIR --megatron-path CHECKPOINTS --hf-path NEW_DIFFUSERS_DIR
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
    for command in (importing, exporting):
        command.add_argument(
            "--hf-model", type=Path, required=True, help="Diffusers folder, also the source of all parts"
        )
        command.add_argument("--megatron-path", type=Path, required=True, help="checkpoints (checkpoint.save)")
    exporting.add_argument("--hf-path", type=Path, required=True, help="the Diffusers folder to write")
    exporting.add_argument("--iteration", type=int, help="which checkpoint (default: the latest)")
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
            from wan_core.convert.checkpoint import iteration_dir
            from wan_core.convert.stage import export

            check(not args.hf_path.exists(), f"{args.hf_path} exists; choose a new folder")
            count = export(iteration_dir(args.megatron_path, args.iteration), args.hf_model, args.hf_path)
            print(f"{count} tensors -> {args.hf_path}")
    except ValueError as error:
        sys.exit(f"wan_core.convert: {error}")


if __name__ == "__main__":
    main()

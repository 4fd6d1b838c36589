"""The command as a user runs it; each case is a process of its own that must end before any work starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows.inputs import MODEL_PARTS
from tests.processes import living, wait_until
from wan_core.architecture import I2V_14B, T2V_1_3B
from wan_core.digests import IMAGE_PARTS

WAN = [sys.executable, "-c", "from flows.cli import main; main()"]


def outside() -> dict[str, str]:
    """The environment without the server that other tests of this process have."""
    return {name: value for name, value in os.environ.items() if name not in ("PREFECT_API_URL", "PREFECT_HOME")}


def wan(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*WAN, *arguments], capture_output=True, text=True, timeout=400, env=outside())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("cli")
    for name in ("videos", "model/vae", "model/tokenizer", "whole/vae", "whole/text_encoder", "whole/tokenizer"):
        (root / name).mkdir(parents=True)
    (root / "whole/transformer").mkdir()
    config = {"_class_name": "WanTransformer3DModel", **T2V_1_3B.to_diffusers()}
    (root / "whole/transformer/config.json").write_text(json.dumps(config))
    for part in (*MODEL_PARTS, *IMAGE_PARTS):
        (root / "i2v" / part).mkdir(parents=True)
    config = {"_class_name": "WanTransformer3DModel", **I2V_14B.to_diffusers()}
    (root / "i2v/transformer/config.json").write_text(json.dumps(config))
    return {name: str(root / name) for name in ("videos", "model", "whole", "i2v", "workspace", "nowhere")}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("run --videos {nowhere} --model {whole} --recipe wan_demo -w {workspace}", "is not a folder"),
        ("run --videos {videos} --model {model} --recipe wan_demo -w {workspace}", "lacks text_encoder/, transformer/"),
        (
            "run --videos {videos} --model {i2v} --recipe wan_i2v_14b -w {workspace}",
            "0 images are given for 2 videos of an image-to-video model, which needs the first frame of each",
        ),
        ("run --videos {videos} --model {whole} --recipe wan_9b -w {workspace}", "'wan_9b' does not exist; choose one"),
        ("run --videos {videos} --model {whole} --recipe wan_demo -w {workspace} encode.fsp=8", "mean encode.fps?"),
        (
            "run --videos {videos} --model {whole} --recipe wan_demo -w {workspace} model.tensor_model_parallel_size=5",
            "num_attention_heads=12 is not divisible by tensor_model_parallel_size=5; choose one of 1, 2, 3, 4, 6, 12",
        ),
        (
            "run --videos {videos} --model {whole} --recipe wan_demo -w {workspace} launch.processes_per_node=9 "
            "model.tensor_model_parallel_size=2 model.context_parallel_size=2",
            "9 ranks (nodes x processes_per_node) are no multiple of tensor_model_parallel_size=2 x "
            "context_parallel_size=2; start 8 or 12, or choose other sizes",
        ),
        (
            "run --videos {videos} --model {whole} --recipe wan_demo -w {workspace} model.context_parallel_size=x",
            "model.context_parallel_size='x' is not a number from 1 on",
        ),
        (
            "run --videos {videos} --model {whole} --recipe wan_demo -w {workspace} train.micro_batch_size=2",
            "train.micro_batch_size=2, but a micro-batch is one pack; set it to 1",
        ),
        (
            "run --videos {videos} --model {whole} --recipe wan_1_3b -w {workspace} launch.processes_per_node=3",
            "train.global_batch_size=8 packs do not divide over 3 data-parallel ranks; choose 6 or 9",
        ),
        (
            "run --videos {videos} --model {whole} --recipe wan_demo -w {workspace} launch.processes_per_node=2 "
            "model.pipeline_model_parallel_size=2 dist.use_megatron_fsdp=true",
            "pipeline_model_parallel_size=2 with Megatron-FSDP would leave the embedders' gradients unsummed",
        ),
        ("demo -w {workspace} --refresh shards", "names no stage; choose one of encode, shard"),
        ("shard --recipe wan_demo -w {workspace}", "has no finished output named demo; run `wan encode` first"),
        ("blend images -w {workspace} --name mix", "'images' is not DATASET=SHARE; write for example images=0.3"),
        ("blend images=0.3 -w {workspace} --name mix", "has no finished output named images; run `wan index` first"),
        ("ui -w {workspace}", "does not exist; run something in"),
    ],
)
def test_a_wrong_command_is_one_sentence_and_starts_nothing(
    folders: dict[str, str], arguments: str, words: str
) -> None:
    done = wan(*arguments.format(**folders).split())
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not Path(folders["workspace"]).exists()


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_interrupt_stops_all_that_was_started(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C reaches the foreground process group; what the command started must end with it."""
    code = """
import sys, time
from pathlib import Path
from flows import cli
import types
module = types.ModuleType("waiting")
rank = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(300)"

def waiting(workspace):
    from prefect import flow
    from tasks.launch import launch
    from tasks.workers import ray_session
    from wan_core.config import LaunchConfig, RayConfig
    (workspace / "rank.py").write_text(rank)

    @flow
    def body():
        with ray_session(RayConfig()):
            launch(LaunchConfig(), ["rank", str(workspace / "ready")], workspace / "logs")
    body()
module.waiting = waiting
sys.modules["waiting"] = module
@cli.app.command()
def wait(workspace: Path) -> None:
    cli.execute(workspace, "waiting", "waiting")

sys.argv[1:] = ["wait", sys.argv[1]]
cli.main()
"""
    mark = tmp_path.name
    command = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**outside(), "PYTHONPATH": f"{os.getcwd()}:{tmp_path}", "OUTER_MARK": mark},
        start_new_session=True, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert wait_until(lambda: (tmp_path / "ready").exists() or command.poll() is not None, 400)
    assert command.poll() is None
    assert len(living(f"OUTER_MARK={mark}")) >= 6  # the command, the server, torchrun, its rank, Ray
    for _ in range(2):  # the second finds it stopping
        os.killpg(command.pid, number)
        time.sleep(0.5)
    said = command.communicate(timeout=90)[1]
    assert command.returncode == 130, said
    assert "error: interrupted" in said and "Traceback" not in said
    assert living(f"OUTER_MARK={mark}") == []

"""What a team does: deploy everything to a server, start a worker, run flows by name. Real processes, tiny models."""

from __future__ import annotations

import itertools
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId, LogFilterLevel
from prefect.exceptions import ParameterTypeError, PrefectHTTPStatusError

from flows.end_to_end import end_to_end
from flows.secret_blocks import load_secrets
from tasks.layout import newest
from tasks.process import Process
from tests.processes import living, wait_until
from wan_core.checkpoints import latest
from wan_core.encode.video import write_video
from wan_core.records import EvaluateRecord, ShardRecord, TrainRecord, load_record
from wan_core.training_run import read_lines

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
FILE = ROOT / "deployments" / "prefect.yaml"
FRAMES, SIDE = 5, 32
SECRETS = {name: f"secret-of-the-test-{name}" for name in ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")}
BLOCK = "secret-of-the-test-in-a-block"
CONFIG: dict[str, Any] = {
    "name": "t",
    "encode": {
        "sizes": [{"height": SIDE, "width": SIDE}], "max_frames": FRAMES, "vae_dtype": "float32",
        "text_dtype": "float32", "clips_per_part": 4,
    },
    "shard": {"val_share": 0.2},
    "train": {
        "recipe": "wan_demo",
        "overrides": [
            "train.train_iters=2", "dataset.tokens_per_pack=64", "dataset.num_workers=0", "logger.log_interval=1",
            "scheduler.lr_warmup_iters=0", "validation.eval_interval=0",
        ],
    },
    "sample": {
        "prompts": ["a red circle moving left"], "size": {"height": SIDE, "width": SIDE}, "num_frames": FRAMES,
        "num_steps": 1, "dtype": "float32", "negative_prompt": "",
    },
}  # fmt: skip


def prefect(*arguments: str) -> str:
    """The command as in docs/operations.md; returns what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "prefect", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600,
        env={**os.environ, "PWD": str(ROOT), "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, f"{arguments} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def deployed(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Every deployment on the test's server, and a worker of the pool, whose folder this is. Two secrets are in the
    worker's environment, and HF_TOKEN in a block that prefect.yaml names as docs/operations.md says.
    """
    folder = tmp_path_factory.mktemp("worker")
    Secret(value=BLOCK).save("hf-token")
    before, env, after = FILE.read_text(encoding="utf-8").partition("      env:\n")
    file = tmp_path_factory.mktemp("file") / "prefect.yaml"
    file.write_text(f"{before}{env}        WAN_SECRET_BLOCKS: HF_TOKEN=hf-token\n{after}", encoding="utf-8")
    prefect("work-pool", "create", "wan", "--type", "process")
    prefect("--no-prompt", "deploy", "--all", "--prefect-file", str(file))
    paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    worker = Process(
        [sys.executable, "-m", "prefect", "worker", "start", "--pool", "wan"], paths | SECRETS, folder / "worker.log"
    )
    yield folder
    worker.stop()


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for i in range(6):
        frames = np.random.default_rng(i).integers(0, 255, (FRAMES, SIDE, SIDE, 3), dtype=np.uint8)
        write_video(folder / f"{i}.mp4", frames, 16)
        (folder / f"{i}.txt").write_text("a red circle moving left")
    return folder


def parameters(**values: Any) -> list[str]:
    return [text for name, value in values.items() for text in ("--param", f"{name}={json.dumps(value)}")]


@pytest.fixture(scope="module")
def workspace(deployed: Path, videos: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `end-to-end` made."""
    folder = tmp_path_factory.mktemp("workspace")
    given = parameters(config=CONFIG, videos=str(videos), model=str(tiny_model), workspace=str(folder))
    prefect("deployment", "run", "end-to-end/default", *given, "--watch")
    return folder


def test_end_to_end_then_only_the_shards_again(workspace: Path) -> None:
    (report,) = workspace.glob("evaluate/t-*")
    assert load_record(EvaluateRecord, report).report.is_file()
    (before,) = workspace.glob("shard/t-*")

    again = parameters(config={"seed": 7, "val_share": 0.2}, name="t", workspace=str(workspace))
    prefect("deployment", "run", "shard/demo", *again, "--watch")
    (after,) = set(workspace.glob("shard/t-*")) - {before}
    assert load_record(ShardRecord, after).num_samples == load_record(ShardRecord, before).num_samples


def test_a_parameter_makes_one_stage_and_what_depends_on_it_again(
    workspace: Path, videos: Path, tiny_model: Path
) -> None:
    made = {path: path.stat().st_mtime_ns for path in workspace.glob("*/t-*/record.json")}
    given = parameters(config=CONFIG, videos=str(videos), model=str(tiny_model), workspace=str(workspace))
    prefect("deployment", "run", "end-to-end/default", *given, *parameters(refresh="sample"), "--watch")
    changed = {path.parts[-3] for path, when in made.items() if path.stat().st_mtime_ns != when}
    assert changed == {"sample", "evaluate"}


def test_a_killed_rank_costs_no_retry_and_the_training_goes_on_from_its_last_checkpoint(
    workspace: Path, tiny_model: Path
) -> None:
    overrides = [*CONFIG["train"]["overrides"], "train.train_iters=90", "checkpoint.save_interval=30"]
    given = {
        "config": {**CONFIG["train"], "overrides": overrides}, "launch": {}, "ray": {}, "name": "retried",
        "model": str(tiny_model), "workspace": str(workspace), "dataset": str(newest(workspace, "index", "t")),
    }  # fmt: skip
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("train/demo")
        run = client.create_flow_run_from_deployment(deployment.id, parameters=given).id
        assert wait_until(lambda: any(map(latest, workspace.glob("runs/retried-*/checkpoints"))))
        token = f"HF_TOKEN={BLOCK}"  # in a block: the flow hands it on to what it starts
        (rank,) = set(living(token, b"-u\0-m\0wan_core.train")) - set(living(token, b"torch.distributed.run"))
        # In the middle between two checkpoints, so that steps are taken again.
        (metrics,) = workspace.glob("runs/retried-*/metrics.jsonl")
        assert wait_until(lambda: 4 <= list(read_lines(metrics))[-1]["iteration"] % 30 <= 18)
        os.kill(rank, signal.SIGKILL)
        assert wait_until(lambda: client.read_flow_run(run).state.is_final())
        assert client.read_flow_run(run).state.is_completed(), client.read_flow_run(run).state
        warnings = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run]), level=LogFilterLevel(ge_=logging.WARNING))
        assert wait_until(lambda: client.read_logs(warnings))
        (said,) = (log.message for log in client.read_logs(warnings))
        assert said.startswith("The training goes on from its last checkpoint")
    (folder,) = workspace.glob("runs/retried-*")
    steps = [line["iteration"] for line in read_lines(folder / "metrics.jsonl")]
    assert load_record(TrainRecord, folder).iteration == steps[-1] == 90
    (again,) = [later for earlier, later in itertools.pairwise(steps) if later <= earlier]
    assert again in (31, 61)


def test_secrets_are_written_nowhere(deployed: Path, workspace: Path) -> None:
    """Worker's and runs' logs, records, artifacts, and the server's database with the deployments in it."""
    written = [*deployed.rglob("*"), *workspace.rglob("*"), *Path(os.environ["PREFECT_HOME"]).rglob("*")]
    texts = {path: path.read_bytes() for path in written if path.is_file()}
    assert any(path.name.startswith("prefect.db") for path in texts) and any(
        b"evaluate/t-" in t for t in texts.values()
    )
    assert not [path for path, text in texts.items() if b"secret-of-the-test" in text]


@pytest.mark.usefixtures("prefect_api")
@pytest.mark.parametrize(
    ("names", "words"), [("HF_TOKEN", "not VARIABLE=block"), ("A=nowhere", "no secret block 'nowhere'")]
)
def test_a_secret_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, names: str, words: str) -> None:
    monkeypatch.setenv("WAN_SECRET_BLOCKS", names)
    with pytest.raises(ValueError, match=words):
        load_secrets()


@pytest.mark.usefixtures("deployed")
def test_a_wrong_parameter_is_refused_before_a_run_exists(videos: Path, tiny_model: Path, tmp_path: Path) -> None:
    """By the server, what the form's schema can say; by the flow, before its first line, what only our configs know."""
    sections: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("encode", {"mode": "audio"}, "audio"), ("shrad", {}, "shrad"), ("shard", {"val_share": 5}, "maximum of 1"),
        ("encode", {"clips_per_part": 0}, "minimum of 1"), ("launch", {"min_nodes": 0}, "min_nodes"),
        ("sample", {"size": {"height": 481, "width": 832}}, "multiple of 16"),
    )  # fmt: skip
    for section, values, words in sections:
        wrong = {**CONFIG, section: values}
        given = {"config": wrong, "videos": str(videos), "model": str(tiny_model), "workspace": str(tmp_path)}
        with get_client(sync_client=True) as client:
            deployment = client.read_deployment_by_name("end-to-end/default")
            with pytest.raises(PrefectHTTPStatusError, match=words):
                client.create_flow_run_from_deployment(deployment.id, parameters=given)
    for overrides, words in (("optimizer.lrr=1", "did you mean optimizer.lr"), ("model.x", "is not key=value")):
        wrong = {**CONFIG, "train": {"overrides": [overrides]}}
        given = {"config": wrong, "videos": str(videos), "model": str(tiny_model), "workspace": str(tmp_path)}
        with pytest.raises(ParameterTypeError, match=words):
            end_to_end.validate_parameters(given)


@pytest.mark.usefixtures("deployed")
def test_the_form_of_every_deployment_describes_every_field() -> None:
    wanted = {
        (item["entrypoint"].partition(":")[2].replace("_", "-"), item["name"])
        for item in yaml.safe_load(FILE.read_text(encoding="utf-8"))["deployments"]
    }
    with get_client(sync_client=True) as client:
        found = client.read_deployments(limit=200)
        flows = {deployment.id: client.read_flow(deployment.flow_id).name for deployment in found}
    assert {(flows[deployment.id], deployment.name) for deployment in found} == wanted
    for deployment in found:
        schema = deployment.parameter_openapi_schema
        assert schema is not None
        for name, field in schema["properties"].items():
            assert field.get("description"), (deployment.name, name)
        for kind in schema["definitions"].values():
            assert kind["description"]
            for name, field in kind.get("properties", {}).items():
                assert field.get("description") or "$ref" in field, (kind["title"], name)


@pytest.mark.usefixtures("deployed")
def test_nightly_runs_never_overlap() -> None:
    with get_client(sync_client=True) as client:
        nightly = client.read_deployment_by_name("nightly-finetune/default")
    assert nightly.schedules[0].schedule.cron == "0 2 * * *"  # type: ignore[union-attr]
    assert nightly.concurrency_options is not None
    assert nightly.concurrency_options.collision_strategy == "CANCEL_NEW"
    assert nightly.global_concurrency_limit is not None and nightly.global_concurrency_limit.limit == 1

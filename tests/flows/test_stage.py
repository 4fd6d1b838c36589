"""The machinery that every stage's task shares, on three small real stages and a real Prefect server."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from pathlib import Path

import pytest
from prefect import flow

import tasks.train
from tasks.encode import encode
from tasks.errors import LaunchError
from tasks.stage import Target, Workspace, begin_anew, made_again, stage_task
from tests.flows.test_encode import CONFIG, make_clips
from wan_core.config import ConvertConfig, IndexConfig, LaunchConfig, RayConfig, ShardConfig, Stage, TrainConfig
from wan_core.output import writing
from wan_core.records import ConvertRecord, IndexRecord, ShardRecord, fingerprint, load_record

pytestmark = pytest.mark.usefixtures("prefect_api")
ran: list[str] = []  # what worked, in order


@stage_task("shard")
def shard_task(target: Target, config: ShardConfig, pause: float, failures: list[Exception]) -> ShardRecord:
    ran.append("shard")
    time.sleep(pause)
    if failures:
        raise failures.pop(0)
    with writing("shard", target.folder, config, target.fingerprint) as output:
        (output.path / "train-000.tar").write_text("bytes")
        return output.finish(ShardRecord, num_samples={"train": 1}, shards={"train-000.tar": 1}, encoder={})


@stage_task("index")
def index_task(target: Target, config: IndexConfig, sharded: ShardRecord) -> IndexRecord:
    ran.append("index")
    with writing("index", target.folder, config, target.fingerprint) as output:
        shutil.copy(sharded.path / "train-000.tar", output.path)
        (output.path / "card.md").write_text("# t\n")  # what becomes an artifact
        return output.finish(IndexRecord, num_samples=sharded.num_samples, encoder={})


@stage_task("convert")
def convert_task(target: Target, config: ConvertConfig, indexed: IndexRecord) -> ConvertRecord:
    ran.append("convert")
    with writing("convert", target.folder, config, target.fingerprint) as output:
        shutil.copy(indexed.path / "train-000.tar", output.path / "model")
        return output.finish(ConvertRecord, iteration=1, num_tensors=1)


@flow
def three(
    root: Path, refresh: Stage | None = None, seed: int = 0, pause: float = 0.0, failures: tuple[Exception, ...] = ()
) -> Workspace:
    run, config = Workspace(root, "t", refresh), ShardConfig(seed=seed)
    target = run.target("shard", ShardRecord, fingerprint("shard", config))
    sharded = run.make(shard_task, target, config=config, pause=pause, failures=list(failures))
    target = run.target("index", IndexRecord, fingerprint("index", IndexConfig(), shard=sharded.fingerprint))
    indexed = run.make(index_task, target, config=IndexConfig(), sharded=sharded)
    target = run.target("convert", ConvertRecord, fingerprint("convert", ConvertConfig(), index=indexed.fingerprint))
    run.make(convert_task, target, config=ConvertConfig(), indexed=indexed)
    return run


def work(root: Path, **parameters: object) -> tuple[list[str], Workspace]:
    """What this run worked on, and its outcomes."""
    ran.clear()
    return_value = three.with_options(validate_parameters=False)(root, **parameters)
    return list(ran), return_value


def test_a_second_run_works_on_nothing(tmp_path: Path) -> None:
    assert work(tmp_path)[0] == ["shard", "index", "convert"]
    again, run = work(tmp_path)
    assert again == [] and [outcome.reused for outcome in run.outcomes] == [True] * 3
    assert work(tmp_path, seed=1)[0] == ["shard", "index", "convert"]
    assert work(tmp_path)[0] == []


def test_refresh_runs_a_stage_and_what_depends_on_it(tmp_path: Path) -> None:
    work(tmp_path)
    shard_folder = next((tmp_path / "shard").glob("t-*"))
    written = (shard_folder / "record.json").stat().st_mtime_ns
    again, run = work(tmp_path, refresh="index")
    assert again == ["index", "convert"] and [outcome.reused for outcome in run.outcomes] == [True, False, False]
    assert (shard_folder / "record.json").stat().st_mtime_ns == written


def test_a_refresh_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    _, run = work(tmp_path)
    with pytest.raises(ValueError, match="no such thing"):
        work(tmp_path, refresh="shard", failures=(ValueError("no such thing"),))
    assert ran == ["shard"]
    again, after = work(tmp_path)
    assert again == [] and after.outcomes[0].record == run.outcomes[0].record


def test_a_refresh_moves_a_training_aside_once(tmp_path: Path) -> None:
    """A later attempt of the flow's run, as after Slurm's time limit, goes on with what the first one did."""
    folder = tmp_path / "runs" / "t-1"
    folder.mkdir(parents=True)
    (folder / "old").touch()
    found: list[list[str]] = []

    @flow(retries=1)
    def train() -> None:
        with made_again(folder):
            found.append([path.name for path in folder.glob("[!.]*")])
            folder.mkdir(exist_ok=True)
            (folder / "new").touch()
            if len(found) == 1:
                raise LaunchError("the time limit", retry=True)

    train()
    assert found == [[], ["new"]]
    (aside,) = (path for path in folder.parent.iterdir() if path != folder)
    assert [path.name for path in aside.iterdir()] == ["old"]


def test_a_refresh_that_never_reached_a_folder_reaches_it_when_the_run_is_started_again(tmp_path: Path) -> None:
    """What the first attempt made is not made once more; what it did not come to is put aside now."""
    work(tmp_path)
    folder, attempts = tmp_path / "runs" / "t-1", []
    folder.mkdir(parents=True)
    (folder / "old").touch()

    @flow(retries=1)
    def refreshing() -> None:
        attempts.append(len(attempts))
        three.fn(tmp_path, refresh="shard")
        if len(attempts) == 1:
            raise LaunchError("before training began", retry=True)
        begin_anew(folder)

    ran.clear()
    refreshing()
    assert ran == ["shard", "index", "convert"] and len(attempts) == 2
    assert not (folder / "old").exists() and len(list(folder.parent.glob("*/old"))) == 1


def test_a_refresh_whose_stage_failed_is_still_one_when_the_run_is_started_again(tmp_path: Path) -> None:
    work(tmp_path)
    failures = [(ValueError("once"),), ()]

    @flow(retries=1)
    def refreshing() -> None:
        three.fn(tmp_path, refresh="shard", failures=failures.pop(0))

    ran.clear()
    refreshing()
    assert ran == ["shard", "shard", "index", "convert"]


@pytest.mark.slow
def test_a_refresh_of_encode_begins_anew_once_per_run(tmp_path: Path, tiny_model: Path) -> None:
    """The first attempt does not come to it, the second does it, the third finds it."""
    videos, attempts = make_clips(tmp_path / "videos", ["0", "1"]), []

    @flow(retries=2)
    def encoding(refresh: Stage | None) -> Workspace:
        run = Workspace(tmp_path / "work", "t", refresh)
        attempts.append(run)
        if refresh and len(attempts) == 2:
            raise LaunchError("before it began", retry=True)
        encode(run, CONFIG, RayConfig(), videos, tiny_model)
        if refresh and len(attempts) == 3:
            raise LaunchError("after it", retry=True)
        return run

    encoding(None)
    encoding("encode")
    assert [[outcome.reused for outcome in run.outcomes] for run in attempts] == [[False], [], [False], [True]]
    assert len(list((tmp_path / "work" / "encode").glob("t-*.replaced-*/record.json"))) == 1


def test_outputs_that_are_gone_or_altered_are_made_again(tmp_path: Path) -> None:
    _, run = work(tmp_path)
    sharded, indexed, converted = (outcome.record.path for outcome in run.outcomes)
    (converted / "model").write_text("altered")
    assert work(tmp_path)[0] == ["convert"]
    (indexed / "train-000.tar").unlink()
    assert work(tmp_path)[0] == ["index"]
    shutil.rmtree(sharded)
    assert work(tmp_path)[0] == ["shard"]
    assert (converted / "model").read_text() == "bytes"


def test_the_record_on_disk_is_enough(tmp_path: Path) -> None:
    """Prefect's results lost, the outputs moved to another folder: the stages find what is there."""
    _, run = work(tmp_path / "old")
    for path in (tmp_path / "old").rglob(".prefect-*"):
        path.unlink()
    moved = tmp_path / "new"
    (tmp_path / "old").rename(moved)
    again, run = work(moved)
    assert [outcome.reused for outcome in run.outcomes] == [True] * 3
    assert again == []
    assert all(outcome.record.path.is_relative_to(moved) for outcome in run.outcomes)
    assert work(moved)[0] == []


def test_two_runs_at_once_work_once(tmp_path: Path) -> None:
    ran.clear()
    runs = [threading.Thread(target=three, args=(tmp_path,), kwargs={"pause": 3.0}) for _ in range(2)]
    for thread in runs:
        thread.start()
    for thread in runs:
        thread.join()
    assert ran == ["shard", "index", "convert"]


def test_trainings_of_one_folder_take_turns(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They differ only in train_iters, so the second would go on from checkpoints that the first is writing."""
    with writing("index", tmp_path / "dataset", IndexConfig(), "0" * 64) as output:
        dataset = output.finish(IndexRecord, num_samples={"train": 1}, encoder={})
    at_work: list[str] = []

    def launch(config: LaunchConfig, arguments: list[str], *rest: object) -> None:
        at_work.append(f"begins in {arguments[arguments.index('--run-dir') + 1]}")
        time.sleep(3)
        at_work.append("ends")
        raise ValueError("enough")

    @flow
    def training(train_iters: int) -> None:
        config = TrainConfig(overrides=(f"train.train_iters={train_iters}",))
        tasks.train.train(Workspace(tmp_path, "t"), config, dataset, tiny_model, LaunchConfig(), RayConfig())

    monkeypatch.setattr("tasks.train.launch", launch)
    monkeypatch.setattr("tasks.locks.SAY_SECONDS", 0.5)
    runs = [threading.Thread(target=training, args=(n,), kwargs={"return_state": True}) for n in (100, 200)]
    with caplog.at_level(logging.INFO, "prefect"):
        for thread in runs:
            thread.start()
        for thread in runs:
            thread.join()
    begun, *rest = at_work
    assert rest == ["ends", begun, "ends"]
    (waits,) = (line for line in caplog.messages if line.startswith("Waits"))
    folder, _, holder = waits.removeprefix("Waits for another run that works on ").partition(": flow run ")
    assert begun == f"begins in {folder}" and len(holder) == 36


def test_what_may_pass_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_task, "retry_delay_seconds", [0.1, 0.1])
    again, run = work(tmp_path, failures=(LaunchError("a rank was killed", retry=True),))
    assert again == ["shard", "shard", "index", "convert"] and not any(outcome.reused for outcome in run.outcomes)


def test_only_what_may_pass_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_task, "retry_delay_seconds", [0.1, 0.1])
    lost = LaunchError("a rank was killed", retry=True)
    with pytest.raises(ValueError, match="is below 1"):
        work(tmp_path, failures=(ValueError("steps=0 is below 1; choose 1"), lost))
    assert ran == ["shard"]
    assert load_record(ShardRecord, work(tmp_path, seed=2)[1].outcomes[0].record.path).num_samples == {"train": 1}

from pathlib import Path

import pytest

from wan_core import checkpoints


def write(folder: Path, iteration: int, sealed: bool = True) -> Path:
    path = checkpoints.folder_of(folder, iteration)
    checkpoints.begin(path)
    for name in ("train_state.pt", "run_config.yaml", "__0_0.distcp"):
        (path / name).write_text(f"{name} of {iteration}")
    if sealed:
        checkpoints.seal(path, {"iteration": iteration})
    return path


def trackers(folder: Path, iteration: int) -> None:
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    (folder / "latest_train_state.pt").write_text(f"train_state.pt of {iteration}")


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    for iteration in (1, 2, 10):
        write(tmp_path, iteration)
    (checkpoints.folder_of(tmp_path, 10) / "__0_0.distcp").write_text("cut")
    write(tmp_path, 11, sealed=False)
    assert checkpoints.whole_iterations(tmp_path) == [1, 2] and checkpoints.latest(tmp_path) == 2
    assert checkpoints.read_state(checkpoints.folder_of(tmp_path, 2)) == {"iteration": 2}


def test_repair_removes_what_a_killed_run_left(tmp_path: Path) -> None:
    write(tmp_path, 4)
    write(tmp_path, 8, sealed=False)
    trackers(tmp_path, 8)
    assert checkpoints.repair(tmp_path) == 4
    assert [path.name for path in tmp_path.glob("iter_*")] == ["iter_0000004"]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "4"
    assert (tmp_path / "latest_train_state.pt").read_text() == "train_state.pt of 4"


def test_a_checkpoint_of_others_is_whole_and_stays(tmp_path: Path) -> None:
    path = write(tmp_path, 3)
    (path / "complete.json").unlink()
    trackers(tmp_path, 3)
    assert checkpoints.repair(tmp_path) == 3 and checkpoints.latest(tmp_path) == 3
    assert not checkpoints.is_sealed(tmp_path, 3)


def test_repair_of_a_run_that_saved_nothing_whole_starts_anew(tmp_path: Path) -> None:
    write(tmp_path, 8, sealed=False)
    trackers(tmp_path, 8)
    assert checkpoints.repair(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "gone"),
    [(0, 0, []), (2, 0, [1, 2, 3, 4]), (1, 2, [1, 3, 5]), (9, 0, []), (2, 10, [1, 2, 3, 4])],
)
def test_retention(keep_last: int, keep_every: int, gone: list[int]) -> None:
    assert checkpoints.expired([1, 2, 3, 4, 5, 6], keep_last, keep_every) == gone

"""torchrun really starts here, with ranks of a few lines that need no torch."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tasks.errors import LaunchError
from tasks.launch import environment, launch, rendezvous, torchrun
from tasks.process import MARK, Process, marked
from wan_core.config import LaunchConfig


def program(folder: Path, body: str) -> str:
    """A module that torchrun's ranks run; its folder is on their path."""
    head = "import os, sys, time\nrank = int(os.environ['RANK'])\n"
    (folder / "rank_program.py").write_text(head + textwrap.dedent(body))
    return "rank_program"


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(holds, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.1)
    return bool(holds())


def test_rank_0_is_streamed_and_every_rank_logs(on_path: Path) -> None:
    lines: list[str] = []
    name = program(on_path, "print('hello from', rank, sys.argv[1:], os.environ['OMP_NUM_THREADS'])")
    launch(LaunchConfig(processes_per_node=2), [name, "--steps", "3"], on_path / "logs", on_line=lines.append)
    threads = environment(LaunchConfig(processes_per_node=2))["OMP_NUM_THREADS"]
    assert [line for line in lines if "hello" in line] == [f"hello from 0 ['--steps', '3'] {threads}"]
    written = sorted(path.read_text() for path in (on_path / "logs").rglob("stdout.log"))
    assert [text.split()[2] for text in written] == ["0", "1"]


@pytest.mark.parametrize(("cores", "threads"), [(2, "1"), (3, "1"), (8, "3")])
def test_ranks_share_cores_with_their_data_workers(monkeypatch: pytest.MonkeyPatch, cores: int, threads: str) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert environment(LaunchConfig(processes_per_node=2))["OMP_NUM_THREADS"] == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert environment(LaunchConfig(processes_per_node=2))["OMP_NUM_THREADS"] == "5"


def test_error_carries_the_failing_ranks_last_lines(on_path: Path) -> None:
    name = program(
        on_path,
        """
        if rank == 1:
            print("rank one speaks")
            print("[rank1]: OSError: the disk of rank one is full", file=sys.stderr)  # as torch.distributed writes it
            sys.exit(1)
        time.sleep(60)
    """,
    )
    with pytest.raises(LaunchError, match="rank 1 on node 0 ended with exit code 1") as caught:
        launch(LaunchConfig(processes_per_node=2), [name], on_path / "logs")
    assert "rank one speaks" in str(caught.value) and "OSError: the disk of rank one is full" in str(caught.value)
    assert caught.value.retry


def test_value_error_of_a_rank_stays_a_sentence(on_path: Path) -> None:
    name = program(on_path, "raise ValueError('model.layers=0 is below 1; choose 2')")
    with pytest.raises(ValueError, match=r"^model\.layers=0 is below 1; choose 2 \(rank 0 of the training, logs in "):
        launch(LaunchConfig(), [name], on_path / "logs")


def test_an_error_that_would_come_again_is_not_retried(on_path: Path) -> None:
    name = program(
        on_path,
        """
        print("[rank0]: AssertionError", file=sys.stderr)
        sys.exit(1)
    """,
    )
    with pytest.raises(LaunchError, match="AssertionError") as caught:
        launch(LaunchConfig(), [name], on_path / "logs")
    assert not caught.value.retry


def test_an_interrupted_run_says_where_it_goes_on_and_is_retried(on_path: Path) -> None:
    name = program(
        on_path,
        """
        print("interrupted, saved at iteration 12; the same command goes on from there", file=sys.stderr)
        sys.exit(75)
    """,
    )
    with pytest.raises(LaunchError, match="training was interrupted, saved at iteration 12; logs in ") as caught:
        launch(LaunchConfig(), [name], on_path / "logs")
    assert caught.value.retry


def test_what_the_trainer_refuses_is_not_retried(on_path: Path) -> None:
    name = program(on_path, "sys.exit('wan_core.train: dataset.path=x does not exist')")
    with pytest.raises(ValueError, match=r"^dataset\.path=x does not exist \(logs in "):
        launch(LaunchConfig(), [name], on_path / "logs")


def test_a_port_that_was_taken_meanwhile_is_retried(on_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        meeting = rendezvous("attempt", "127.0.0.1", taken.getsockname()[1], 1, "127.0.0.1")
        monkeypatch.setattr("tasks.launch.rendezvous", lambda *_: meeting)
        with pytest.raises(LaunchError, match="Rendezvous") as caught:
            launch(LaunchConfig(), [program(on_path, "pass")], on_path / "logs")
    assert caught.value.retry


def test_a_command_that_torchrun_refuses_is_not_retried(on_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.launch.rendezvous", lambda *_: ["--no-such-option"])
    with pytest.raises(LaunchError, match="torchrun on node 0 ended with 2") as caught:
        launch(LaunchConfig(), ["never"], on_path / "logs")
    assert not caught.value.retry


def test_interrupt_leaves_no_process(on_path: Path) -> None:
    pids = on_path / "pids"
    pids.mkdir()
    name = program(
        on_path,
        f"""
        import signal, subprocess
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a rank that does not listen
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
        open({str(pids)!r} + f"/{{rank}}", "w").write(f"{{os.getpid()}} {{child.pid}}")
        time.sleep(300)
    """,
    )

    def interrupt() -> None:
        if len(list(pids.iterdir())) == 2 and all(path.stat().st_size for path in pids.iterdir()):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch(LaunchConfig(processes_per_node=2, stop_seconds=5), [name], on_path / "logs", on_tick=interrupt)
    started = [int(pid) for path in pids.iterdir() for pid in path.read_text().split()]
    assert len(started) == 4
    assert wait_until(lambda: not any(map(alive, started)), 2)


def test_torchrun_dies_with_a_killed_parent(on_path: Path) -> None:
    name = program(on_path, f"open({str(on_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(300)")
    code = f"""
from pathlib import Path
from tasks.launch import launch
from wan_core.config import LaunchConfig
launch(LaunchConfig(), [{name!r}], Path({str(on_path / "logs")!r}))
"""
    path = {"PYTHONPATH": f"{on_path}:{os.getcwd()}"}
    parent = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **path})
    try:
        assert wait_until(lambda: (on_path / "pid").exists() and (on_path / "pid").read_text(), 40)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    pid = int((on_path / "pid").read_text())
    assert wait_until(lambda: not alive(pid), 40)


def test_process_reports_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Process(["no-such-program"], {}, tmp_path / "log")


def test_process_mark_reaches_grandchildren(tmp_path: Path) -> None:
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', 'import os; print(os.environ[\"{MARK}\"])'])"
    process = Process([sys.executable, "-c", code], {}, tmp_path / "log")
    assert process.wait(20) == 0
    assert list(process.tail) == [process.mark] and process.lines() == [process.mark]


def test_ranks_die_with_their_torchrun(on_path: Path) -> None:
    """Also when it cannot tell them so: nothing sends them a signal here but the kernel."""
    name = program(on_path, "open(f'up{rank}', 'w').close(); time.sleep(600)")
    meeting = rendezvous("attempt", "127.0.0.1", 0, 1, "127.0.0.1")
    command = torchrun(LaunchConfig(processes_per_node=2), [name], on_path / "logs", meeting)
    agent = subprocess.Popen(command, cwd=on_path, env={**os.environ, MARK: on_path.name}, start_new_session=True)
    assert wait_until(lambda: all((on_path / f"up{rank}").exists() for rank in range(2)), 60)
    assert len(marked(on_path.name)) == 3
    agent.kill()
    agent.wait()
    assert wait_until(lambda: not marked(on_path.name), 5)


def test_what_a_killed_rank_had_logged_is_not_why_it_died(on_path: Path) -> None:
    """A handled error in its log, of a kind that would come again, must not keep the next attempt from starting."""
    body = """
        import signal
        print("AttributeError: module 'engine' has no attribute 'manager'", file=sys.stderr, flush=True)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    with pytest.raises(LaunchError, match="rank 0 on node 0 was killed by signal 9") as caught:
        launch(LaunchConfig(), [program(on_path, body)], on_path / "logs")
    assert caught.value.retry

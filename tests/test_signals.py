"""A process that a rank starts, and SIGTERM from others while it starts and while it works."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

RANK = """
import subprocess
from multiprocessing import get_context
from wan_core.signals import outlive_sigterm, sigterm_blocked

def work(pipe):
    outlive_sigterm()
    while True:
        pipe.send(pipe.recv() + 1)

if __name__ == "__main__":
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs,))
    with sigterm_blocked():
        process.start()
    for number in range(3):
        subprocess.run(["kill", "-TERM", str(process.pid)], check=True)
        ours.send(number)
        assert ours.recv() == number + 1
    process.terminate()
    process.join(30)
    assert process.exitcode == -9, process.exitcode
    print("right")
"""


def test_a_process_of_a_rank_ends_by_its_sigterm_alone(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    environment = {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, tmp_path / "rank.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "right\n", done.stderr

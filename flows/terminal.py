"""What a person sees in a terminal: one line per finished stage, a bar for the one that works, a summary at the end."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from tasks.stage import Outcome

console = Console(file=sys.stderr, highlight=False)  # this stream, also while `log_to_file` redirects the name
MILESTONES = 10  # lines per stage where no terminal can draw a bar


class Display:
    """A `tasks.progress.Watcher` that draws. Use it as a context manager around the flow."""

    def __init__(self) -> None:
        self.bars = Progress(
            SpinnerColumn(), TextColumn("[bold]{task.fields[stage]:9}"), BarColumn(30),
            TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"), console=console, transient=True, disable=not console.is_terminal,
            redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip
        self.tasks: dict[str, TaskID] = {}
        self.milestone: dict[str, int] = {}
        self.lock = threading.Lock()

    def __enter__(self) -> Display:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def _bar(self, stage: str) -> TaskID:
        with self.lock:
            if stage not in self.tasks:
                self.tasks[stage] = self.bars.add_task(stage, total=None, stage=stage, text="")
            return self.tasks[stage]

    def started(self, stage: str, path: Path) -> None:
        self._bar(stage)

    def advanced(self, stage: str, done: float, total: float, text: str) -> None:
        self.bars.update(self._bar(stage), completed=done, total=total, text=text)
        reached = int(MILESTONES * done / total) if total else 0
        with self.lock:
            news = reached > self.milestone.get(stage, 0)
            self.milestone[stage] = max(reached, self.milestone.get(stage, 0))
        if news and not console.is_terminal:
            console.print(f"  {stage:9} {done:g} of {total:g}" + (f", {text}" if text else ""), markup=False)

    def finished(self, stage: str, path: Path, seconds: float, reused: bool) -> None:
        with self.lock:
            bar = self.tasks.pop(stage, None)
        if bar is not None:
            self.bars.remove_task(bar)
        how = "[cyan]cached[/]" if reused else "[green]done[/]  "
        console.print(f"[green]✓[/] {stage:9} {how} {seconds:7.1f} s  {path}", soft_wrap=True)


@contextlib.contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """All that Prefect, the stages and the libraries below them say goes to a file; the terminal keeps `console`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        path.open("a", encoding="utf-8", buffering=1) as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        yield


def log_records_to_file(path: Path) -> None:
    """Log records as well; called once Prefect is imported, which sets up logging of its own."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)


def summary(outcomes: Sequence[Outcome], workspace: Path, seconds: float) -> None:
    """Paths, metrics, seconds per stage, and where to look further."""
    from wan_core.records import EvaluateRecord, TrainRecord

    table = Table(title=f"{seconds:.1f} s in all", title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name, justify in (("stage", "left"), ("", "left"), ("seconds", "right"), ("output", "left")):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for outcome in outcomes:
        how = "[cyan]cached[/]" if outcome.reused else "[green]ran[/]"
        table.add_row(outcome.record.stage, how, f"{outcome.seconds:.1f}", str(outcome.record.path))
    console.print(table)
    for record in (outcome.record for outcome in outcomes):
        if isinstance(record, TrainRecord):
            console.print(
                f"train: iteration {record.iteration}, {record.num_samples} samples, loss {record.final_loss:.4f}"
            )
        if isinstance(record, EvaluateRecord):
            metrics = Table(box=None, pad_edge=False, show_header=False)
            for name, value in record.metrics.items():
                metrics.add_row(name.replace("_", " "), f"{value:.4g}")
            console.print(metrics)
            console.print(f"report: file://{record.report}", soft_wrap=True)
    wan = "uv run wan" if "UV" in os.environ else "wan"  # which uv sets: without it `wan` may not be on the path
    console.print(f"logs:   {workspace / 'logs'}\nui:     {wan} ui --workspace {workspace}", soft_wrap=True)

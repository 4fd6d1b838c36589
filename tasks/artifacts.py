"""What a stage shows in Prefect's UI: a Markdown page per record, tables, pictures and links.

A page of the UI cannot open files of the machine that worked. Where the workspace is served over HTTP, its address in
WAN_FILES_URL, and TensorBoard's in WAN_TENSORBOARD_URL, become links; otherwise the paths are shown. WAN_FILES_ROOT is
the folder at that address, if it is not the workspace itself but one that holds it.
"""

from __future__ import annotations

import base64
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from tasks.aside import Aside, shown_if_possible
from wan_core.records import (
    EncodeRecord,
    EvaluateRecord,
    IndexRecord,
    PartRecord,
    Record,
    SampleRecord,
    ShardRecord,
    TrainRecord,
    load_record,
)

if TYPE_CHECKING:
    from wan_core.validate import Validation

HIDDEN = {"stage", "path", "fingerprint", "config", "files", "seconds", "versions"}  # shown otherwise or too long
MAX_ROWS = 500  # of a table: the UI draws all of them at once


def human_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        text = ", ".join(f"{key}: {_cell(item)}" for key, item in value.items())
    elif isinstance(value, (list, tuple)):
        text = f"{len(value)} items" if len(value) > 5 else ", ".join(_cell(item) for item in value)
    else:
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def markdown(record: Record) -> str:
    """A record as a Markdown page."""
    rows = [("folder", f"`{record.path}`"), ("fingerprint", f"`{record.fingerprint[:16]}`")]
    shown = {name: value for name, value in vars(record).items() if name not in HIDDEN}
    shown |= shown.pop("metrics") if isinstance(record, EvaluateRecord) else {}  # a row each
    rows += [(name, _cell(value)) for name, value in shown.items()]
    rows += [("output", f"{len(record.files)} files, {human_bytes(record.num_bytes)}")]
    rows += [("worked for", f"{record.seconds:.1f} s")]
    head, *body = (f"| {name.replace('_', ' ')} | {value} |" for name, value in rows)
    return "\n".join([f"## {record.stage}: {record.path.name}", "", head, "|---|---|", *body, ""])


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'\n<img alt="{path.name}" src="data:image/png;base64,{data}" />\n'


def loss_plot(metrics: Path) -> str:
    """The curves of a metrics file as an inline picture."""
    from wan_core.evaluate import read_lines
    from wan_core.report import plot_training

    with tempfile.TemporaryDirectory() as folder:
        plot_training(read_lines(metrics), Path(folder) / "loss.png")
        return _image(Path(folder) / "loss.png")


class LivePage:
    """A Markdown page of the running task that is replaced while it works."""

    def __init__(self, key: str, description: str) -> None:
        self.key, self.description = key, description
        self.artifact: UUID | None = None
        self.aside = Aside(description)

    def show(self, page: str) -> None:
        self.aside.ask(lambda: self.replace(page))

    def replace(self, page: str) -> None:
        from prefect.client.orchestration import get_client
        from prefect.client.schemas.actions import ArtifactUpdate

        if self.artifact is None:
            made = create_markdown_artifact(key=self.key, markdown=page, description=self.description)
            assert isinstance(made, UUID)
            self.artifact = made
            return
        with get_client(sync_client=True) as client:
            client.update_artifact(self.artifact, ArtifactUpdate(data=page))


def address(path: Path, workspace: Path) -> str | None:
    """Where a browser finds a file of the workspace; None where nobody serves it."""
    base, path = os.environ.get("WAN_FILES_URL"), path.resolve()
    root = Path(os.environ.get("WAN_FILES_ROOT") or workspace).resolve()  # the image has /app/workspace -> /workspace
    return f"{base.rstrip('/')}/{path.relative_to(root).as_posix()}" if base and path.is_relative_to(root) else None


def _links(record: Record) -> Iterator[tuple[str, str]]:
    """Name and address of what a record's page leads to."""
    workspace = record.path.parents[1]
    if isinstance(record, EvaluateRecord) and (url := address(record.report, workspace)):
        yield "the report", url
    if isinstance(record, TrainRecord) and (base := os.environ.get("WAN_TENSORBOARD_URL")):
        yield "TensorBoard", f"{base.rstrip('/')}/?runFilter={record.path.name}#timeseries"


def clips(record: EncodeRecord) -> Iterator[dict[str, Any]]:
    """Rows of the clips table, part by part."""
    for folder in record.parts:
        with tarfile.open(folder / "part.tar") as tar:
            for member in tar:
                if member.name.endswith(".json") and (file := tar.extractfile(member)):
                    info = json.load(file)
                    size = f"{info['height']}x{info['width']}"
                    yield {"clip": member.name.removesuffix(".json"), "caption": info["caption"], "size": size,
                           "frames": info["frames"], "fps": info["fps"], "part": folder.name}  # fmt: skip


def tables(record: Record) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Key, description and rows of the tables of a record."""
    if isinstance(record, EncodeRecord):
        rows = [row for row, _ in zip(clips(record), range(MAX_ROWS), strict=False)]
        yield "clips", f"{len(rows)} of the {record.num_clips} clips of {record.path.name}", rows
        made = [(folder.name, load_record(PartRecord, folder)) for folder in record.parts[:MAX_ROWS]]
        yield "parts", f"{len(made)} of the {len(record.parts)} parts of {record.path.name}", [
            {"part": name, "clips": part.num_clips, "left out": part.num_quarantined,
             "bytes": human_bytes(part.num_bytes), "seconds": part.seconds} for name, part in made
        ]  # fmt: skip
        if record.num_quarantined:
            lines = (record.path / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()[:MAX_ROWS]
            yield (
                "quarantine",
                f"{record.num_quarantined} clips of {record.path.name} were left out",
                [json.loads(line) for line in lines],
            )
    if isinstance(record, ShardRecord):
        shards = list(record.shards.items())[:MAX_ROWS]
        yield "shards", f"{len(shards)} of the {len(record.shards)} shards of {record.path.name}", [
            {"shard": name, "split": name.partition("-")[0], "samples": samples,
             "bytes": human_bytes(record.files[name])} for name, samples in shards
        ]  # fmt: skip


def dataset_card(folder: Path) -> str:
    """The card of a dataset with its pictures inline."""
    page = (folder / "card.md").read_text(encoding="utf-8")
    return re.sub(r"!\[[^]]*\]\(([^)]+\.png)\)", lambda match: _image(folder / match[1]), page)


@shown_if_possible("the page and tables of the stage")
def publish(record: Record) -> None:
    """Create the artifacts of a record, linked to the current task run."""
    page = markdown(record)
    if isinstance(record, TrainRecord):
        page += loss_plot(record.metrics)
        page += f"\nTensorBoard: `tensorboard --logdir {record.path}`\n"
    if isinstance(record, SampleRecord):  # Markdown with an inline image: an image artifact would print its data URI
        page += "".join(_image(record.path / name) for name in record.files if name.endswith("contact_sheet.png"))
    if isinstance(record, EvaluateRecord):
        page += f"\nReport: `{record.report}`\n"
    if isinstance(record, IndexRecord):
        create_markdown_artifact(key="dataset-card", markdown=dataset_card(record.path), description=record.path.name)
    links = dict(_links(record))
    page += "".join(f"\n[Open {text}]({url})\n" for text, url in links.items())
    page += f"\n### Config\n\n```json\n{json.dumps(record.config, indent=1, ensure_ascii=False)}\n```\n"
    create_markdown_artifact(key=record.stage, markdown=page, description=f"{record.stage} {record.path.name}")
    for key, description, rows in tables(record):
        create_table_artifact(key=key, table=rows, description=description)
    for text, url in links.items():
        key = f"{text.split()[-1].lower()}-link"
        create_link_artifact(link=url, key=key, link_text=text, description=f"{text} of {record.path.name}")


@shown_if_possible("the table of validation")
def publish_validation(start: Path, before: Validation, candidate: Path, after: Validation) -> None:
    """Both models' losses per noise level."""
    rows = [
        {"noise level": f"{sigma:.3f}", "before": f"{old:.5f}", "after": f"{new:.5f}", "change": f"{new - old:+.5f}"}
        for sigma, old, new in zip(before.sigmas, before.losses, after.losses, strict=True)
    ]
    rows.append(
        {"noise level": "mean", "before": f"{before.loss:.5f}", "after": f"{after.loss:.5f}",
         "change": f"{after.loss - before.loss:+.5f}"}
    )  # fmt: skip
    text = f"Loss on {after.num_clips} held-out clips: {start.name} before, {candidate.name} after"
    create_table_artifact(key="validation", table=rows, description=text)

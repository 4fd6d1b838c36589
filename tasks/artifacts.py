"""What a stage shows in Prefect's UI: one Markdown page per record, and a table of what encode left out."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

from prefect.artifacts import create_markdown_artifact, create_table_artifact

from wan_core.records import EncodeRecord, EvaluateRecord, IndexRecord, Record, SampleRecord

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
    rows += [(name, _cell(value)) for name, value in vars(record).items() if name not in HIDDEN]
    rows += [("output", f"{len(record.files)} files, {human_bytes(record.num_bytes)}")]
    rows += [("worked for", f"{record.seconds:.1f} s"), ("config", f"`{_cell(json.dumps(record.config))}`")]
    table = "\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in rows)
    return f"## {record.stage}: {record.path.name}\n\n| | |\n|---|---|\n{table}\n"


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'\n<img alt="{path.name}" src="data:image/png;base64,{data}" />\n'


def dataset_card(folder: Path) -> str:
    """The card of a dataset with its pictures inline."""
    page = (folder / "card.md").read_text(encoding="utf-8")
    return re.sub(r"!\[[^]]*\]\(([^)]+\.png)\)", lambda match: _image(folder / match[1]), page)


def publish(record: Record) -> None:
    """Create the artifacts of a record, linked to the current task run."""
    page = markdown(record)
    if isinstance(record, SampleRecord):  # Markdown with an inline image: an image artifact would print its data URI
        page += "".join(_image(record.path / name) for name in record.files if name.endswith("contact_sheet.png"))
    if isinstance(record, EvaluateRecord):
        page += f"\nReport: `{record.report}`\n"
    if isinstance(record, IndexRecord):
        create_markdown_artifact(key="dataset-card", markdown=dataset_card(record.path), description=record.path.name)
    create_markdown_artifact(key=record.stage, markdown=page, description=f"{record.stage} {record.path.name}")
    if isinstance(record, EncodeRecord) and record.num_quarantined:
        lines = (record.path / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
        create_table_artifact(
            key="quarantine",
            table=[json.loads(line) for line in lines[:MAX_ROWS]],
            description=f"{record.num_quarantined} clips of {record.path.name} were left out",
        )

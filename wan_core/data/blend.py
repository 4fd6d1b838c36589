"""blend: several indexed datasets as one dataset, each with its share of the samples that training draws.

    <output_dir>/metadataset.yaml   Energon's description of it: the members' folders and weights
                 empty_text.pt      embedding of the empty caption, and
                 negative_text.pt   of the negative prompt
                 encoder.json       what all members were encoded with
                 record.json        IndexRecord, so whatever takes a dataset takes a blend

Nothing is copied: members stay where they are, and a blend of members that were moved or made again is refused.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from wan_core import records
from wan_core.config import STORED_TEXTS, check
from wan_core.output import writing
from wan_core.records import IndexRecord

METADATASET_NAME = "metadataset.yaml"
REMEDY = "run `wan blend` again"


@dataclass(frozen=True)
class BlendConfig:
    """What a blend is."""

    members: tuple[str, ...]  # fingerprints
    shares: tuple[float, ...]  # of the samples drawn; their sum is 1

    @classmethod
    def of(cls, weights: Mapping[Path, float]) -> BlendConfig:
        """Raises ValueError: a folder is no indexed dataset, or a weight is not positive."""
        for path, weight in weights.items():
            check(
                math.isfinite(weight) and weight > 0,
                f"weight {weight} of {path} is not positive; give its share of the samples, for example 0.3",
            )
        found = [_member(path).fingerprint for path in weights]
        check(len(set(found)) == len(found), "a dataset is named twice in the blend; name it once, with both weights")
        total = sum(weights.values())
        return cls(tuple(found), tuple(round(weight / total, 9) for weight in weights.values()))


def fingerprint(config: BlendConfig) -> str:
    return records.fingerprint("index", config)


def run(weights: Mapping[Path, float], output_dir: Path) -> IndexRecord:
    """Write a blend.

    Args:
        weights: folder of each indexed dataset, and its weight, on any scale. A split that a dataset lacks is drawn
            from the others, in their proportions.

    Raises:
        ValueError: a folder is no indexed dataset, a weight is not positive, or the encoders differ.
    """
    check(len(weights) > 0, "a blend of no dataset; name at least one")
    config = BlendConfig.of(weights)
    wanted = fingerprint(config)
    if found := records.find_record(IndexRecord, output_dir, wanted):
        return found
    members = {path.absolute(): _member(path) for path in weights}
    first, *others = members
    for path in others:
        ours, theirs = members[first].encoder, members[path].encoder
        differing = ", ".join(sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)))
        check(not differing, f"{path} and {first} differ in {differing}; encode both with the same model")
    splits: dict[str, dict[str, Any]] = {}
    num_samples: dict[str, int] = {}
    for share, (path, record) in zip(config.shares, members.items(), strict=True):
        for split, count in record.num_samples.items():
            entry = {"weight": share, "path": os.path.relpath(path, output_dir.absolute())}
            splits.setdefault(split, {"blend": []})["blend"].append(entry)
            num_samples[split] = num_samples.get(split, 0) + count
    with writing("index", output_dir, config, wanted) as output:
        description = {"__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": splits}
        (output.path / METADATASET_NAME).write_text(yaml.safe_dump(description, sort_keys=False))
        for name in (*STORED_TEXTS, "encoder.json"):
            shutil.copyfile(first / name, output.path / name)
        return output.finish(IndexRecord, num_samples=num_samples, encoder=members[first].encoder)


def members_of(folder: Path) -> list[Path]:
    """The datasets that a folder stands for: those of a blend, or the folder itself.

    Raises:
        ValueError: a member was moved, deleted or made again since the blend was written.
    """
    if not (folder / METADATASET_NAME).is_file():
        return [folder]
    record = records.load_record(IndexRecord, folder)
    description = yaml.safe_load((folder / METADATASET_NAME).read_text())
    entries = [entry["path"] for split in description["splits"].values() for entry in split["blend"]]
    paths = [Path(os.path.normpath(folder.absolute() / path)) for path in dict.fromkeys(entries)]
    for path in paths:
        check((path / records.RECORD_NAME).is_file(), f"{path}, part of the blend {folder}, is gone; {REMEDY}")
        found = records.load_record(IndexRecord, path).fingerprint
        check(
            found in record.config["members"],
            f"{path}, part of the blend {folder}, is another dataset than when it was blended; {REMEDY}",
        )
    return paths


def _member(path: Path) -> IndexRecord:
    check((path / records.RECORD_NAME).is_file(), f"{path} is no indexed dataset; run `wan index`, or check the path")
    values = json.loads((path / records.RECORD_NAME).read_text(encoding="utf-8"))
    check(values["stage"] == "index", f"{path} is an output of {values['stage']}; give one of index")
    check(not (path / METADATASET_NAME).exists(), f"{path} is itself a blend; name its members instead")
    return records.load_record(IndexRecord, path)

"""Writes `conf/trainer_keys.txt`: `python -m wan_core.trainer_schema`. Run it when a config of the trainer changes.

Another file may be named as argument.
"""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

from wan_core.trainer_keys import FILE


def keys(owner: object, prefix: str = "", above: tuple[type, ...] = ()) -> Iterator[str]:
    """Dotted names of all fields of a dataclass, or of an instance, whose values say what an annotation leaves open."""
    kind = owner if isinstance(owner, type) else type(owner)
    try:
        hints = typing.get_type_hints(kind)
    except NameError:  # a class that annotates with what it imports for type checkers only
        hints = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name.startswith("_"):
            continue
        value = None if isinstance(owner, type) else getattr(owner, field.name, None)
        hint = hints.get(field.name)
        inner = [value] if dataclasses.is_dataclass(value) else [hint, *typing.get_args(hint)]
        sections = [item for item in inner if dataclasses.is_dataclass(item)]
        if sections and type(sections[0]) not in above and sections[0] not in above:
            yield from keys(sections[0], f"{prefix}{field.name}.", (*above, kind))
        elif prefix:
            yield prefix + field.name


def present_keys() -> list[str]:
    """Of the container that a run builds, sorted."""
    from wan_core.runtime import cpu

    cpu.install()  # before megatron.bridge is imported
    from wan_core.config import TrainConfig
    from wan_core.recipes import build

    return sorted(keys(build(TrainConfig(), model_dir=None, dataset_dir=None, run_dir=None)))


if __name__ == "__main__":
    file = Path(sys.argv[1]) if sys.argv[1:] else FILE
    file.write_text("\n".join(present_keys()) + "\n", encoding="utf-8")

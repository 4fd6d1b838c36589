"""The keys that a training override may name, known without Megatron, whose import takes 10-25 s.

`conf/trainer_keys.txt` is written by `python -m wan_core.trainer_schema` from the dataclasses of Megatron-Bridge and
our own, and a test compares them. The trainer itself still checks each value against its field.
"""

from __future__ import annotations

import difflib
from functools import cache
from pathlib import Path

FILE = Path(__file__).parent / "conf" / "trainer_keys.txt"


@cache
def trainer_keys() -> frozenset[str]:
    """Every key, for example `optimizer.lr`."""
    return frozenset(FILE.read_text(encoding="utf-8").split())


@cache
def sections() -> tuple[str, ...]:
    """First words of the keys."""
    return tuple(sorted({key.partition(".")[0] for key in trainer_keys()}))


def check_trainer_key(key: str) -> None:
    """Refuse a key that the trainer does not have.

    Raises:
        ValueError: names the nearest key, or the sections.
    """
    if key in trainer_keys():
        return
    section = key.partition(".")[0] + "."
    beside = [name for name in trainer_keys() if name.startswith(section)]
    near = difflib.get_close_matches(key, beside, 1, 0.0) or difflib.get_close_matches(key, trainer_keys(), 1)
    hint = f"did you mean {near[0]}?" if near else f"its sections are {', '.join(sections())}"
    raise ValueError(f"{key} is no key of the trainer; {hint}")

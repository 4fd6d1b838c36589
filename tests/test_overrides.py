"""Overrides of nested configs: what fits is taken in the field's own type, all else is refused in a sentence."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch

from wan_core.flow_matching import FlowMatchingConfig
from wan_core.overrides import apply_override


@dataclass
class Part:
    rate: float = 1e-3
    steps: int = 10
    saves: bool = False
    style: Literal["cosine", "constant"] = "cosine"
    format: Literal["a", "b"] | None = None
    folder: str | None = None
    names: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32
    tags: dict[str, str] | None = None


@dataclass
class Whole:
    part: Part = field(default_factory=Part)
    rates: Part = field(default_factory=Part)
    flow_matching: FlowMatchingConfig = field(default_factory=FlowMatchingConfig)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("part.rate", "1e-4", 1e-4),  # YAML reads it as text
        ("part.rate", 2, 2.0),
        ("part.steps", 7, 7),
        ("part.style", "constant", "constant"),
        ("part.format", None, None),
        ("part.format", "b", "b"),
        ("part.folder", "runs/a", "runs/a"),
        ("part.names", ["a", "b"], ("a", "b")),
        ("part.dtype", "bf16", torch.bfloat16),
        ("part.tags", {"a": "b"}, {"a": "b"}),
        ("flow_matching.shift", 5, 5.0),  # of a frozen section
        ("flow_matching.density", "mode", "mode"),
    ],
)
def test_what_fits_is_taken(key: str, value: Any, expected: Any) -> None:
    whole = Whole()
    apply_override(whole, key, value)
    section, name = key.split(".")
    found = getattr(getattr(whole, section), name)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("part.stepz", 1, "unknown key 'part.stepz': Part has no field 'stepz'; did you mean part.steps?"),
        ("rates.rates", 1, "unknown key 'rates.rates': Part has no field 'rates'; did you mean rates.rate?"),
        ("parts.steps", 1, "unknown key 'parts.steps': Whole has no field 'parts'; did you mean part.steps?"),
        ("part.steps.more", 1, "unknown key 'part.steps.more': int has no field 'more'"),
        ("part.steps", "many", "part.steps='many' is str, but the field takes int; the present value is 10"),
        ("part.steps", 1.5, "part.steps=1.5 is float, but the field takes int"),
        ("part.steps", True, "part.steps=True is bool, but the field takes int"),
        ("part.rate", "fast", "part.rate='fast' is not a number; the present value is 0.001"),
        ("part.rate", None, "part.rate=None is NoneType, but the field takes float"),
        ("part.saves", "yes please", "part.saves='yes please' is str, but the field takes bool"),
        ("part.folder", 3, "part.folder=3 is int, but the field takes NoneType, str"),
        ("part.dtype", "float33", "part.dtype='float33' is not a dtype; write bfloat16 or float32"),
        ("part.style", "wavy", "part.style='wavy' is none of cosine, constant; the present value is 'cosine'"),
        ("part.format", "c", "part.format='c' is none of a, b, None; the present value is None"),
        ("flow_matching.density", "normal", "flow_matching.density='normal' is none of uniform, logit_normal, mode"),
        ("flow_matching.shift", -1.0, "flow_matching.shift=-1.0 is not positive; choose 3.0"),
    ],
)
def test_what_does_not_fit_is_refused(key: str, value: Any, sentence: str) -> None:
    whole = Whole()
    with pytest.raises(ValueError) as refusal:
        apply_override(whole, key, value)
    assert str(refusal.value).startswith(sentence)
    assert whole == Whole()

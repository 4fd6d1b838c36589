"""The list of the trainer's keys, which flows check overrides against; tests/training compares it with the classes."""

from __future__ import annotations

import pytest
import yaml

from wan_core import presets
from wan_core.cluster import Layout
from wan_core.config import RESUMABLE_KEYS, TrainConfig
from wan_core.trainer_keys import FILE, trainer_keys


def test_recipes_presets_and_resumable_keys_use_keys_of_the_list() -> None:
    for recipe in FILE.parent.glob("*.yaml"):
        values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        keys = [
            f"{section}.{key}" for section in values if isinstance(values[section], dict) for key in values[section]
        ]
        assert keys and not set(keys) - trainer_keys()
    for name in presets.PRESETS:
        assert presets.get(name).train.recipe in {path.stem for path in FILE.parent.glob("*.yaml")}
    for prefix in RESUMABLE_KEYS:
        assert any(key.startswith(prefix) for key in trainer_keys()), prefix


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.lrr=1", "optimizer.lrr is no key of the trainer; did you mean optimizer.lr?"),
        ("optimiser.lr=1", "did you mean optimizer.lr?"),
        ("nonsense=1", "its sections are checkpoint, comm_overlap,"),
    ],
)
def test_a_config_with_an_unknown_key_cannot_be_made(override: str, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        TrainConfig(overrides=(override,))
    assert words in str(caught.value)


def test_a_run_goes_on_under_every_layout_of_the_plan() -> None:
    """What `wan plan` prints names no other run, but for the size of a pack, which data order follows from."""
    first, second = (
        TrainConfig(overrides=tuple(layout.overrides(packs, 32760)))
        for layout, packs in ((Layout(tp=2, dp=2), 2), (Layout(cp=4, ring=True, recompute="full", fsdp=True), 8))
    )
    assert first.resumable() == second.resumable()
    assert first.resumable().overrides == ("dataset.tokens_per_pack=32760",)

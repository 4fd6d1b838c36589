"""Names of outputs: which are refused, and which folders are whose."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flows.stages import shard
from tasks.layout import newest
from tasks.stage import Workspace


def test_the_newest_of_a_name_is_not_of_a_name_that_begins_alike(tmp_path: Path) -> None:
    for folder in (
        "cats-0123abcd",
        "cats-v2-01234567",
        "cats-01234567.replaced-20261101",
        "cats-01234567-89abcdef",
    ):
        (tmp_path / "shard" / folder).mkdir(parents=True)
        (tmp_path / "shard" / folder / "record.json").touch()
    assert newest(tmp_path, "shard", "cats") == tmp_path / "shard" / "cats-0123abcd"
    assert newest(tmp_path, "shard", "cats-v2") == tmp_path / "shard" / "cats-v2-01234567"
    assert newest(tmp_path, "shard", "cat") is None


@pytest.mark.parametrize("name", ["", "a/../../../escape", "demo*"])
def test_a_name_that_names_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="is not made of letters, digits, - and _"):
        Workspace(tmp_path, name)
    assert re.search(shard.parameters.properties["name"]["pattern"], name) is None

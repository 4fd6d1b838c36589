"""A run folder belongs to one way of drawing noise levels."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from wan_core.flow_matching import FlowMatchingConfig
from wan_core.training_run import claim, noise_identity


def test_a_run_goes_on_with_its_own_noise_levels_alone(tmp_path: Path) -> None:
    started = FlowMatchingConfig.for_mode("finetune")
    claim(tmp_path / "run", noise_identity(started))
    claim(tmp_path / "run", noise_identity(started))
    with pytest.raises(ValueError) as refusal:
        claim(tmp_path / "run", noise_identity(replace(started, shift=5.0)))
    assert str(refusal.value) == (
        f"{tmp_path / 'run'} was started with flow_matching.shift=3.0, now it is 5.0; "
        "resume with the same value, or choose another run folder"
    )


def test_ranks_claim_a_folder_together(tmp_path: Path) -> None:
    """None of them sees what another has half written."""
    wanted = {f"field{number}": "x" * 1000 for number in range(200)}
    with ThreadPoolExecutor(8) as ranks:
        for number in range(40):
            for done in [ranks.submit(claim, tmp_path / str(number), wanted) for _ in range(8)]:
                done.result()
            assert len(list((tmp_path / str(number)).iterdir())) == 1


def test_the_mode_is_no_secret_override(tmp_path: Path) -> None:
    """The other mode's presets are other values, and the first that differs is named."""
    claim(tmp_path, noise_identity(FlowMatchingConfig.for_mode("pretrain")))
    with pytest.raises(ValueError, match=r"started with flow_matching\.\w+="):
        claim(tmp_path, noise_identity(FlowMatchingConfig.for_mode("finetune")))

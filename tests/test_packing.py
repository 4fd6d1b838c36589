"""Packs: boundaries, shares of ranks, and how full they get."""

from __future__ import annotations

import random

import pytest
import torch

from wan_core.packing import Packing, first_fit_decreasing
from wan_core.patch import GridSize, patchify, patchify_output, unpatchify

TEXTS = [torch.zeros(length, 8) for length in (5, 512, 1)]
GRIDS = (GridSize(3, 4, 4), GridSize(1, 2, 3), GridSize(2, 3, 5))  # 48, 6 and 30 tokens


def test_parts_cover_the_pack() -> None:
    """The ranks' shares, put together, are the whole: sample by sample, padding to the last."""
    whole = Packing.of(GRIDS, TEXTS, multiple=8)
    assert (whole.num_real_tokens, whole.num_tokens) == (84, 88)
    parts = [whole.part(rank, 8) for rank in range(8)]
    device = torch.device("cpu")
    expected = [0] * 48 + [1] * 6 + [2] * 34
    assert torch.cat([part.sample_index(device) for part in parts]).tolist() == expected
    assert sum(part.loss_mask(device).sum() for part in parts) == 84
    for part in parts:
        assert sum(part.local_lengths) == part.num_local_tokens == 11
        assert part.self_segments.q_lengths == (48, 6, 30, 4)  # attention sees the whole sequence on every rank
        assert part.cross_segments.k_lengths == (6, 512, 2)
        assert part.cross_segments.last_key_counts == (507, 1, 511)  # 512 positions each


def test_a_part_of_a_part() -> None:
    """Sequence parallelism cuts a context-parallel rank's share again."""
    whole = Packing.of(GRIDS, TEXTS, multiple=8)
    assert whole.part(1, 2).part(1, 4) == whole.part(5, 8)


def test_cumulative_lengths() -> None:
    q, k = Packing.of(GRIDS, TEXTS).cross_segments.cu_seqlens(torch.device("cpu"))
    assert q.tolist() == [0, 48, 54, 84] and k.tolist() == [0, 6, 518, 520]
    assert q.dtype == torch.int32


def test_first_fit_decreasing() -> None:
    generator = random.Random(0)
    lengths = [generator.choice([260, 1560, 4680, 9360, 32760]) for _ in range(500)]
    packs = first_fit_decreasing(lengths, 37440)
    assert sorted(index for pack in packs for index in pack) == list(range(500))  # nothing lost, nothing twice
    fills = [sum(lengths[i] for i in pack) for pack in packs]
    assert max(fills) <= 37440
    assert len(packs) <= 11 / 9 * -(-sum(lengths) // 37440) + 1  # the algorithm's bound


def test_a_sample_beyond_the_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="40000 tokens exceeds the pack's budget of 37440"):
        first_fit_decreasing([100, 40000], 37440)


def test_patches_are_the_conv3d_of_the_patch_embedding() -> None:
    latents = torch.randn(16, 3, 4, 6)
    conv = torch.nn.Conv3d(16, 8, kernel_size=(1, 2, 2), stride=(1, 2, 2))
    expected = conv(latents[None]).flatten(2)[0].T
    found = patchify(latents) @ conv.weight.flatten(1).T + conv.bias
    torch.testing.assert_close(found, expected)


def test_unpatchify_undoes_patchify_output() -> None:
    latents = torch.randn(16, 3, 4, 6)
    assert torch.equal(unpatchify(patchify_output(latents), GridSize.of(latents)), latents)


def test_odd_latents_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        GridSize.of(torch.zeros(16, 3, 5, 4))

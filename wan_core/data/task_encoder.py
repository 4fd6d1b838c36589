"""Shard samples to packs: cooking, caption dropout, sequence packing. Energon runs this in its workers."""

from __future__ import annotations

import torch
from megatron.energon import Cooker, CrudeSample, DefaultTaskEncoder, SampleDecoder, basic_sample_keys, stateless
from torch import Tensor

from wan_core.data.batch import Pack, TrainingSample, random_seed
from wan_core.data.samples import SafeDecoder
from wan_core.packing import first_fit_decreasing


@stateless
def cook(sample: CrudeSample) -> TrainingSample:
    """A shard's members `.pth` and `.pickle` as a sample; its seed is drawn when it is encoded."""
    return TrainingSample(**basic_sample_keys(sample), latents=sample["pth"], text_embeds=sample["pickle"], seed=0)


class WanTaskEncoder(DefaultTaskEncoder[TrainingSample, TrainingSample, Pack, Pack]):
    """Deterministic per sample: a restored loader replays the same seeds and the same dropped captions."""

    decoder: SampleDecoder = SafeDecoder()
    cookers = [Cooker(cook, has_subflavors={"kind": "wan"})]  # noqa: RUF012

    def __init__(self, tokens_per_pack: int, caption_dropout: float, empty_text: Tensor) -> None:
        super().__init__()
        self.tokens_per_pack = tokens_per_pack
        self.caption_dropout = caption_dropout
        self.empty_text = empty_text

    @stateless(restore_seeds=True)
    def encode_sample(self, sample: TrainingSample) -> TrainingSample:
        """Draw the sample's seed, and drop its caption now and then."""
        sample.seed = random_seed()
        if torch.rand(()) < self.caption_dropout:
            sample.text_embeds = self.empty_text
        return sample

    def select_samples_to_pack(self, samples: list[TrainingSample]) -> list[list[TrainingSample]]:
        """First-fit-decreasing over the packing buffer."""
        packs = first_fit_decreasing([sample.num_tokens for sample in samples], self.tokens_per_pack)
        return [[samples[index] for index in pack] for pack in packs]

    @stateless
    def pack_selected_samples(self, samples: list[TrainingSample]) -> Pack:
        return Pack.of(samples)

    @stateless
    def batch(self, samples: list[Pack]) -> Pack:
        assert len(samples) == 1, "a micro-batch is one pack"
        return samples[0]

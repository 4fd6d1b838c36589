"""Captions to text embeddings, through UMT5."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wan_core.config import TEXT_LENGTH

if TYPE_CHECKING:  # imported where it is used: it takes seconds, and a run whose stages are all cached needs none
    from transformers import UMT5EncoderModel


LENGTH_STEP = 64  # captions are padded to a multiple of it
BATCH_TOKENS = 4096  # of one forward, padding included


def clean_caption(caption: str) -> str:
    """What WAN 2.1 does to a caption first: repaired encoding, HTML entities resolved (twice), single spaces."""
    import ftfy

    repaired = html.unescape(html.unescape(ftfy.fix_text(caption)))
    return re.sub(r"\s+", " ", repaired).strip()


class TextEncoder:
    """UMT5 and its tokenizer."""

    def __init__(self, tokenizer: Any, model: UMT5EncoderModel) -> None:
        if model.dtype == torch.float16:
            raise ValueError("text encoder in float16 overflows to zeros; choose bfloat16 or float32")
        if not model.get_input_embeddings().weight.any():
            # Some transformers versions do not tie embed_tokens to the stored `shared` weight and leave it zero.
            raise ValueError("text encoder has an all-zero embed_tokens weight; load it with another transformers")
        self.tokenizer, self.model = tokenizer, model.eval().requires_grad_(False)

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Embeddings of each caption, cut at its true length; equal captions are encoded once and share a tensor.

        Returns:
            per caption [n <= TEXT_LENGTH, text_dim] in the encoder's dtype, on its device.

        Raises:
            ValueError: an embedding is all zero or not finite.
        """
        known = self.embed(captions)
        for caption, embeds in known.items():
            if reason := fault(embeds):
                raise ValueError(f"text embedding of {caption!r} is {reason}; check the weights in text_encoder/")
        return [known[caption] for caption in captions]

    def embed(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """What `encode` gives, by caption and unchecked."""
        cleaned = {caption: clean_caption(caption) for caption in captions}
        distinct = list(dict.fromkeys(cleaned.values()))
        ids = [self.tokenizer(text, max_length=TEXT_LENGTH, truncation=True).input_ids for text in distinct]
        known = dict(zip(distinct, encode_ids(self.model, ids), strict=True))
        return {caption: known[text] for caption, text in cleaned.items()}


def fault(embeds: Tensor) -> str | None:
    """What is wrong with an embedding: `all zero`, `not finite`, or nothing."""
    if not embeds.isfinite().all():
        return "not finite"
    return None if embeds.any() else "all zero"


@torch.no_grad()
def encode_ids(model: UMT5EncoderModel, ids: Sequence[Sequence[int]]) -> list[Tensor]:
    """Embeddings of token sequences, in batches of like length.

    Padding is masked, so it costs time and changes nothing but last bits. Those depend on a batch's shape: a sequence
    is padded to the next multiple of LENGTH_STEP, and a batch of one length has one size (missing sequences are
    repeated ones), so that an embedding depends on its own tokens alone.

    Args:
        ids: per sequence 1 to TEXT_LENGTH tokens.

    Returns:
        per sequence [its length, text_dim].
    """
    embeds: dict[int, Tensor] = {}
    alike: dict[int, list[int]] = {}
    for index, tokens in enumerate(ids):
        alike.setdefault(-(-len(tokens) // LENGTH_STEP) * LENGTH_STEP, []).append(index)
    for length, members in sorted(alike.items()):
        size = BATCH_TOKENS // length
        for start in range(0, len(members), size):
            batch = members[start : start + size]
            rows = [ids[index] for index in batch] + [ids[batch[0]]] * (size - len(batch))
            lengths = torch.tensor([len(tokens) for tokens in rows])
            padded = torch.tensor([[*tokens, *[0] * (length - len(tokens))] for tokens in rows]).to(model.device)
            mask = (torch.arange(length) < lengths[:, None]).long().to(model.device)
            states = model(padded, mask).last_hidden_state
            embeds |= {index: states[row, : len(ids[index])].clone() for row, index in enumerate(batch)}
    return [embeds[index] for index in range(len(ids))]


def load_text_encoder(model_dir: Path, dtype: torch.dtype, device: torch.device | str) -> TextEncoder:
    """The tokenizer and text encoder of a Diffusers folder."""
    from transformers import AutoTokenizer, UMT5EncoderModel

    tokenizer = AutoTokenizer.from_pretrained(model_dir / "tokenizer", local_files_only=True)
    model = UMT5EncoderModel.from_pretrained(model_dir / "text_encoder", dtype=dtype, local_files_only=True)
    return TextEncoder(tokenizer, model.to(device))

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

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Embeddings of each caption, cut at its true length; equal captions are encoded once and share a tensor.

        One caption per forward, padded to TEXT_LENGTH as WanPipeline pads it: other batches or paddings change the
        last bits, and an embedding should depend on its caption alone.

        Returns:
            per caption [n <= TEXT_LENGTH, text_dim] in the encoder's dtype, on its device.

        Raises:
            ValueError: an embedding is all zero or not finite.
        """
        known: dict[str, Tensor] = {}
        for caption in captions:
            cleaned = clean_caption(caption)
            if cleaned not in known:
                known[cleaned] = self._encode_one(cleaned)
        return [known[clean_caption(caption)] for caption in captions]

    def _encode_one(self, cleaned: str) -> Tensor:
        tokens = self.tokenizer(
            cleaned, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
        )
        ids, mask = tokens.input_ids.to(self.model.device), tokens.attention_mask.to(self.model.device)
        embeds = self.model(ids, mask).last_hidden_state[0, : int(mask.sum())].clone()
        if not embeds.isfinite().all() or not embeds.any():
            state = "all zero" if embeds.isfinite().all() else "not finite"
            raise ValueError(f"text embedding of {cleaned!r} is {state}; check the weights in text_encoder/")
        return embeds


def load_text_encoder(model_dir: Path, dtype: torch.dtype, device: torch.device | str) -> TextEncoder:
    """The tokenizer and text encoder of a Diffusers folder."""
    from transformers import AutoTokenizer, UMT5EncoderModel

    tokenizer = AutoTokenizer.from_pretrained(model_dir / "tokenizer", local_files_only=True)
    model = UMT5EncoderModel.from_pretrained(model_dir / "text_encoder", dtype=dtype, local_files_only=True)
    return TextEncoder(tokenizer, model.to(device))

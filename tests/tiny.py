"""A whole Diffusers WAN folder with tiny random networks, made in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)  # fmt: skip
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)  # fmt: skip

TEXT_DIM, IMAGE_DIM = 32, 24
WORDS = [
    "a", "an", "the", "red", "green", "blue", "yellow", "circle", "square", "triangle", "moves", "moving", "left",
    "right", "up", "down", "slowly", "and", "on",
]  # fmt: skip


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words by white space, each caption closed with </s> as T5 does."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def make_tiny_model(folder: Path, seed: int = 0, image_to_video: bool = False) -> Path:
    """Write a folder that `WanPipeline.from_pretrained` loads; the same seed gives the same weights.

    Args:
        image_to_video: with an image branch, for `WanImageToVideoPipeline`.
    """
    sizes = {"in_channels": 36, "image_dim": IMAGE_DIM, "added_kv_proj_dim": 32} if image_to_video else {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1)
        text_encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=3 + len(WORDS), d_model=TEXT_DIM, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, dropout_rate=0.0,
            )
        )  # fmt: skip
        transformer = WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, text_dim=TEXT_DIM, freq_dim=32, ffn_dim=64, num_layers=2,
            **sizes,
        )  # fmt: skip
        image = image_parts() if image_to_video else {}
    (WanImageToVideoPipeline if image_to_video else WanPipeline)(
        tokenizer=make_tokenizer(), text_encoder=text_encoder, vae=vae, transformer=transformer,
        scheduler=UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
        **image,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def image_parts() -> dict[str, Any]:
    """A CLIP of 257 embeddings, as the real one has: 16 x 16 patches and one for the whole image."""
    config = CLIPVisionConfig(
        hidden_size=IMAGE_DIM, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=32,
        patch_size=2,
    )  # fmt: skip
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return {"image_encoder": CLIPVisionModel(config), "image_processor": processor}

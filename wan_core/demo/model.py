"""A complete small WAN checkpoint in the Diffusers layout, made from a seed and the committed VAE."""

from __future__ import annotations

import json
from itertools import chain, pairwise
from pathlib import Path

import torch
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from wan_core.config import TEXT_LENGTH
from wan_core.demo.train_vae import load_vae
from wan_core.demo.videos import COLOURS, DIRECTIONS, SHAPES

TEXT_DIM = 64
PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
MODEL_INDEX = {
    "_class_name": "WanPipeline",
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "transformer_2": [None, None],
    "boundary_ratio": None,
    "expand_timesteps": False,
}


def make_model(folder: Path, seed: int = 0) -> None:
    """Write a folder that `WanPipeline.from_pretrained` loads; the same seed gives the same bytes.

    Tokenizer and VAE are fixed, text encoder and transformer are random: the encoder stays as it is, the transformer
    is what the demo trains.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = new_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new_text_encoder(len(tokenizer)).save_pretrained(folder / "text_encoder")
        new_transformer().save_pretrained(folder / "transformer")
    load_vae().save_pretrained(folder / "vae")
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n", encoding="utf-8")


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every word of the demo's captions is one token, and any other text is spelt in bytes."""
    vocabulary = {token: number for number, token in enumerate((PAD, EOS, UNK))}
    merges: dict[tuple[str, str], None] = {}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    for word in ("a", "moving", *COLOURS, *SHAPES, *DIRECTIONS):
        # Every merge extends a prefix that begins with the space, so no two words' merges get in each other's way.
        prefixes = [f"Ġ{word[:length]}" for length in range(len(word) + 1)]
        for (prefix, longer), letter in zip(pairwise(prefixes), word, strict=True):
            merges[prefix, letter] = None
            vocabulary.setdefault(longer, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges), unk_token=UNK))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, vocabulary[EOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNK, model_max_length=TEXT_LENGTH
    )


def new_text_encoder(vocabulary: int) -> UMT5EncoderModel:
    """A random UMT5 encoder of two layers; its last norm gives every token's vector [64] a mean square of 1."""
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary, d_model=TEXT_DIM, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
            feed_forward_proj="gated-gelu", dropout_rate=0.0, pad_token_id=0, eos_token_id=1,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        # Deviation 1 against layers that add about as much: a word's own vector stays visible in its token's output.
        encoder.shared.weight.normal_(0.0, 1.0)
    return encoder


def new_transformer() -> WanTransformer3DModel:
    """WAN 2.1's transformer in small, initialised the way WAN 2.1 is for training from scratch."""
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=64, in_channels=16, out_channels=16,
        text_dim=TEXT_DIM, freq_dim=256, ffn_dim=512, num_layers=4, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(transformer.patch_embedding.weight.flatten(1))
    embedder = transformer.condition_embedder
    for module in chain(embedder.time_embedder.modules(), embedder.text_embedder.modules()):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
    nn.init.zeros_(transformer.proj_out.weight)
    return transformer

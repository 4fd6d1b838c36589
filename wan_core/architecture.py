"""The shape of a WAN 2.1 transformer, as its Diffusers `config.json` tells it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wan_core.config import IMAGE_LENGTH, PATCH_SIZE, TEXT_LENGTH, VAE_TEMPORAL_STRIDE, check

ROPE_POSITIONS = 1024  # per axis


@dataclass(frozen=True)
class Architecture:
    """Sizes of the transformer; defaults are T2V-1.3B's."""

    hidden_size: int = 1536
    ffn_hidden_size: int = 8960
    num_attention_heads: int = 12
    num_layers: int = 30
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    eps: float = 1e-6
    image_dim: int = 0  # of the image embeddings of an image-to-video model; 0: text-to-video

    def __post_init__(self) -> None:
        heads, hidden = self.num_attention_heads, self.hidden_size
        check(
            heads > 0 and hidden % heads == 0 and hidden // heads % 2 == 0,
            f"hidden_size={hidden} does not give num_attention_heads={heads} heads of an even size; "
            f"choose a multiple of {2 * max(heads, 1)}",
        )
        check(self.num_layers >= 1, f"num_layers={self.num_layers} is below 1")
        out, seen = self.out_channels, self.image_dim > 0
        check(
            self.in_channels == out + seen * (VAE_TEMPORAL_STRIDE + out),
            f"in_channels={self.in_channels} beside out_channels={out} and image_dim={self.image_dim}; a text-to-video "
            f"model takes {out} channels, an image-to-video model {2 * out + VAE_TEMPORAL_STRIDE}: noisy latents, a "
            "mask, and the latents of the image",
        )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def named(cls, name: str) -> Architecture:
        """`t2v-1.3B`, `14B` and their like, or the architecture of a Diffusers folder.

        Raises:
            ValueError: neither a known size nor a folder.
        """
        if Path(name).is_dir():
            return cls.from_diffusers(Path(name))
        known = {key.lower(): value for key, value in ARCHITECTURES.items()}
        key = name.lower() if name.lower() in known else f"t2v-{name.lower()}"
        check(key in known, f"model {name!r} is neither a folder nor a size; choose one of {', '.join(ARCHITECTURES)}")
        return known[key]

    @classmethod
    def from_diffusers(cls, model_dir: Path) -> Architecture:
        """Read `<model_dir>/transformer/config.json`.

        Raises:
            ValueError: the folder has no transformer, or one of another kind (image-to-video, other patch size).
        """
        path = model_dir / "transformer" / "config.json"
        check(path.is_file(), f"{path} does not exist; give the folder that WanPipeline.from_pretrained loads")
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for key, expected in (
            ("_class_name", "WanTransformer3DModel"), ("patch_size", list(PATCH_SIZE)), ("cross_attn_norm", True),
            ("qk_norm", "rms_norm_across_heads"), ("pos_embed_seq_len", None),
        ):  # fmt: skip
            found = config.get(key, expected)
            check(found == expected, f"{path}: {key}={found!r}, but this model is built for {expected!r}")
        heads = config["num_attention_heads"]
        hidden, image_dim = heads * config["attention_head_dim"], config.get("image_dim") or 0
        added = config.get("added_kv_proj_dim")
        check(
            added == (hidden if image_dim else None),
            f"{path}: added_kv_proj_dim={added} beside image_dim={image_dim or None}; this model attends to an image "
            f"with added_kv_proj_dim={hidden} and an image_dim, or with neither to none",
        )
        return cls(
            hidden_size=hidden, ffn_hidden_size=config["ffn_dim"],
            num_attention_heads=heads, num_layers=config["num_layers"], in_channels=config["in_channels"],
            out_channels=config["out_channels"], text_dim=config["text_dim"], freq_dim=config["freq_dim"],
            eps=config["eps"], image_dim=image_dim,
        )  # fmt: skip

    def to_diffusers(self) -> dict[str, Any]:
        """Keyword arguments of diffusers' `WanTransformer3DModel`."""
        return {
            "patch_size": list(PATCH_SIZE), "num_attention_heads": self.num_attention_heads,
            "attention_head_dim": self.head_dim, "in_channels": self.in_channels, "out_channels": self.out_channels,
            "text_dim": self.text_dim, "freq_dim": self.freq_dim, "ffn_dim": self.ffn_hidden_size,
            "num_layers": self.num_layers, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads",
            "eps": self.eps, "rope_max_seq_len": ROPE_POSITIONS, "image_dim": self.image_dim or None,
            "added_kv_proj_dim": self.hidden_size if self.image_dim else None,
        }  # fmt: skip

    def check_images(self, images: Sequence[str], num_videos: int) -> None:
        """Whether the videos of an image-to-video model have a first frame each, and those of others none.

        Raises:
            ValueError: they do not, or an image is no file.
        """
        if not self.image_dim:
            check(not images, f"images={tuple(images)} are given to a text-to-video model, which takes none; omit them")
            return
        check(
            len(images) == num_videos,
            f"{len(images)} images are given for {num_videos} videos of an image-to-video model, which needs the first "
            "frame of each; give one image file per prompt (sample.images, samples.images or --image)",
        )
        missing = [name for name in images if not Path(name).is_file()]
        check(not missing, f"image {', '.join(missing)} does not exist; give a .png, .jpg or .webp file")

    def check_first_frames(self, given: bool, dataset: Path) -> None:
        """Whether a dataset holds first frames if this model needs them, and none otherwise.

        Raises:
            ValueError: the dataset was made for a model of the other kind.
        """
        kinds = ("text-to-video", "image-to-video")
        check(
            given == bool(self.image_dim),
            f"dataset {dataset} was encoded for {kinds[given]} (it holds {'' if given else 'no '}first frames), but "
            f"the model is {kinds[not given]} (image_dim={self.image_dim}); encode the videos with this model's "
            f"folder, or take a model that is {kinds[given]}",
        )

    def forward_flops(self, num_tokens: int) -> int:
        """Model FLOPs of one sample's forward through the blocks (embedders and head, under 1 %, left out)."""
        s, h, f = num_tokens, self.hidden_size, self.ffn_hidden_size
        t = TEXT_LENGTH + (IMAGE_LENGTH if self.image_dim else 0)
        projections = 2 * s * (4 * h * h + 2 * h * h + 2 * h * f) + 2 * t * 2 * h * h
        return self.num_layers * (projections + 4 * s * s * h + 4 * s * t * h)

    def training_flops(self, num_tokens: int) -> int:
        """Forward and backward of one sample; recomputation is not counted."""
        return 3 * self.forward_flops(num_tokens)


T2V_1_3B = Architecture()
T2V_14B = Architecture(hidden_size=5120, ffn_hidden_size=13824, num_attention_heads=40, num_layers=40)
I2V_14B = replace(T2V_14B, in_channels=36, image_dim=1280)  # channels: noise 16, mask 4, latents of the image 16
ARCHITECTURES = {"t2v-1.3B": T2V_1_3B, "t2v-14B": T2V_14B, "i2v-14B": I2V_14B}

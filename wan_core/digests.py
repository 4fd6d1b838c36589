"""Digests of what may be large: a file's bytes, and the encoders of a Diffusers folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wan_core.memory import recall, remember
from wan_core.records import digest, file_digest

CACHED_BYTES = 8 << 20  # below it, hashing is as fast as looking up
# Keys of a config.json that say who wrote it, not what the network computes.
UNBEARING_KEYS = ("transformers_version", "torch_dtype", "dtype")


def cached_file_digest(path: Path) -> str:
    """sha256 (hex) of a file's bytes; of large files remembered by path, size, inode and time of change."""
    status = path.stat()
    if status.st_size < CACHED_BYTES:
        return file_digest(path)
    key, state = f"sha256 {path.resolve()}", f"{status.st_size} {status.st_ino} {status.st_mtime_ns}"
    known, _, value = recall([key]).get(key, "").rpartition(" ")
    if known == state:
        return value
    value = file_digest(path)
    remember([(key, f"{state} {value}")])
    return value


def encoder_identity(model: Path) -> dict[str, str]:
    """Names and digests of the VAE, text encoder and tokenizer of a Diffusers folder, and of what looks at images
    in an image-to-video model's.

    Two folders with equal identities encode alike: a dataset made with one trains a model of the other.

    Raises:
        ValueError: the folder lacks one of them.
    """
    tokenizer = model / "tokenizer"
    if not tokenizer.is_dir() or not any(tokenizer.iterdir()):
        raise ValueError(f"model folder {model} has no tokenizer/; {_REMEDY}")
    vae, text = _config(model / "vae"), _config(model / "text_encoder")
    identity = {
        "vae": vae["_class_name"],
        "vae_digest": _weights_digest(model / "vae", vae),
        "text_encoder": text["architectures"][0],
        "text_encoder_digest": _weights_digest(model / "text_encoder", text),
        "tokenizer_digest": digest(_file_digests(p for p in tokenizer.iterdir() if p.is_file())),
    }
    if sees_images(model):
        image, processor = _config(model / "image_encoder"), model / "image_processor" / "preprocessor_config.json"
        if not processor.is_file():
            raise ValueError(f"model folder {model} has no image_processor/{processor.name}; {_REMEDY}")
        identity |= {
            "image_encoder": image["architectures"][0],
            "image_encoder_digest": _weights_digest(model / "image_encoder", image),
            "image_processor_digest": file_digest(processor),
        }
    return identity


IMAGE_PARTS = ("image_encoder", "image_processor")  # what a folder holds beside the others where it does


def sees_images(model: Path) -> bool:
    """Whether a Diffusers folder is that of an image-to-video model, whose transformer attends to an image."""
    path = model / "transformer" / "config.json"
    return path.is_file() and bool(json.loads(path.read_text(encoding="utf-8")).get("image_dim"))


_REMEDY = "give the folder of a whole Diffusers WAN model, the one that holds model_index.json"


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"model folder {folder.parent} has no {folder.name}/config.json; {_REMEDY}")
    return json.loads(path.read_text(encoding="utf-8"))


def _weights_digest(folder: Path, config: dict[str, Any]) -> str:
    weights = _file_digests(folder.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"{folder} holds no .safetensors; save it with save_pretrained(safe_serialization=True)")
    kept = {key: value for key, value in config.items() if not key.startswith("_") and key not in UNBEARING_KEYS}
    return digest({"weights": weights, "config": kept})


def _file_digests(paths: Any) -> dict[str, str]:
    return {path.name: cached_file_digest(path) for path in sorted(paths)}

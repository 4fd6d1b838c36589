import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.data.test_shards import make_encoded, sample
from wan_core.config import IndexConfig, ShardConfig
from wan_core.data import card, index, shards
from wan_core.digests import encoder_identity
from wan_core.encode.vae import load_vae
from wan_core.records import IndexRecord, ShardRecord, find_record

CONFIG = IndexConfig(workers=1)


@pytest.fixture
def sharded(tmp_path: Path, tiny_model: Path) -> ShardRecord:
    encoded = replace(make_encoded(tmp_path / "encode", 30), encoder=encoder_identity(tiny_model))
    return shards.run(ShardConfig(val_share=0.3, max_samples=8), encoded, tmp_path / "shard")


def test_the_card_counts_and_shows(sharded: ShardRecord, tiny_model: Path, tmp_path: Path) -> None:
    record = index.run(CONFIG, sharded, tmp_path / "cats-1234", model=tiny_model)
    page = (record.path / "card.md").read_text()
    cells = {row[0]: row[1:] for row in re.findall(r"^\| ([\w ]+) \| ([\w.,]+)(?: seconds)? \| ([\w.,]+)", page, re.M)}
    assert page.startswith("# cats-1234\n\n30 clips of 1 size, ")
    assert cells["clips"] == tuple(str(record.num_samples[split]) for split in ("train", "val"))
    tokens = sum(latents.shape[1] * (latents.shape[2] // 2) * 2 for latents in (sample(i).latents for i in range(30)))
    assert sum(int(cell) for cell in cells["tokens"]) == tokens
    assert "| too short | 1 |" in page and f"| vae digest | {sharded.encoder['vae_digest'][:16]} |" in page
    for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page):
        with Image.open(record.path / name) as picture:
            assert min(picture.size) > 100
    assert "First frames of 12 training clips" in page


def test_without_a_model_the_card_has_no_pictures_of_clips(sharded: ShardRecord, tmp_path: Path) -> None:
    record = index.run(CONFIG, sharded, tmp_path / "index")
    assert not (record.path / "contact_sheet.png").exists() and "contact" not in (record.path / "card.md").read_text()


def test_pictures_are_added_to_what_was_indexed_without_a_model(
    sharded: ShardRecord, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = index.run(CONFIG, sharded, tmp_path / "index")
    database = (plain.path / ".nv-meta" / "index.sqlite").stat().st_mtime_ns

    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(card, "page", interrupted)
        index.run(CONFIG, sharded, tmp_path / "index", model=tiny_model)
    assert find_record(IndexRecord, plain.path, plain.fingerprint)  # an interrupted one is whole, and tried again
    shown = index.run(CONFIG, sharded, tmp_path / "index", model=tiny_model)
    assert shown.files.keys() == plain.files.keys() | {"contact_sheet.png"} and shown.fingerprint == plain.fingerprint
    assert "First frames of 12 training clips" in (shown.path / "card.md").read_text()
    assert (plain.path / ".nv-meta" / "index.sqlite").stat().st_mtime_ns == database
    assert index.run(CONFIG, sharded, tmp_path / "index") == shown == find_record(IndexRecord, plain.path, None)


def test_another_vae_is_refused(sharded: ShardRecord, tiny_model: Path, tmp_path: Path) -> None:
    other = replace(sharded, encoder={**sharded.encoder, "vae_digest": "0" * 64})
    with pytest.raises(ValueError, match="was encoded with another VAE than"):
        index.run(CONFIG, other, tmp_path / "index", model=tiny_model)


def test_the_first_latent_alone_gives_the_first_frame(tiny_model: Path) -> None:
    vae, latents = load_vae(tiny_model, "float32", "cpu"), torch.randn(16, 3, 4, 6)
    whole = ((vae.decode(latents[None])[0, :, 0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    assert abs(card._first_frame(vae, latents).astype(int) - whole).max() <= 1  # of 255: other sums, other roundings


def test_the_card_names_the_commonest_reasons_and_counts_the_others(tmp_path: Path) -> None:
    rows = [{"path": "x.mp4", "reason": f"meta.jsonl, row {row}: reason {row // 3}"} for row in range(75)]
    rows += [{"path": "y.mp4", "reason": f"caption file a|{row}.txt: a|b: c"} for row in range(1000)]
    (tmp_path / "quarantine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = re.findall(r"^\| (.*) \| ([\d,]+) \|$", card.left_out(tmp_path), re.M)
    assert table[0] == ("a\\|b", "1,000") and table[1] == ("reason 0", "3")
    assert len(table) == 21 and table[-1] == ("6 other reasons", "18")

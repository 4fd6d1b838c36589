import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from wan_core.config import STORED_TEXTS, EncodeConfig, ShardConfig, Size
from wan_core.data import shards
from wan_core.data.samples import decode_member
from wan_core.encode import stage
from wan_core.encode.__main__ import main
from wan_core.encode.text import load_text_encoder
from wan_core.encode.vae import Vae, load_vae
from wan_core.encode.video import read_video, write_video
from wan_core.records import EncodeRecord, find_record

CONFIG = EncodeConfig(
    sizes=(Size(32, 48), Size(48, 32)), max_frames=9, text_dtype="float32", clips_per_part=3, max_quarantine_share=0.5
)
DEVICE = "cpu"


def add_clip(folder: Path, name: str, seed: int, num_frames: int = 9, caption: str | None = "a red circle") -> Path:
    pixels = np.random.default_rng(seed).integers(0, 255, (num_frames, 2, 3, 3), dtype=np.uint8)
    path = folder / name
    write_video(path, pixels.repeat(16, axis=1).repeat(16, axis=2), 16)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def plan(config: EncodeConfig, videos: Path, model: Path, output_dir: Path) -> stage.EncodePlan:
    return stage.plan(config, stage.look(config, videos, model), output_dir)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    for i in range(7):
        add_clip(folder, f"good{i}.mp4", seed=i, num_frames=6 + i, caption=f"a red circle moves left {i}")
    return folder


def add_bad_clips(folder: Path) -> dict[str, str]:
    """Name -> reason expected in the quarantine."""
    raw = add_clip(folder, "truncated.mp4", seed=50).read_bytes()
    (folder / "truncated.mp4").write_bytes(raw[: len(raw) // 2])
    add_clip(folder, "two_frames.mp4", seed=51, num_frames=2)
    add_clip(folder, "captionless.mp4", seed=52, caption=None)
    for name, raw in (("empty", b""), ("text", b"this is no video")):
        (folder / f"{name}.mp4").write_bytes(raw)
        (folder / f"{name}.txt").write_text("a caption")
    return {
        "truncated.mp4": "not a readable video",
        "two_frames.mp4": "too short: 2 frames",
        "captionless.mp4": "no caption",
        "empty.mp4": "empty file",
        "text.mp4": "not a readable video",
    }


def read_samples(record: EncodeRecord) -> dict[str, dict[str, object]]:
    """key -> extension -> decoded member, over all parts."""
    found: dict[str, dict[str, object]] = {}
    for folder in record.parts:
        with tarfile.open(folder / "part.tar") as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                found.setdefault(key, {})[kind] = decode_member(member.name, tar.extractfile(member).read())
    return found


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_samples_hold_what_the_encoders_give(videos: Path, tiny_model: Path, tmp_path: Path) -> None:
    record = stage.run(CONFIG, videos, tiny_model, tmp_path / "out")
    samples = read_samples(record)
    assert record.num_clips == len(samples) == 7 and record.num_quarantined == 0 and len(record.parts) == 3
    vae, text = load_vae(tiny_model, "float32", DEVICE), load_text_encoder(tiny_model, torch.float32, DEVICE)
    for line in lines(record.path / "clips.jsonl"):
        sample = samples[line["key"]]
        frames = read_video(videos / line["path"], CONFIG)
        video = torch.from_numpy(frames / 127.5 - 1).float().permute(3, 0, 1, 2)[None]
        torch.testing.assert_close(sample["pth"], vae.encode(video)[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(sample["pickle"], text.encode([line["caption"]])[0])
        info = sample["json"]
        assert info["caption"] == line["caption"] and info["digest"] == line["digest"]
        assert (info["frames"], info["height"], info["width"]) == frames.shape[:3]
        assert info["encoder"] == record.encoder
    for name, caption in zip(STORED_TEXTS, ("", CONFIG.negative_prompt), strict=True):
        assert torch.equal(torch.load(record.path / name, weights_only=True), text.encode([caption])[0])


def test_a_finished_run_takes_away_what_killed_workers_left(videos: Path, tiny_model: Path, tmp_path: Path) -> None:
    left = tmp_path / "out" / "parts" / ".0123456789ab.another-host.17-140000"
    left.mkdir(parents=True)
    (left / "part.tar").write_bytes(bytes(512))
    record = stage.run(CONFIG, videos, tiny_model, tmp_path / "out")
    assert not left.exists() and len(list(left.parent.iterdir())) == len(record.parts) == 3


def test_bad_clips_are_quarantined_and_the_rest_completes(videos: Path, tiny_model: Path, tmp_path: Path) -> None:
    expected = add_bad_clips(videos)
    record = stage.run(CONFIG, videos, tiny_model, tmp_path / "out")
    reasons = {row["path"]: row["reason"] for row in lines(record.path / "quarantine.jsonl")}
    assert reasons.keys() == expected.keys() and record.num_quarantined == len(expected)
    assert all(reasons[name].startswith(reason) for name, reason in expected.items()), reasons
    assert record.num_clips == len(read_samples(record)) == 7


def test_too_many_bad_clips_fail_with_the_reasons(videos: Path, tiny_model: Path, tmp_path: Path) -> None:
    add_bad_clips(videos)
    strict = replace(CONFIG, max_quarantine_share=0.2)
    with pytest.raises(ValueError, match=r"5 of 12 clips are quarantined \(2 x not a readable video; .*share=0.2"):
        stage.run(strict, videos, tiny_model, tmp_path / "out")
    assert len(lines(tmp_path / "out" / "quarantine.jsonl")) == 5
    assert not (tmp_path / "out" / "record.json").exists()
    assert stage.run(CONFIG, videos, tiny_model, tmp_path / "out").num_clips == 7  # and nothing is encoded twice
    assert not plan(CONFIG, videos, tiny_model, tmp_path / "out").parts


def test_clips_whose_latents_are_not_finite_are_quarantined(videos: Path, tiny_model: Path, tmp_path: Path) -> None:
    encoders = stage.load_encoders(CONFIG, tiny_model, DEVICE)
    encoders.vae.mean[0, 3] = torch.nan
    planned = plan(CONFIG, videos, tiny_model, tmp_path / "out")
    part = stage.encode_part(CONFIG, planned.parts[0], videos, tmp_path / "out", encoders)
    assert (part.num_clips, part.num_quarantined) == (0, 3)
    assert {row["reason"] for row in lines(part.path / "quarantine.jsonl")} == {"latents are not finite"}


def test_rerun_touches_only_new_clips(videos: Path, tiny_model: Path, tmp_path: Path) -> None:
    add_bad_clips(videos)
    out = tmp_path / "out"
    first = stage.run(CONFIG, videos, tiny_model, out)
    before = {path: path.stat().st_mtime_ns for path in (out / "parts").rglob("*")}
    assert stage.run(CONFIG, videos, tiny_model, out) == first
    add_clip(videos, "new.mp4", seed=60)
    (videos / "good0.mp4").rename(videos / "renamed.mp4")
    (videos / "good0.txt").rename(videos / "renamed.txt")
    (videos / "good1.mp4").unlink()
    planned = plan(CONFIG, videos, tiny_model, out)
    assert [[clip.path for clip in part.clips] for part in planned.parts] == [["new.mp4"]]
    second = stage.run(CONFIG, videos, tiny_model, out)
    assert second.num_clips == 7 and second.fingerprint != first.fingerprint
    assert second.num_quarantined == first.num_quarantined
    assert {path: path.stat().st_mtime_ns for path in before} == before
    names = {line["path"] for line in lines(out / "clips.jsonl")}
    assert {"new.mp4", "renamed.mp4"} < names and "good1.mp4" not in names
    assert second.fingerprint == stage.look(CONFIG, videos, tiny_model).fingerprint
    assert find_record(EncodeRecord, out, second.fingerprint) == second


def encode_planned(dataset: stage.Dataset, videos: Path, model: Path, out: Path) -> tuple[list[str], EncodeRecord]:
    """Encode what is missing of a dataset: the paths of it, and the record."""
    planned = stage.plan(CONFIG, dataset, out)
    encoders = stage.load_encoders(CONFIG, model, DEVICE)
    for part in planned.parts:
        stage.encode_part(CONFIG, part, videos, out, encoders)
    return [clip.path for part in planned.parts for clip in part.clips], stage.finish(CONFIG, planned, out)


def test_clips_that_could_not_be_read_are_tried_again(videos: Path, tiny_model: Path, tmp_path: Path) -> None:
    (videos / "broken.mp4").write_bytes(b"this is no video")
    (videos / "broken.txt").write_text("a caption")
    out, dataset = tmp_path / "out", stage.look(CONFIG, videos, tiny_model)
    (videos / "good1.mp4").rename(tmp_path / "good1.mp4")  # between plan and read the mount is gone
    (videos / "good4.mp4").rename(tmp_path / "good4.mp4")
    (videos / "good4.mp4").mkdir()  # FFmpeg opens it, and fails as it does with a damaged file
    tried, first = encode_planned(dataset, videos, tiny_model, out)
    assert len(tried) == 8 and (first.num_clips, first.num_quarantined) == (5, 3)
    rows = {row.pop("path"): row for row in lines(out / "quarantine.jsonl")}
    assert rows["good1.mp4"] == {"reason": "cannot be read: No such file or directory", "retry": True}
    assert rows["good4.mp4"] == {"reason": "cannot be read: Is a directory", "retry": True}
    assert rows["broken.mp4"].keys() == {"reason"}

    before = {path: path.stat().st_mtime_ns for path in (out / "parts").rglob("*")}
    for _ in range(2):  # still gone: the clips share a part, which is then made anew
        tried, again = encode_planned(dataset, videos, tiny_model, out)
        assert tried == ["good1.mp4", "good4.mp4"]
        assert again.fingerprint == first.fingerprint != dataset.fingerprint
    (videos / "good4.mp4").rmdir()
    (tmp_path / "good4.mp4").rename(videos / "good4.mp4")
    tried, fewer = encode_planned(dataset, videos, tiny_model, out)
    assert tried == ["good1.mp4", "good4.mp4"] and fewer.num_clips == 6
    (tmp_path / "good1.mp4").rename(videos / "good1.mp4")
    whole = stage.run(CONFIG, videos, tiny_model, out)  # a plain run
    assert (whole.num_clips, whole.num_quarantined) == (7, 1) and whole.fingerprint == dataset.fingerprint
    assert len({first.fingerprint, fewer.fingerprint, whole.fingerprint}) == 3  # later stages see new clips
    assert [row["path"] for row in lines(out / "quarantine.jsonl")] == ["broken.mp4"]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    state = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert stage.run(CONFIG, videos, tiny_model, out) == whole
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"} == {
        path: time for path, time in state.items() if path.name != ".lock"
    }


def test_too_many_clips_that_could_not_be_read_fail_until_they_can(
    videos: Path, tiny_model: Path, tmp_path: Path
) -> None:
    dataset = stage.look(CONFIG, videos, tiny_model)
    videos.rename(tmp_path / "unmounted")
    videos.mkdir()
    with pytest.raises(ValueError, match=r"7 x cannot be read.*; 7 of them could not be read .*: run again"):
        encode_planned(dataset, videos, tiny_model, tmp_path / "out")
    videos.rmdir()
    (tmp_path / "unmounted").rename(videos)
    assert stage.run(CONFIG, videos, tiny_model, tmp_path / "out").num_clips == 7


def test_altered_part_is_encoded_again(videos: Path, tiny_model: Path, tmp_path: Path) -> None:
    record = stage.run(CONFIG, videos, tiny_model, tmp_path / "out")
    tar = record.parts[1] / "part.tar"
    raw = tar.read_bytes()
    tar.write_bytes(raw[:-512])
    shutil.rmtree(record.parts[0])
    again = stage.run(CONFIG, videos, tiny_model, tmp_path / "out")
    assert again.fingerprint == record.fingerprint and tar.read_bytes() == raw
    assert again.files.keys() == record.files.keys()


def test_fingerprints_follow_content_not_place(videos: Path, tiny_model: Path, tmp_path: Path) -> None:
    base = stage.look(CONFIG, videos, tiny_model).fingerprint
    moved = shutil.copytree(videos, tmp_path / "moved")
    model = shutil.copytree(tiny_model, tmp_path / "model")
    elsewhere = replace(CONFIG, clips_per_part=50, max_quarantine_share=0.9)
    assert stage.look(elsewhere, moved, model).fingerprint == base
    assert stage.look(replace(CONFIG, max_frames=5), moved, model).fingerprint != base
    (moved / "good0.txt").write_text("another caption")
    assert stage.look(CONFIG, moved, model).fingerprint != base
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert stage.settings_fingerprint(CONFIG, model) != stage.settings_fingerprint(CONFIG, tiny_model)


@pytest.mark.parametrize("missing", ["vae", "text_encoder", "tokenizer", "vae/diffusion_pytorch_model.safetensors"])
def test_missing_model_parts_are_named_first(videos: Path, tiny_model: Path, tmp_path: Path, missing: str) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    path = model / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ValueError, match=missing.split("/")[0]):
        plan(CONFIG, videos, model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_frames_mode_encodes_images_and_first_frames(videos: Path, tiny_model: Path, tmp_path: Path) -> None:
    Image.fromarray(np.full((100, 150, 3), 200, np.uint8)).save(videos / "image.png")
    (videos / "image.json").write_text('{"caption": "a red square"}')
    record = stage.run(replace(CONFIG, mode="frames"), videos, tiny_model, tmp_path / "out")
    samples = read_samples(record)
    assert len(samples) == 8 and {sample["pth"].shape for sample in samples.values()} == {(16, 1, 4, 6)}


def test_clips_of_one_shape_share_forwards(
    videos: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in 16 bits on a GPU: batches fill in the order of the clips, whatever lies between them."""
    for number in (3, 5):  # shorter than their neighbours
        add_clip(videos, f"good{number}a.mp4", seed=50 + number, num_frames=5)
    (videos / "good4a.mp4").write_bytes(b"no video")
    (videos / "good4a.txt").write_text("a red circle")
    config = replace(CONFIG, clips_per_part=100)
    expected = stage.run(config, videos, tiny_model, tmp_path / "one")
    sizes: list[tuple[int, ...]] = []
    encode = Vae.encode

    def noted(vae: Vae, video: torch.Tensor) -> torch.Tensor:
        sizes.append((len(video), video.shape[2]))
        return encode(vae, video)

    monkeypatch.setattr(Vae, "encode", noted)
    monkeypatch.setattr(Vae, "batch_size", lambda vae, shape: 3)
    record = stage.run(config, videos, tiny_model, tmp_path / "batched")
    assert sizes == [(3, 5), (3, 9), (2, 5), (1, 9)] and record.num_quarantined == 1
    found, alone = read_samples(record), read_samples(expected)
    assert found.keys() == alone.keys() and len(found) == 9
    for key, sample in alone.items():
        assert found[key]["json"] == sample["json"] and torch.equal(found[key]["pickle"], sample["pickle"])
        torch.testing.assert_close(found[key]["pth"], sample["pth"], rtol=1e-5, atol=1e-5)


def test_a_batch_that_memory_does_not_suffice_for_is_encoded_singly(
    videos: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, encode = replace(CONFIG, clips_per_part=100), Vae.encode
    expected = stage.run(config, videos, tiny_model, tmp_path / "one")

    def small(vae: Vae, video: torch.Tensor, most: int) -> torch.Tensor:
        if len(video) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 90.00 GiB")
        return encode(vae, video)

    monkeypatch.setattr(Vae, "batch_size", lambda vae, shape: 3)
    monkeypatch.setattr(Vae, "encode", lambda vae, video: small(vae, video, 1))
    record = stage.run(config, videos, tiny_model, tmp_path / "singly")
    assert capsys.readouterr().out.count("no memory on the GPU for 3 clips at once") == 1
    found, alone = read_samples(record), read_samples(expected)
    assert found.keys() == alone.keys() and all(torch.equal(found[key]["pth"], alone[key]["pth"]) for key in alone)
    monkeypatch.setattr(Vae, "encode", lambda vae, video: small(vae, video, 0))
    with pytest.raises(torch.OutOfMemoryError):  # a single clip's is its part's to bear
        stage.run(config, videos, tiny_model, tmp_path / "none")


def test_command_writes_shards(videos: Path, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--model", str(tiny_model), "--max_frames", "9", "--device", "cpu", "--text_dtype", "float32"]
    folders = ["--video_folder", str(videos), "--output-dir", str(out)]
    record = main([*folders, *options, "--height", "32", "--width", "48", "--center-crop"])
    assert sorted(path.name for path in (out / "shards").glob("*.tar")) == ["train-all.tar"]
    assert sum(record.num_samples.values()) == 7
    with pytest.raises(ValueError, match="--height=32 and --width=None go together"):
        main([*folders, *options, "--height", "32"])


def test_shards_do_not_depend_on_how_clips_were_grouped(videos: Path, tiny_model: Path, tmp_path: Path) -> None:
    found = []
    for clips_per_part in (1, 3, 100):
        config = replace(CONFIG, clips_per_part=clips_per_part)
        encoded = stage.run(config, videos, tiny_model, tmp_path / f"out{clips_per_part}")
        record = shards.run(ShardConfig(val_share=0.2, max_samples=3), encoded, tmp_path / f"shard{clips_per_part}")
        found.append({name: (record.path / name).read_bytes() for name in record.files})
    assert len(found[0]) >= 4 and found[0] == found[1] == found[2]


def test_clips_in_a_bucket_encode_as_on_disk(videos: Path, tiny_model: Path, tmp_path: Path, s3: str) -> None:
    fsspec.filesystem("s3").put(f"{videos}/", "bucket/encode/", recursive=True)
    local = stage.run(CONFIG, videos, tiny_model, tmp_path / "local")
    remote = stage.run(CONFIG, f"{s3}/encode", tiny_model, tmp_path / "remote")
    assert remote.num_clips == 7 and remote.num_quarantined == 0

    def by_caption(record: EncodeRecord) -> dict[str, torch.Tensor]:
        return {sample["json"]["caption"]: sample["pth"] for sample in read_samples(record).values()}

    expected, found = by_caption(local), by_caption(remote)
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
    assert stage.run(CONFIG, f"{s3}/encode", tiny_model, tmp_path / "remote") == remote

"""The same clips from this disk, from a real S3 server on localhost, and from a store that keeps no digests."""

from __future__ import annotations

import os
from pathlib import Path

import fsspec
import pytest

from wan_core.data import folder as folder_module
from wan_core.data.clips import scan
from wan_core.data.folder import ChangedError, RemoteFolder, checked_folder, open_folder
from wan_core.records import file_digest

FILES = {
    "a.mp4": b"first", "a.txt": b"eins", "sub/b ü#?.webm": b"second", "sub/b ü#?.json": b'{"caption": "zwei"}',
    "c.mkv": b"third", "metadata.jsonl": b'{"file_name": "c.mkv", "caption": "drei", "end_frame": 8}\n',
    "lonely.mov": b"no caption", ".hidden/d.mp4": b"4", ".hidden.mp4": b"5",
}  # fmt: skip


def upload(url: str, files: dict[str, bytes] = FILES) -> str:
    store, root = fsspec.url_to_fs(url)
    for name, content in files.items():
        store.pipe(f"{root}/{name}", content)
    return url


def contents(found: object) -> list[tuple[str, str, int | None]]:
    return [(clip.path, clip.caption, clip.end_frame) for clip in found.clips]  # type: ignore[attr-defined]


def test_a_bucket_scans_like_a_folder(tmp_path: Path, s3: str) -> None:
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    local, remote = scan(tmp_path), scan(upload(f"{s3}/clips/v1"))
    assert contents(local) == [("a.mp4", "eins", None), ("c.mkv", "drei", 8), ("sub/b ü#?.webm", "zwei", None)]
    assert contents(remote) == contents(local) and remote.quarantined == local.quarantined
    assert local.clips[0].digest == file_digest(tmp_path / "a.mp4")
    upload(f"{s3}/clips/v2")
    assert [clip.key for clip in scan(f"{s3}/clips/v2").clips] == [clip.key for clip in remote.clips]
    upload(f"{s3}/clips/v2", {"a.mp4": b"other"})
    differing = [clip.path for clip in scan(f"{s3}/clips/v2").clips if clip.key not in {c.key for c in remote.clips}]
    assert differing == ["a.mp4"]


def test_objects_are_digested_without_reading_and_read_once(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = upload(f"{s3}/read", {f"{i}.mp4": b"x" * i for i in range(5)})
    folder, read = RemoteFolder(url), list[str]()
    get = folder.store.get_file
    monkeypatch.setattr(folder.store, "get_file", lambda path, *rest: (read.append(path), get(path, *rest)))
    monkeypatch.setattr(folder.store, "open", None)
    monkeypatch.setattr(folder.store, "cat", None)
    files = sorted(folder.files())
    digests = list(folder.digests(files))
    assert len(set(digests)) == 5 and not read
    for file, digest in zip(files, digests, strict=True):
        for _ in range(2):  # two clips of one file
            with folder.local(file.name, str(digest)) as path:
                assert path.read_bytes() == b"x" * file.size
    assert len(read) == 5


def test_downloads_have_no_name_and_end_with_their_reader(s3: str, tmp_path: Path) -> None:
    url = upload(f"{s3}/scratch", {"a.mp4": b"abc"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path))
        folder = RemoteFolder(url)
        (file,) = folder.files()
        (digest,) = folder.digests([file])
        with folder.local("a.mp4", str(digest)) as path:
            assert path.read_bytes() == b"abc" and not list(tmp_path.iterdir())
        del folder
        assert not path.exists()


def test_an_object_that_changed_since_the_plan_is_refused(s3: str) -> None:
    url = upload(f"{s3}/changing", {"a.mp4": b"before"})
    folder = RemoteFolder(url)
    (digest,) = folder.digests(list(folder.files()))
    upload(url, {"a.mp4": b"after!"})
    with pytest.raises(ChangedError, match="changed since the run was planned"), folder.local("a.mp4", str(digest)):
        pass
    fsspec.filesystem("s3").rm("bucket/changing/a.mp4")
    with pytest.raises(FileNotFoundError), folder.local("a.mp4", str(digest)):
        pass


def test_a_store_without_digests_is_read_once_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    url = upload("memory://clips", {"a.mp4": b"abc", "a.txt": b"x"})
    reads = []
    first = scan(url)
    monkeypatch.setattr(folder_module.hashlib, "file_digest", lambda *_: reads.append(1))
    assert scan(url) == first and not reads


@pytest.mark.parametrize(
    "url, words",
    [
        ("s3://bucket/none", "does not exist or is empty"),
        ("s3://no-such-bucket/clips", "does not exist|cannot be reached"),
        ("gs://bucket/clips", "cannot be reached.*gcsfs"),
        ("nonsense://bucket", "cannot be reached.*nonsense"),
        ("/no/such/folder", "is not a folder"),
    ],
)
def test_a_wrong_location_is_refused_at_once(s3: str, url: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        checked_folder(url)


def test_links_are_followed_and_loops_reported(tmp_path: Path) -> None:
    inside, elsewhere = tmp_path / "videos", tmp_path / "elsewhere"
    (inside / "deep").mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / "a.mp4").write_bytes(b"1")
    os.symlink(elsewhere, inside / "linked")
    os.symlink(inside, inside / "deep" / "loop")
    os.symlink("self.mp4", inside / "self.mp4")
    os.symlink("gone.mp4", inside / "broken.mp4")
    folder = open_folder(inside)
    assert [file.name for file in folder.files()] == ["linked/a.mp4"]
    assert sorted(name for name, _ in folder.problems()) == ["broken.mp4", "deep/loop", "self.mp4"]

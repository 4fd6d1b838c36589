import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from wan_core.data.clips import Scan, kinds, scan


def make(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    return folder


def captions(found: Scan) -> dict[str, str]:
    return {clip.path: clip.caption for clip in found.clips}


def reasons(found: Scan) -> dict[str, str]:
    return {bad.path: bad.reason for bad in found.quarantined}


def test_sidecars(tmp_path: Path) -> None:
    found = scan(make(tmp_path, {
        "a.mp4": "1", "a.txt": " eins\n",
        "sub/b.MOV": "2", "sub/b.json": '{"caption": "zwei", "start_frame": 4, "end_frame": 9}',
        "c.webm": "3", "c.jsonl": '{"vila_caption": "drei"}\n',
        "d.mkv": "4", "d.json": '"vier"',
        "image.png": "5", "image.txt": "only in frames mode",
        ".hidden.mp4": "6", ".trash/e.mp4": "7", "notes.md": "8",
    }))  # fmt: skip
    assert captions(found) == {"a.mp4": "eins", "c.webm": "drei", "d.mkv": "vier", "sub/b.MOV": "zwei"}
    assert not found.quarantined
    ranges = {clip.path: (clip.start_frame, clip.end_frame) for clip in found.clips}
    assert ranges["sub/b.MOV"] == (4, 9) and ranges["a.mp4"] == (0, None)
    assert captions(scan(tmp_path, "frames"))["image.png"] == "only in frames mode"


ROWS = [
    {"file_name": "a.mp4", "caption": "first half", "start_frame": 0, "end_frame": 9},
    {"file_name": "a.mp4", "caption": "second half", "start_frame": 10, "end_frame": 19},
    {"file_name": "b.mp4", "caption": 'Bär, "quoted"\nand more', "start_frame": None, "end_frame": None},
]


@pytest.mark.parametrize("name", ["meta.json", "metadata.jsonl", "meta.csv", "meta.parquet"])
def test_meta_files(tmp_path: Path, name: str) -> None:
    make(tmp_path, {"a.mp4": "1", "b.mp4": "2", "c.mp4": "3", "c.txt": "beside"})
    path = tmp_path / name
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif name.endswith("csv"):
        path.write_text(
            "file_name,caption,start_frame,end_frame\na.mp4,first half,0,9\na.mp4,second half,10,19\n"
            'b.mp4,"Bär, ""quoted""\nand more",,\n'
        )
    else:
        path.write_text("\n".join(map(json.dumps, ROWS)) if name.endswith("jsonl") else json.dumps(ROWS))
    found = scan(tmp_path)
    assert [(clip.path, clip.caption, clip.start_frame, clip.end_frame) for clip in found.clips] == [
        ("a.mp4", "first half", 0, 9), ("a.mp4", "second half", 10, 19),
        ("b.mp4", 'Bär, "quoted"\nand more', 0, None), ("c.mp4", "beside", 0, None),
    ]  # fmt: skip
    assert not found.quarantined


def test_what_cannot_be_used_has_a_reason(tmp_path: Path) -> None:
    rows = [
        {"file_name": "gone.mp4", "caption": "x"},
        {"file_name": "../out.mp4", "caption": "x"},
        {"file_name": "blank.mp4", "caption": "  "},
        {"file_name": "range.mp4", "caption": "x", "start_frame": 9, "end_frame": 3},
        {"file_name": "half.mp4", "caption": "x", "start_frame": 1.5},
        {"file_name": "film.avi", "caption": "x"},
    ]
    found = scan(make(tmp_path, {
        "meta.json": json.dumps(rows), "blank.mp4": "1", "range.mp4": "2", "half.mp4": "3", "film.avi": "4",
        "alone.mp4": "5", "broken.mp4": "6", "broken.json": "{", "list.mp4": "7", "list.json": "[1]", "old.gif": "8",
        "one.mp4": "same", "one.txt": "same", "two.mp4": "same", "two.txt": "same", "three.mp4": "same",
        "three.txt": "another caption", "both.mp4": "9", "both.json": '{"caption": "a"}', "both.jsonl": '"b"',
        "fields.mp4": "10", "fields.txt": "plain", "fields.json": '{"width": 9}', "fields.jsonl": "{",
    }))  # fmt: skip
    assert captions(found) == {"fields.mp4": "plain", "one.mp4": "same", "three.mp4": "another caption"}
    expected = {
        "gone.mp4": "does not exist", "../out.mp4": "outside the folder", "blank.mp4": "row 3: no caption",
        "range.mp4": "end_frame=3 is before start_frame=9", "half.mp4": "start_frame=1.5 is not a frame number",
        "film.avi": ".avi is not one of", "old.gif": ".gif is not one of", "alone.mp4": "no caption: no .txt",
        "broken.mp4": "caption file broken.json: Expecting", "list.mp4": "holds a list",
        "both.mp4": "two captions: both.json and both.jsonl differ; keep one",
        "two.mp4": "duplicate: same bytes, caption and frames as one.mp4",
    }  # fmt: skip
    found_reasons = reasons(found)
    assert found_reasons.keys() == expected.keys()
    assert all(part in found_reasons[name] for name, part in expected.items()), found_reasons


def test_each_line_of_a_caption_file_is_a_clip(tmp_path: Path) -> None:
    lines = ['{"caption": "x", "end_frame": 3}', "", '{"caption": "y", "start_frame": 4}', "{", '"whole"']
    found = scan(make(tmp_path, {
        "a.mp4": "1", "a.jsonl": "\n".join(lines), "b.mp4": "2", "b.jsonl": '"x"\n"y"\n', "b.txt": "x",
        "c.mp4": "3", "c.jsonl": "\n",
    }))  # fmt: skip
    assert [(clip.path, clip.caption, clip.start_frame, clip.end_frame) for clip in found.clips] == [
        ("a.mp4", "x", 0, 3), ("a.mp4", "whole", 0, None), ("a.mp4", "y", 4, None),
    ]  # fmt: skip
    said = reasons(found)
    assert said["a.mp4"].startswith("caption file a.jsonl, row 3: it is not JSON: ") and len(said) == 3
    assert said["b.mp4"] == "two captions: b.txt and b.jsonl differ; keep one"
    assert said["c.mp4"] == "caption file c.jsonl: no caption"


def test_reasons_are_counted_without_places_and_details(tmp_path: Path) -> None:
    rows = "".join(f'{{"file_name": "{i}.mp4", "caption": "x"}}\n' for i in range(50))
    sidecars = {f"{i}: b.{kind}": "1" for i in range(9) for kind in ("mp4", "json")}
    found = scan(make(tmp_path, {"metadata.jsonl": rows, "a.mp4": "1", "a.jsonl": '"x"\n{"title": 1}\n', **sidecars}))
    assert kinds(bad.reason for bad in found.quarantined) == [
        ("it lists a file that does not exist", 50), ("it holds a int, not an object with a caption", 9),
        ("no caption", 1),
    ]  # fmt: skip


def test_keys_follow_bytes_caption_and_range(tmp_path: Path) -> None:
    base = {"a.mp4": "1", "a.txt": "eins"}
    keys = [scan(make(tmp_path / str(i), files)).clips[0].key for i, files in enumerate((
        base, {"other/name.mov": "1", "other/name.txt": "eins"}, base | {"a.mp4": "2"}, base | {"a.txt": "zwei"},
        {"a.mp4": "1", "a.json": '{"caption": "eins", "end_frame": 8}'},
    ))]  # fmt: skip
    assert keys[0] == keys[1] and len(set(keys)) == 4


@pytest.mark.parametrize(
    "files, sentence",
    [
        ({"notes.md": ""}, "holds no .mp4"),
        ({"meta.json": "[", "a.mp4": ""}, "meta.json cannot be read"),
        ({"meta.json": "{}", "a.mp4": ""}, "holds a dict, not a list"),
        ({"meta.csv": "name,caption\na.mp4,x\n", "a.mp4": ""}, "it has the columns name, caption"),
        ({"meta.json": '[{"file_name": "a.mp4"}', "a.mp4": ""}, "Expecting ',' or ']'"),
        ({"meta.json": "[] []", "a.mp4": ""}, "Extra data"),
        ({"meta.json": "[" * 100_000 + "]" * 100_000, "a.mp4": ""}, "meta.json cannot be read: .*recursion"),
        ({"meta.json": "[]", "meta.csv": "", "a.mp4": ""}, "meta.csv and meta.json; keep one"),
    ],
)
def test_folders_that_cannot_be_scanned(tmp_path: Path, files: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        scan(make(tmp_path, files))


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        scan(tmp_path / "none")

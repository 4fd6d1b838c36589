import importlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from megatron.energon.flavors.webdataset.sample_decoder import DEFAULT_DECODER

from wan_core.data.samples import ClipInfo, SafeDecoder, Sample, decode_member, write_sample

INFO = ClipInfo(
    caption="ein Bär", digest="0" * 64, start_frame=0, end_frame=None, frames=9, fps=16.0, height=32, width=48,
    mode="video", center_crop=True, tiled=False, vae_dtype="float32", text_dtype="bfloat16", encoder={"vae": "x"},
)  # fmt: skip


def make(key: str = "abc", seed: int = 0) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(7, 32, generator=generator).bfloat16()
    return Sample(key, torch.randn(16, 3, 4, 6, generator=generator), text, INFO)


def tar_bytes(*samples: Sample) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            write_sample(tar, sample)
    return buffer.getvalue()


def members(raw: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_written_samples_are_read_back() -> None:
    sample = make()
    found = {name: decode_member(name, raw) for name, raw in members(tar_bytes(sample)).items()}
    assert list(found) == ["abc.json", "abc.pickle", "abc.pth"]
    assert torch.equal(found["abc.pth"], sample.latents) and found["abc.pth"].dtype == torch.float32
    assert torch.equal(found["abc.pickle"], sample.text_embeds) and found["abc.pickle"].dtype == torch.bfloat16
    assert ClipInfo(**found["abc.json"]) == INFO


def test_bytes_depend_on_values_alone() -> None:
    sample = make()
    whole = torch.zeros(32, 3, 4, 6)
    whole[:16] = sample.latents
    view = Sample("abc", whole[:16], sample.text_embeds.T.contiguous().T, INFO)  # other storage, other strides
    code = "import sys; from tests.data.test_samples import *; sys.stdout.buffer.write(tar_bytes(make()))"
    other = os.popen(f"{sys.executable} -c '{code}'", "r").buffer.read()  # other addresses and hash seeds
    assert tar_bytes(sample) == tar_bytes(view) == other


def test_plain_loaders_read_the_members(tmp_path: Path) -> None:
    """What other WebDataset readers (Energon's default decoder, Megatron-Bridge's WAN loader) do."""
    (tmp_path / "x.tar").write_bytes(tar_bytes(make("a"), make("b", 1)))
    first, second = webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False).decode()
    assert (first["__key__"], second["__key__"]) == ("a", "b")
    assert torch.equal(second["pth"], make(seed=1).latents)
    assert torch.equal(second["pickle"], make(seed=1).text_embeds)
    assert second["json"]["caption"] == INFO.caption


def test_tensors_pickled_by_others_are_read() -> None:
    for tensor in (torch.randn(5, 4), torch.randn(4, 5).T, torch.arange(6).bfloat16(), torch.randn(0, 3)):
        for protocol in range(3, 6):
            assert torch.equal(decode_member("a.pickle", pickle.dumps(tensor, protocol)), tensor)


class Call:
    """Pickles as a call of anything, which plain unpickling executes."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def torch_saved(value: Any, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def hostile_members(marker: Path) -> dict[str, tuple[str, bytes]]:
    touch, load = Call(os.system, f"touch {marker}"), torch.storage._load_from_bytes
    return {
        "os.system": ("a.pickle", pickle.dumps(touch)),
        "eval": ("a.pickle", pickle.dumps(Call(eval, f"open({str(marker)!r}, 'w')"))),
        "import": ("a.pickle", pickle.dumps(Call(importlib.import_module, "os"))),
        "nested pickle": ("a.pickle", pickle.dumps(Call(load, pickle.dumps(touch)))),
        "nested torch.save": ("a.pickle", pickle.dumps(Call(load, torch_saved(touch, zipped=True)))),
        "nested legacy": ("a.pickle", pickle.dumps(Call(load, torch_saved(touch, zipped=False)))),
        "inside a rebuild": ("a.pickle", pickle.dumps(Call(
            torch._utils._rebuild_tensor_v2, torch.zeros(2)._typed_storage(), 0, (2,), (1,), False, OrderedDict(x=touch)
        ))),
        "pth": ("a.pth", torch_saved(touch, zipped=True)),
        "legacy pth": ("a.pth", torch_saved(touch, zipped=False)),
        "plain pickle as pth": ("a.pth", pickle.dumps(touch)),
    }  # fmt: skip


@pytest.mark.parametrize("name", hostile_members(Path()))
def test_hostile_members_are_refused_unexecuted(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "executed"
    member, raw = hostile_members(marker)[name]
    with pytest.raises(ValueError, match=r"shard member 'a.p\w+' is refused"):
        decode_member(member, raw)
    assert not marker.exists()


def test_hostile_pickles_do_execute_elsewhere(tmp_path: Path) -> None:
    """The examples are real: Python's own unpickling runs them. In a fresh Python, since megatron-core disarms ours."""
    # The nested ones name torch's loader, for which megatron-core, once imported, writes its own name.
    names = ("os.system", "eval", "inside a rebuild")
    for number, name in enumerate(names):
        (tmp_path / f"{number}.raw").write_bytes(hostile_members(tmp_path / str(number))[name][1])
    code = (
        "import contextlib, pathlib, pickle, sys\n"
        "for path in pathlib.Path(sys.argv[1]).glob('*.raw'):\n"
        "    with contextlib.suppress(Exception):\n"  # some fail afterwards: a touch gives no tensor
        "        pickle.loads(path.read_bytes())\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert [name for number, name in enumerate(names) if not (tmp_path / str(number)).exists()] == []


def test_nothing_can_be_set_on_what_a_pickle_may_name() -> None:
    """BUILD gives the object below it attributes: a function's defaults, and with them what it does later."""
    call = b"ctorch._utils\n_rebuild_tensor_v2\n"
    raw = pickle.PROTO + b"\x04" + call + b"N}X\x0c\x00\x00\x00__defaults__Ns\x86b" + pickle.STOP
    before = torch._utils._rebuild_tensor_v2.__defaults__
    with pytest.raises(ValueError, match="opcode EMPTY_DICT is not part of a pickled tensor"):
        decode_member("a.pickle", raw)
    assert torch._utils._rebuild_tensor_v2.__defaults__ == before
    pickle.loads(raw)  # the example is real
    assert torch._utils._rebuild_tensor_v2.__defaults__ is None
    torch._utils._rebuild_tensor_v2.__defaults__ = before


@pytest.mark.parametrize("kind", ["pth", "pickle"])
def test_altered_bytes_are_refused(kind: str) -> None:
    raw, tensor = members(tar_bytes(make()))[f"abc.{kind}"], make().latents if kind == "pth" else make().text_embeds
    altered = bytearray(raw)
    altered[raw.index(tensor.view(torch.uint8).numpy().tobytes()) + 100] ^= 4
    with pytest.raises(ValueError, match=f"abc.{kind}' is refused: checksum of archive/data/0 differs"):
        decode_member(f"abc.{kind}", bytes(altered))


@pytest.mark.parametrize(
    "name, raw",
    [
        ("a.pickle", pickle.dumps({"x": 1})), ("a.pth", torch_saved({"x": torch.zeros(2)}, zipped=True)),
        ("a.pickle", b""), ("a.pth", b"garbage"), ("a.json", b"{"), ("a.npy", b""), ("a", b""), ("a.pkl", b""),
    ],
)  # fmt: skip
def test_other_members_are_refused(name: str, raw: bytes) -> None:
    with pytest.raises(ValueError, match="shard member"):
        decode_member(name, raw)


def test_energon_decoder(tmp_path: Path) -> None:
    raw = members(tar_bytes(make()))
    sample = {"__key__": "abc", "__restore_key__": (b"x", 1), "__subflavors__": None}
    decoded = SafeDecoder()({**sample, **{name.partition(".")[2]: value for name, value in raw.items()}})
    assert torch.equal(decoded["pth"], make().latents) and decoded["__key__"] == "abc"
    assert torch.equal(SafeDecoder().decode("abc.pickle", raw["abc.pickle"]), make().text_embeds)
    with pytest.raises(ValueError, match=r"abc.pickle.* is refused"):
        SafeDecoder()({**sample, "pickle": hostile_members(tmp_path / "x")["os.system"][1]})


def test_energon_without_our_decoder_reads_the_members() -> None:
    """So do peers' loaders, which take what Energon's default decoder gives."""
    raw = members(tar_bytes(make()))
    latents = DEFAULT_DECODER.decode("abc.pth", raw["abc.pth"])
    text = DEFAULT_DECODER.decode("abc.pickle", raw["abc.pickle"])
    info = DEFAULT_DECODER.decode("abc.json", raw["abc.json"])
    assert torch.equal(latents, make().latents) and torch.equal(text, make().text_embeds)
    assert ClipInfo(**info) == INFO

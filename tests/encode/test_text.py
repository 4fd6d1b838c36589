from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from transformers import UMT5EncoderModel

from tests.tiny import make_tokenizer
from wan_core.encode.text import TextEncoder, clean_caption, encode_ids, load_text_encoder

CAPTIONS = ["a red circle moves left", "", "a  blue &amp;amp; green square\n", "the triangle " * 400]


@pytest.mark.parametrize("caption", [*CAPTIONS, "sch\u00c3\u00b6n \u2019s", " \tx\u00a0y ", "&lt;b&gt;"])
def test_cleaning_equals_that_of_diffusers(caption: str) -> None:
    assert clean_caption(caption) == prompt_clean(caption)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_equal_those_of_diffusers(tiny_model: Path, dtype: torch.dtype) -> None:
    encoder = load_text_encoder(tiny_model, dtype, "cpu")
    pipe = WanPipeline.from_pretrained(tiny_model, torch_dtype=dtype)
    lengths = []
    for caption, found in zip(CAPTIONS, encoder.encode(CAPTIONS), strict=True):
        with torch.no_grad():
            expected = pipe._get_t5_prompt_embeds(caption, max_sequence_length=512)[0]
        assert found.dtype == dtype and found.shape[1] == 32
        torch.testing.assert_close(found, expected[: len(found)])
        assert not expected[len(found) :].any()  # the pipeline pads with zeros from exactly here on
        lengths.append(len(found))
    assert lengths == [6, 1, 6, 512]


def test_equal_captions_are_encoded_once(tiny_model: Path) -> None:
    encoder = load_text_encoder(tiny_model, torch.float32, "cpu")
    rows: list[int] = []
    encoder.model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0].unique(dim=0))))
    first, second, other = encoder.encode(["a red circle", " a red  circle ", "a square"])
    assert first is second and not torch.equal(first, other)
    assert rows == [2]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_an_embedding_depends_on_its_own_tokens_alone(tiny_model: Path, device: str) -> None:
    model = UMT5EncoderModel.from_pretrained(tiny_model / "text_encoder").to(device)
    rng = torch.Generator().manual_seed(0)
    ids = [torch.randint(2, 20, (n,), generator=rng).tolist() for n in (3, 70, 64, 65, 512, 1, *range(30, 99))]
    for tokens, found in zip(ids[:8], encode_ids(model, ids), strict=False):
        assert found.shape == (len(tokens), 32)
        assert torch.equal(found, encode_ids(model, [tokens])[0])


def test_broken_weights_are_refused(tiny_model: Path) -> None:
    model = UMT5EncoderModel.from_pretrained(tiny_model / "text_encoder")
    with pytest.raises(ValueError, match="float16 overflows"):
        TextEncoder(make_tokenizer(), UMT5EncoderModel.from_pretrained(tiny_model / "text_encoder").half())
    with torch.no_grad():
        model.encoder.final_layer_norm.weight.zero_()
    with pytest.raises(ValueError, match="'a' is all zero"):
        TextEncoder(make_tokenizer(), model).encode(["a"])
    with torch.no_grad():
        model.encoder.final_layer_norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="'a' is not finite"):
        TextEncoder(make_tokenizer(), model).encode(["a"])
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    with pytest.raises(ValueError, match="all-zero embed_tokens"):
        TextEncoder(make_tokenizer(), model)

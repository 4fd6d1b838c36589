"""The demo's checkpoint folder: diffusers loads and runs it, it repeats, and its captions can be told apart."""

from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from wan_core.config import TEXT_LENGTH
from wan_core.demo import held_out_prompts
from wan_core.demo.model import make_model, new_text_encoder, new_tokenizer
from wan_core.digests import file_digest


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("demo") / "model"
    make_model(made, seed=5)
    return made


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> WanPipeline:
    return WanPipeline.from_pretrained(folder)


def embed(encoder, tokenizer, text: str) -> torch.Tensor:
    return encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].detach()


def test_the_same_seed_gives_the_same_bytes(folder: Path, tmp_path: Path):
    make_model(tmp_path / "again", seed=5)
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    assert len(files) == 10
    for name in files:
        assert file_digest(folder / name) == file_digest(tmp_path / "again" / name), name
    make_model(tmp_path / "other", seed=6)
    weights = Path("transformer/diffusion_pytorch_model.safetensors")
    assert file_digest(folder / weights) != file_digest(tmp_path / "other" / weights)


def test_diffusers_makes_a_video_with_it(pipeline: WanPipeline):
    pipeline.set_progress_bar_config(disable=True)
    video = pipeline(
        held_out_prompts()[0], negative_prompt="", height=64, width=96, num_frames=9, num_inference_steps=2,
        output_type="np",
    ).frames  # fmt: skip
    assert video.shape == (1, 9, 64, 96, 3)


def test_a_reloaded_text_encoder_gives_the_same_embeddings(pipeline: WanPipeline):
    tokenizer = new_tokenizer()
    torch.manual_seed(5)
    encoder = new_text_encoder(len(tokenizer))
    caption = "a red circle moving left"
    assert torch.equal(embed(encoder, tokenizer, caption), embed(pipeline.text_encoder, pipeline.tokenizer, caption))
    assert pipeline.text_encoder.get_input_embeddings().weight.abs().sum() > 0


def test_one_other_word_changes_its_token_clearly_and_the_rest_little(pipeline: WanPipeline):
    original = embed(pipeline.text_encoder, pipeline.tokenizer, "a red circle moving left")
    assert original.square().mean(-1).tolist() == pytest.approx([1] * 6, abs=0.02)
    for place, changed in (
        (1, "a blue circle moving left"),
        (2, "a red square moving left"),
        (4, "a red circle moving up"),
    ):
        likeness = torch.cosine_similarity(original, embed(pipeline.text_encoder, pipeline.tokenizer, changed), dim=-1)
        assert likeness[place] < 0.6
        assert (likeness[[i for i in range(6) if i != place]] > 0.75).all()


def test_every_demo_word_is_one_token_and_other_text_survives():
    tokenizer = new_tokenizer()
    for prompt in held_out_prompts():
        assert len(tokenizer(prompt).input_ids) == 6
    assert tokenizer("A RED circle moving left").input_ids == tokenizer("a red circle moving left").input_ids
    assert tokenizer("").input_ids == [tokenizer.eos_token_id]
    assert (
        tokenizer.decode(tokenizer("模糊 a red fish").input_ids, skip_special_tokens=True).strip() == "模糊 a red fish"
    )
    padded = tokenizer("a red circle moving left", padding="max_length", max_length=TEXT_LENGTH).input_ids
    assert padded[6:] == [tokenizer.pad_token_id] * (TEXT_LENGTH - 6)

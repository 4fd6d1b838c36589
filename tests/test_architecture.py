"""Sizes, and the FLOP formula against a count of the operations that torch ran."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.model.reference import Inputs, our_model, reference_model, run_ours
from wan_core.architecture import I2V_14B, T2V_1_3B, T2V_14B, Architecture
from wan_core.parallel import layout


def test_parameters_of_the_published_sizes() -> None:
    """1.42 and 14.3 billion, as diffusers counts them."""
    from diffusers import WanTransformer3DModel

    for architecture, billions in ((T2V_1_3B, 1.419), (T2V_14B, 14.288)):
        with torch.device("meta"):
            model = WanTransformer3DModel(**architecture.to_diffusers())
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=1e-3)


def test_a_dataset_of_the_other_kind_is_refused() -> None:
    for model, given in ((I2V_14B, True), (T2V_14B, False)):
        model.check_first_frames(given, Path("data"))
    with pytest.raises(
        ValueError, match=r"data was encoded for text-to-video \(it holds no first frames\), but the mode"
    ):
        I2V_14B.check_first_frames(False, Path("data"))
    with pytest.raises(
        ValueError, match=r"data was encoded for image-to-video .*the model is text-to-video \(image_dim=0"
    ):
        T2V_14B.check_first_frames(True, Path("data"))


@pytest.mark.parametrize("values", [{"in_channels": 36}, {"image_dim": 1280}, {"in_channels": 32, "image_dim": 1280}])
def test_channels_of_another_kind_of_model_are_refused(values: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="a text-to-video model takes 16 channels, an image-to-video model 36"):
        Architecture(**values)


@pytest.mark.parametrize("image_dim", [0, 40])
def test_flops_are_what_torch_counts(image_dim: int) -> None:
    channels = 36 if image_dim else 16
    architecture = Architecture(64, 160, 4, 3, channels, text_dim=48, freq_dim=64, image_dim=image_dim)
    inputs = Inputs.random(architecture, [(3, 8, 8)], short_text=False)
    with layout(backend="gloo"), torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model = our_model(reference_model(architecture), architecture)
        with FlopCounterMode(display=False) as counter:
            run_ours(model, inputs)
    counts = counter.get_flop_counts()
    blocks = sum(
        sum(counts[name].values()) for name in counts if name.startswith("WanModel.layers.") and name.count(".") == 2
    )
    assert blocks == architecture.forward_flops(48)


def test_token_counts_of_the_usual_videos() -> None:
    from wan_core.patch import GridSize

    assert GridSize.of(torch.empty(16, 21, 60, 104, device="meta")).num_tokens == 32_760
    assert GridSize.of(torch.empty(16, 21, 90, 160, device="meta")).num_tokens == 75_600
    assert T2V_14B.training_flops(37_440) / 1e12 == pytest.approx(6184 * 4 / 4, rel=0.01)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_dim": 1280}, "image_dim=1280"),
        ({"patch_size": [2, 2, 2]}, "patch_size"),
        ({"qk_norm": None}, "qk_norm"),
    ],
)
def test_another_kind_of_transformer_is_refused(tmp_path, change: dict, words: str) -> None:
    (tmp_path / "transformer").mkdir()
    config = {"_class_name": "WanTransformer3DModel", **Architecture().to_diffusers(), **change}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words):
        Architecture.from_diffusers(tmp_path)

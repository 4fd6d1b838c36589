"""Our transformer against diffusers' WanTransformer3DModel with the same random weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file

from tests.model.reference import (
    SIZES,
    Inputs,
    gradients,
    our_model,
    our_weights,
    reference_model,
    relative_error,
    run_ours,
    run_reference,
)
from wan_core.architecture import Architecture
from wan_core.convert.mapping import stays_float32, to_diffusers
from wan_core.convert.weights import DiffusersWeights, save_transformer
from wan_core.parallel import layout

SHAPES = [(3, 8, 8), (1, 4, 6), (2, 6, 10)]


@pytest.fixture(autouse=True, scope="module")
def one_rank() -> Iterator[None]:
    with layout(backend="gloo"):
        yield


@pytest.mark.parametrize("architecture", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("multiple", [1, 16], ids=["exact", "padded"])
def test_a_pack_equals_each_sample_alone(architecture: Architecture, multiple: int) -> None:
    reference = reference_model(architecture)
    inputs = Inputs.random(architecture, SHAPES)
    with torch.no_grad():
        found = run_ours(our_model(reference, architecture), inputs, multiple)
        expected = run_reference(reference, inputs)
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs) <= 2e-5


@pytest.mark.parametrize("architecture", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("recompute", [None, "selective", "full"])
def test_gradients(architecture: Architecture, recompute: str | None) -> None:
    reference = reference_model(architecture)
    method = {"recompute_method": "uniform", "recompute_num_layers": 1} if recompute == "full" else {}
    model = our_model(reference, architecture, recompute_granularity=recompute, **method).train()
    # Texts of all 512 positions: behind a short one nearly all keys are equal, and the gradient of the queries is what
    # cancellation leaves of it, in diffusers' float32 as in ours.
    ours, theirs = (Inputs.random(architecture, SHAPES, short_text=False).requires_grad() for _ in range(2))
    outputs, expected = run_ours(model, ours), run_reference(reference, theirs)
    weights = [torch.randn_like(output) for output in outputs]
    torch.stack([(o * w).sum() for o, w in zip(outputs, weights, strict=True)]).sum().backward()
    torch.stack([(o * w).sum() for o, w in zip(expected, weights, strict=True)]).sum().backward()
    for mine, other in zip(ours.latents, theirs.latents, strict=True):
        assert mine.grad is not None and other.grad is not None
        assert relative_error(mine.grad, other.grad) <= 1e-4
    found = gradients(model, architecture)
    # A module's weight and bias are one affine map, compared as one: the gradient of a key's bias alone is almost
    # nothing but cancellation (softmax does not see a shift of all keys), in diffusers' float32 as in ours.
    modules: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
    for name, parameter in reference.named_parameters():
        assert parameter.grad is not None
        modules[name.rsplit(".", 1)[0]].append((found[name].flatten(), parameter.grad.flatten()))
    for name, pairs in modules.items():
        mine, other = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        assert relative_error(mine, other) <= 1e-4, name


@pytest.mark.parametrize("size", ["head_dim 24", "image to video"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_import_then_export_keeps_every_bit(tmp_path, dtype: torch.dtype, size: str) -> None:
    architecture = SIZES[size]
    reference = reference_model(architecture).to(dtype)
    weights = reference.state_dict()
    model = our_model(reference, architecture, params_dtype=dtype)
    save_transformer(to_diffusers(our_weights(model), architecture), architecture, tmp_path / "transformer")
    assert Architecture.from_diffusers(tmp_path) == architecture
    read = DiffusersWeights(tmp_path)
    assert read.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(read[name].to(dtype), weight), name


def test_exported_folder_loads_in_diffusers(tmp_path) -> None:
    from diffusers import WanTransformer3DModel

    architecture = SIZES["head_dim 16"]
    reference = reference_model(architecture)
    save_transformer(reference.state_dict(), architecture, tmp_path / "transformer")
    loaded = WanTransformer3DModel.from_pretrained(tmp_path, subfolder="transformer")
    inputs = Inputs.random(architecture, SHAPES[:1])
    with torch.no_grad():
        assert torch.equal(run_reference(loaded, inputs)[0], run_reference(reference, inputs)[0])
    files = list((tmp_path / "transformer").glob("*.safetensors"))
    assert len(files) == 1 and load_file(files[0]).keys() == reference.state_dict().keys()


@pytest.mark.parametrize("size", ["head_dim 24", "image to video"])
def test_bf16_keeps_its_float32_islands(size: str) -> None:
    """bf16 weights and activations, float32 time embedding and modulation: as close to float32 as diffusers' bf16."""
    architecture = SIZES[size]
    reference = reference_model(architecture).to(torch.bfloat16).float()  # weights that bf16 holds exactly
    model = our_model(reference, architecture, params_dtype=torch.bfloat16)
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    islands = ("time_embedding.", "modulation", "cross_norm.", "put_norm.")
    assert kept == {name for name, _ in model.named_parameters() if any(part in name for part in islands)}
    assert kept == {name for name, _ in model.named_parameters() if stays_float32(name)}

    import copy

    theirs = copy.deepcopy(reference).to(torch.bfloat16)
    for name, module in theirs.named_modules():
        if any(part in name.split(".") for part in theirs._keep_in_fp32_modules):
            module.float()
    for name, parameter in theirs.named_parameters():
        if "scale_shift_table" in name:
            parameter.data = parameter.data.float()
    inputs = Inputs.random(architecture, SHAPES)
    rounded = inputs.to(torch.bfloat16).to(torch.float32)
    low = rounded.to(torch.bfloat16)
    with torch.no_grad():
        exact = run_reference(reference, rounded)
        found, diffusers_found = run_ours(model, low), run_reference(theirs, low)
    # All samples as one: the smallest has six tokens, and its error alone depends on the draw by a tenth.
    ours, other, truth = (torch.cat([x.flatten() for x in outputs]) for outputs in (found, diffusers_found, exact))
    assert relative_error(ours, truth) <= 1.02 * relative_error(other, truth)


def test_timesteps_are_not_rounded_to_bf16() -> None:
    """bf16 holds only multiples of 4 in [512, 1024); these two timesteps would be one."""
    architecture = SIZES["head_dim 16"]
    model = our_model(reference_model(architecture), architecture, params_dtype=torch.bfloat16)
    with torch.no_grad():
        embeddings, modulation = model.time_embedding(torch.tensor([901.0, 902.0], dtype=torch.float64))
    assert embeddings.dtype == modulation.dtype == torch.float32
    assert relative_error(modulation[0], modulation[1]) > 1e-3

"""The GPU's kernels (Transformer Engine, fused ops, fused attention) against diffusers on the same GPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.model.reference import (
    Inputs,
    gradients,
    our_model,
    reference_model,
    relative_error,
    run_ours,
    run_reference,
)
from wan_core.architecture import Architecture
from wan_core.parallel import layout

pytestmark = pytest.mark.gpu
ARCHITECTURE = Architecture(512, 1024, 4, 3, text_dim=128, freq_dim=256)
IMAGE_TO_VIDEO = replace(ARCHITECTURE, in_channels=36, image_dim=96)
BOTH = pytest.mark.parametrize("architecture", [ARCHITECTURE, IMAGE_TO_VIDEO], ids=["t2v", "i2v"])
SHAPES = [(5, 16, 24), (1, 16, 16), (3, 24, 16)]


@pytest.fixture(autouse=True, scope="module")
def one_rank() -> Iterator[None]:
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    with layout():
        model_parallel_cuda_manual_seed(0)  # Transformer Engine's layers ask for the generator
        yield


def on_gpu(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return Inputs(
        tuple(x.to("cuda", dtype) for x in inputs.latents),
        inputs.timesteps.cuda(),
        inputs.text_embeds.to("cuda", dtype),
        None if inputs.image_embeds is None else inputs.image_embeds.to("cuda", dtype),
    )


@BOTH
@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_bf16_is_as_close_to_float32_as_diffusers(implementation: str, architecture: Architecture) -> None:
    """Outputs and gradients of a pack; the reference is diffusers in float32, sample by sample."""
    reference = reference_model(architecture).to(torch.bfloat16).float().cuda()
    low = copy.deepcopy(reference).to(torch.bfloat16)
    for name, module in low.named_modules():
        if any(part in name.split(".") for part in low._keep_in_fp32_modules):
            module.float()
    for name, parameter in low.named_parameters():
        if "scale_shift_table" in name:
            parameter.data = parameter.data.float()
    model = our_model(
        reference, architecture, params_dtype=torch.bfloat16, bf16=True, use_cpu_initialization=False,
        transformer_impl=implementation, gradient_accumulation_fusion=False,
    )  # fmt: skip
    inputs = on_gpu(Inputs.random(architecture, SHAPES), torch.bfloat16)
    exact = run_reference(reference, on_gpu(inputs, torch.float32))
    theirs, ours = run_reference(low, inputs), run_ours(model, inputs)
    torch.manual_seed(5)
    weights = [torch.randn_like(output) for output in exact]
    for outputs in (exact, theirs, ours):
        sum((output.float() * weight).sum() for output, weight in zip(outputs, weights, strict=True)).backward()
    for mine, other, truth in zip(ours, theirs, exact, strict=True):
        assert relative_error(mine, truth) <= 1.1 * relative_error(other, truth)
    truth = {name: p.grad.flatten().double() for name, p in reference.named_parameters() if p.grad is not None}
    other = {name: p.grad.flatten().double() for name, p in low.named_parameters() if p.grad is not None}
    mine = {name: grad.flatten().double() for name, grad in gradients(model, architecture).items()}
    whole = [torch.cat([grads[name] for name in sorted(truth)]) for grads in (mine, other, truth)]
    assert relative_error(whole[0], whole[2]) <= 1.1 * relative_error(whole[1], whole[2])
    assert torch.nn.functional.cosine_similarity(whole[0], whole[2], dim=0) >= 0.999


@BOTH
def test_a_pack_equals_each_sample_alone(architecture: Architecture) -> None:
    """Packed samples do not see each other: alone, each gives what it gave in the pack, to bf16's rounding."""
    reference = reference_model(architecture)
    model = our_model(
        reference, architecture, params_dtype=torch.bfloat16, bf16=True, use_cpu_initialization=False,
        transformer_impl="transformer_engine", gradient_accumulation_fusion=False,
    )  # fmt: skip
    inputs = on_gpu(Inputs.random(architecture, SHAPES), torch.bfloat16)
    with torch.no_grad():
        packed = run_ours(model, inputs)
        for index, expected in enumerate(packed):
            one = slice(index, index + 1)
            image = None if inputs.image_embeds is None else inputs.image_embeds[one]
            alone = Inputs(inputs.latents[one], inputs.timesteps[one], inputs.text_embeds[one], image)
            assert relative_error(run_ours(model, alone)[0], expected) <= 1e-2

"""What leaves for a Diffusers folder can be written by safetensors, which refuses tensors that share memory."""

from __future__ import annotations

import torch
from safetensors.torch import save

from wan_core.architecture import Architecture
from wan_core.convert.mapping import from_diffusers, to_diffusers


def test_one_head_is_no_special_case() -> None:
    """With one head a fused projection's parts are contiguous already, and would stay views of it."""
    architecture = Architecture(32, 64, 1, 1, text_dim=8)
    names = to_diffusers(_Shapes(architecture), architecture)
    assert save(names)
    again = dict(from_diffusers(names, architecture))
    assert torch.equal(again["layers.0.self_attention.linear_qkv.weight"], torch.arange(96.0 * 32).view(96, 32))


class _Shapes(dict[str, torch.Tensor]):
    """Our state dict with counted numbers in the fused projection and small ones elsewhere."""

    def __init__(self, architecture: Architecture) -> None:
        from wan_core.convert.mapping import parameter_names

        h = architecture.hidden_size
        shapes = {"linear_qkv.weight": (3 * h, h), "linear_qkv.bias": (3 * h,), "linear_kv.weight": (2 * h, h),
                  "linear_kv.bias": (2 * h,), "patch_embedding.weight": (h, 64)}  # fmt: skip
        super().__init__()
        for name in parameter_names(architecture):
            shape = next((shape for end, shape in shapes.items() if name.endswith(end)), (4,))
            self[name] = torch.arange(float(torch.Size(shape).numel())).view(shape)

"""Selective recomputation: the same bits, less memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.model.reference import SIZES, Inputs, gradients, our_model, reference_model, run_ours
from wan_core.model.recompute import cheap, selective
from wan_core.parallel import layout


def run(active: bool, seen: list[str]) -> list[Tensor]:
    """Two linears with cheap ops between, before and behind them, some of several outputs, views and chains."""
    torch.manual_seed(0)
    first, second = nn.Linear(8, 24), nn.Linear(8, 8)

    @cheap
    def halves(x: Tensor, gain: float) -> tuple[Tensor, Tensor, Tensor]:
        seen.append("halves")
        a, b, c = x.chunk(3, dim=-1)
        return a * gain, b.sin(), c  # the last aliases the input

    @cheap
    def squash(x: Tensor) -> Tensor:
        seen.append("squash")
        return F.gelu(x)

    x = torch.randn(5, 8, requires_grad=True)
    with selective(active):
        y = squash(x.cos())
        a, b, c = halves(first(y), 3.0)
        z = second(squash(a) @ b.t() @ c)  # the product saves a view of b
        out = squash(squash(z)) * y  # a chain, and a second use of the first op's output
    grads = torch.autograd.grad(out.square().sum(), [x, *first.parameters(), *second.parameters()])
    return [out, *grads]


def test_gradients_are_equal_to_the_bit() -> None:
    plain: list[str] = []
    expected = run(False, plain)
    recomputing: list[str] = []
    found = run(True, recomputing)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(recomputing) > len(plain)


def test_nothing_is_recomputed_without_gradients() -> None:
    seen: list[str] = []

    @cheap
    def double(x: Tensor) -> Tensor:
        seen.append("double")
        return 2 * x

    with torch.no_grad(), selective(True):
        double(torch.ones(3, requires_grad=True))
    assert seen == ["double"]


def test_an_address_used_again_is_not_taken_for_the_op_before() -> None:
    @cheap
    def double(x: Tensor) -> Tensor:
        return 2 * x

    x = torch.ones(1000, requires_grad=True)
    with selective(True):
        address = double(x).data_ptr()  # gone at once
        for _ in range(50):
            other = torch.full((1000,), 3.0)
            if other.data_ptr() == address:
                break
        out = (x * other).sum()
    (grad,) = torch.autograd.grad(out, x)
    assert torch.equal(grad, other)


def test_a_recomputed_layer_draws_the_same_dropout() -> None:
    """As adapters with lora.dropout do. With other draws the gradients would belong to another forward."""
    architecture = SIZES["head_dim 24"]
    with layout(backend="gloo"):
        reference, found = reference_model(architecture), []
        for values in ({}, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}):
            model = our_model(reference, architecture, **values).train()
            for layer in model.layers.values():
                layer.dropout = nn.Dropout(0.5)
                layer.register_forward_hook(lambda layer, inputs, out: layer.dropout(out))
            torch.manual_seed(0)
            inputs = Inputs.random(architecture, [(1, 4, 6)])
            torch.manual_seed(1)
            run_ours(model, inputs)[0].square().sum().backward()
            found.append(gradients(model, architecture))
    assert all(torch.equal(found[1][name], gradient) for name, gradient in found[0].items())

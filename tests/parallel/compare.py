"""What a layout left behind, put together by parameter name, and how far two layouts are apart."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.parallel.layouts import Layout


@dataclass(frozen=True)
class Run:
    """One layout's steps; parameters whole, by name."""

    losses: dict[int, float]  # of each step
    grad_norms: dict[int, float]
    gradients: dict[str, Tensor]  # of the first step
    weights: dict[str, Tensor]  # after the last step
    differing: list[str]  # parameters, or numbers, that ranks hold copies of which are not equal to the bit


@dataclass(frozen=True)
class Errors:
    """The largest relative errors of a run against another."""

    loss: float  # over all steps of the run
    grad_norm: float
    gradient: float  # of the first step, over the modules
    gradient_of: str
    cosine: float  # the smallest of any module's gradient
    whole_cosine: float  # of all gradients as one vector


def read_run(folder: Path) -> Run:
    """Put the ranks' files together."""
    ranks: list[dict[str, Any]] = [torch.load(path, weights_only=True) for path in sorted(folder.glob("rank*.pt"))]
    assert ranks, folder
    losses = [rank["losses"] for rank in ranks if rank["losses"]]
    norms = [rank["grad_norms"] for rank in ranks]
    gradients, differing_gradients = _merge(ranks, "gradients")
    weights, differing_weights = _merge(ranks, "weights")
    differing = [f"gradient of {name}" for name in differing_gradients] + differing_weights
    differing += ["losses"] if any(other != losses[0] for other in losses) else []
    differing += ["gradient norms"] if any(other != norms[0] for other in norms) else []
    return Run(losses[0], norms[0], gradients, weights, differing)


def _merge(ranks: list[dict[str, Any]], kind: str) -> tuple[dict[str, Tensor], list[str]]:
    """Whole tensors by name, and the names of those that ranks disagree on."""
    copies: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
    split: dict[str, int] = {}
    for rank in ranks:
        split |= rank["split"]
        for name, tensor in rank[kind].items():
            copies[name, rank["tp_rank"] if name in rank["split"] else 0].append(tensor)
    differing = sorted({n for (n, _), same in copies.items() if any(not torch.equal(same[0], t) for t in same)})
    whole: dict[str, Tensor] = {}
    for name in sorted({name for name, _ in copies}):
        slices = [copies[name, i][0] for i in range(ranks[0]["tp"])] if name in split else [copies[name, 0][0]]
        whole[name] = torch.cat(slices, split.get(name, 0))
    return whole, differing


def compare(found: Run, expected: Run) -> Errors:
    """Largest errors of a run's steps. A run that went on from a checkpoint has no gradients of the first step."""
    loss, grad_norm = _largest(found.losses, expected.losses), _largest(found.grad_norms, expected.grad_norms)
    if min(found.losses) > min(expected.losses):
        return Errors(loss, grad_norm, 0.0, "", 1.0, 1.0)
    errors = module_errors(found.gradients, expected.gradients)
    worst = max(errors, key=lambda name: errors[name][0])
    mine, other = (
        torch.cat([run.gradients[n].flatten().double() for n in sorted(run.gradients)]) for run in (found, expected)
    )
    return Errors(
        loss, grad_norm, errors[worst][0], worst, min(cosine for _, cosine in errors.values()),
        float(torch.cosine_similarity(mine, other, dim=0)),
    )  # fmt: skip


def module_errors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Relative error and cosine of every module.

    A module's weight and bias count as one vector: the gradient of a key's bias alone is almost nothing but
    cancellation, as softmax does not see a shift of all keys.
    """
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    mine, other = _by_module(found), _by_module(expected)
    return {
        name: (
            float((mine[name] - other[name]).norm() / other[name].norm()),
            float(torch.cosine_similarity(mine[name], other[name], dim=0)),
        )
        for name in mine
    }


def _by_module(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for name, tensor in tensors.items():
        parts[name.removesuffix(".weight").removesuffix(".bias")].append(tensor.flatten().double())
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def _largest(found: Mapping[int, float], expected: Mapping[int, float]) -> float:
    return max(abs(value - expected[step]) / abs(expected[step]) for step, value in found.items())


def main() -> None:
    """Print every layout's errors against its base as a Markdown table: `python -m tests.parallel.compare DIR`."""
    out = Path(sys.argv[1])
    print("| layout | loss | gradient norm | gradient's cosine | worst module's error, cosine | unequal copies |")
    print("|---|---|---|---|---|---|")
    for folder in sorted(path.parent for path in out.glob("*/rank0.pt")):
        base = Layout.of(folder.name.replace("load_", "load:")).base
        if folder.name != base:
            run = read_run(folder)
            errors = compare(run, read_run(out / base))
            print(
                f"| {folder.name} | {errors.loss:.1e} | {errors.grad_norm:.1e} | {errors.whole_cosine:.6f} | "
                f"{errors.gradient:.1e}, {errors.cosine:.6f} ({errors.gradient_of}) | {len(run.differing)} |"
            )


if __name__ == "__main__":
    main()

"""Memory and step time of a parallel layout, from closed forms.

The forms are those of docs/parallelism.md, which also states how far they are from measurements. h is the hidden size,
f the feed-forward width; a unit is one activation of h features for each of a rank's tokens, in bfloat16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from wan_core.architecture import Architecture
from wan_core.cluster import Layout, Work
from wan_core.config import PATCH_SIZE, TEXT_LENGTH

GIB = 2**30
LOW, HIGH, ADAM = 2, 4, 8  # bytes of a bfloat16 and a float32 number; of Adam's two moments
FSDP_PREFETCH, FSDP_REDUCE = 500_000_000, 1_000_000_000  # numbers that Megatron-FSDP gathers ahead, reduces behind
COMMUNICATOR = 0.25 * GIB  # NCCL's buffers for a group
CONTEXT = 1.5 * GIB  # CUDA's context, libraries' workspaces
BESIDE = 0.1  # of a communication beside computation that shows: it takes multiprocessors (assumed, not measured)
FRAGMENTATION = 0.02  # of what is allocated


@dataclass(frozen=True)
class Count:
    """Parameters of one rank, by how they are held."""

    low: int  # bfloat16
    high: int  # float32 also under bfloat16: modulation, time embedding, the norm before cross-attention

    def __add__(self, other: Count) -> Count:
        return Count(self.low + other.low, self.high + other.high)

    def __mul__(self, factor: int) -> Count:
        return Count(self.low * factor, self.high * factor)

    @property
    def total(self) -> int:
        return self.low + self.high


def layer_parameters(a: Architecture, tp: int = 1) -> Count:
    """Parameters of a block on one of `tp` ranks."""
    h, f = a.hidden_size, a.ffn_hidden_size
    split = 3 * h * h + 3 * h + h * h + h * h + h + 2 * h * h + 2 * h + h * h + h * f + f + f * h + 4 * h
    split += (2 * h * h + 2 * h + h) * bool(a.image_dim)  # keys and values of an image, and the keys' norm
    return Count(split // tp + 3 * h, 6 * h + 2 * h)  # row-parallel biases; modulation and the affine norm


def outer_parameters(a: Architecture, first: bool = True, last: bool = True) -> Count:
    """Parameters outside of the blocks; the first stage embeds patches, the last has the head."""
    h, patch = a.hidden_size, math.prod(PATCH_SIZE)
    time = a.freq_dim * h + h + h * h + h + 6 * h * h + 6 * h
    text = a.text_dim * h + h + h * h + h
    features, out = a.in_channels * patch, a.out_channels * patch
    image = a.image_dim * (a.image_dim + 1 + h) + h if a.image_dim else 0
    norms = 2 * (a.image_dim + h) if a.image_dim else 0
    return Count(
        text + image + first * (features * h + h) + last * (h * out + out),
        time + norms + last * 2 * h,
    )


def rank_parameters(a: Architecture, layout: Layout) -> Count:
    """Parameters of a rank of the first stage, which has the most blocks."""
    layers = -(-a.num_layers // layout.pp)
    return layer_parameters(a, layout.tp) * layers + outer_parameters(a, last=layout.pp == 1)


def state_bytes(a: Architecture, layout: Layout) -> float:
    """Weights, float32 gradients, master weights of the bfloat16 ones and Adam's moments on the fullest rank.

    The distributed optimizer shards master weights and moments; Megatron-FSDP shards everything (and keeps master
    weights of all parameters), but holds the blocks in use whole.
    """
    count, shards = rank_parameters(a, layout), layout.shards
    if not layout.fsdp:
        held = count.low * (LOW + HIGH) + count.high * (HIGH + HIGH)
        return held + (count.low * (HIGH + ADAM) + count.high * ADAM) / shards
    sharded = count.low * (LOW + HIGH + HIGH + ADAM) + count.high * (HIGH + HIGH + HIGH + ADAM)
    if shards == 1:
        return sharded
    layer, outer = layer_parameters(a, layout.tp).total, outer_parameters(a)
    gathered = min(2 * layer + FSDP_PREFETCH, count.low) * LOW + outer.low * LOW + outer.high * HIGH
    return sharded / shards + gathered


# What a block keeps for its backward: units that are split over TP, units that are whole unless SP is on, activations
# of f features (split over TP).
KEPT: dict[str | None, tuple[int, int, int]] = {
    None: (9, 8, 2),
    "selective": (6, 3, 1),
    "full": (0, 1, 0),
}
# Of these, what Ulysses adds without recomputation: q, k, v and attention's output lie there before and after the
# exchange, but q and k before it are not kept.
EXCHANGED = 2


def activation_bytes(work: Work, layout: Layout) -> float:
    """Activations at the start of the backward on the fullest rank, and what the backward of a block adds."""
    a, tokens = work.architecture, -(-work.tokens // layout.cp)
    unit, wide = tokens * a.hidden_size * LOW, tokens * a.ffn_hidden_size * LOW
    outside = layout.tp if layout.sequence_parallel else 1

    def kept(kind: str | None) -> float:
        split, whole, feed = KEPT[kind]
        if kind is None and layout.cp > 1 and not layout.ring:
            split += EXCHANGED
        return (split * unit + feed * wide) / layout.tp + whole * unit / outside

    layers = -(-a.num_layers // layout.pp)
    full = min(layout.recompute_layers, layers) if layout.recompute == "full" else 0
    other = "selective" if layout.recompute == "selective" else None
    stage = full * kept("full") + (layers - full) * kept(other)
    in_flight = min(layout.pp, work.packs // layout.dp)
    again = kept(None) if full else kept(None) - kept(other)  # one block made again
    working = wide / layout.tp + 3 * unit / outside
    patches = tokens * 2 * math.prod(PATCH_SIZE) * (a.in_channels + a.out_channels) * HIGH
    reduced = 0.0
    if layout.fsdp and layout.shards > 1:  # whole gradients wait for their reduction, while activations go
        gradients = layer_parameters(a, layout.tp).total * HIGH
        waiting = min(layers - 1, FSDP_REDUCE * HIGH / gradients)  # blocks
        reduced = gradients + max(0.0, waiting * (gradients - kept("full" if full == layers else other)))
    return in_flight * stage + again + working + patches + reduced


def total_bytes(allocated: float, layout: Layout) -> float:
    groups = sum(size > 1 for size in (layout.tp, layout.cp, layout.pp, layout.shards))
    return allocated * (1 + FRAGMENTATION) + CONTEXT + groups * COMMUNICATOR


# What the elementwise kernels of a block move, in the same order: their times in docs/benchmarks/h200.md at 4 TB/s.
MOVED_FORWARD, MOVED_BACKWARD = (14, 18, 2), (28, 32, 3)


@dataclass(frozen=True)
class BlockTime:
    """Seconds of one block on one pack."""

    forward: float
    backward: float  # without recomputation
    again: float  # what recomputation adds to the backward


def block_time(work: Work, layout: Layout) -> BlockTime:
    """Compute and exposed communication of a block: tensor and context parallelism wait for theirs."""
    a, d = work.architecture, work.device
    tp, cp, h, f = layout.tp, layout.cp, a.hidden_size, a.ffn_hidden_size
    tokens = -(-work.tokens // cp)
    products = ((h, 3 * h // tp), (h // tp, h), (h, h // tp), (h // tp, h), (h, f // tp), (f // tp, h))
    matmul = sum(
        2 * tokens * k * n / d.matmul * (1 + d.matmul_half * (1 / tokens + 1 / k + 1 / n)) for k, n in products
    )
    scores = 4 * h * (work.tokens**2 / work.samples + work.tokens * TEXT_LENGTH) / (tp * cp)
    attention, attention_backward = scores / d.attention_forward, 2.5 * scores / d.attention_backward
    outside = tp if layout.sequence_parallel else 1

    def moved(units: tuple[int, int, int]) -> float:
        return tokens * LOW * ((units[0] * h + units[2] * f) / tp + units[1] * h / outside) / d.memory

    link = d.node_link if tp * cp <= work.gpus_per_node else d.network
    unit = tokens * h * LOW
    gather = (tp - 1) / tp * unit / d.node_link + d.latency if tp > 1 else 0.0  # or reduce-scatter; an all-reduce: two
    norms = 3 * d.latency if tp > 1 else 0.0  # of q and k, here together, in cross-attention each
    exchange = 4 * (cp - 1) / cp * unit / tp / link + 2 * d.latency if cp > 1 and not layout.ring else 0.0
    around = 2 * unit / tp / link + d.latency  # keys and values to the next rank
    passed, passed_back = ((cp - 1) * around, (3 * cp - 1) * around) if layout.ring else (0.0, 0.0)  # float32 gradients
    element = tokens * h / tp / d.memory  # a byte of each number of this rank's q
    merge, merge_back = ((34 * cp + 18) * element, (30 * cp + 38) * element) if layout.ring else (0.0, 0.0)
    forward = matmul + merge + moved(MOVED_FORWARD) + 6 * gather + norms + exchange + _beside(attention, passed)
    backward = (
        2 * matmul + merge_back + moved(MOVED_BACKWARD) + (9 if layout.sequence_parallel else 6) * gather + norms
        + exchange + _beside(attention_backward, passed_back)
    )  # fmt: skip
    again = {None: 0.0, "selective": moved(MOVED_FORWARD) + exchange, "full": forward}[layout.recompute]
    return BlockTime(forward, backward, again)


def step_seconds(work: Work, layout: Layout) -> float:
    """One step: micro-batches through the pipeline, gradients and weights over the data-parallel ranks, Adam."""
    a, d = work.architecture, work.device
    block, count, shards = block_time(work, layout), rank_parameters(a, layout), layout.shards
    layers, micro_batches = -(-a.num_layers // layout.pp), work.packs // layout.dp
    recomputed = min(layout.recompute_layers, layers) if layout.recompute == "full" else layers
    link = d.node_link if layout.tp * shards <= work.gpus_per_node else d.network
    share = (shards - 1) / shards
    forward, backward = layers * block.forward, layers * block.backward + recomputed * block.again
    if layout.fsdp:  # a block's beside the block before it
        weights = layer_parameters(a, layout.tp).total * share / link
        forward = layers * _beside(block.forward, LOW * weights) + LOW * weights
        backward = layers * _beside(backward / layers, (LOW + HIGH) * weights) + HIGH * weights
        waited = 0.0
    else:  # once a step, beside the last backward and the first forward
        waited = _beside(backward, HIGH * count.total * share / link) - backward
        waited += _beside(forward, LOW * count.total * share / link) - forward
    sent = work.tokens / layout.cp * a.hidden_size * LOW / (layout.tp if layout.sequence_parallel else 1)
    across = 2 * (sent / (d.network if work.nodes > 1 else d.node_link) + d.latency) if layout.pp > 1 else 0.0
    pipeline = (micro_batches + layout.pp - 1) * (forward + backward + across)
    # zeroed, scaled and normed gradients; master weights and moments read and written
    adam = (count.total / (shards if layout.fsdp else 1) * 12 + count.total / shards * 34) / d.memory
    return pipeline + waited + adam


def _beside(computation: float, communication: float) -> float:
    """Seconds of both at once."""
    return max(computation + BESIDE * communication, communication)

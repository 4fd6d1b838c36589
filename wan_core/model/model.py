"""The WAN 2.1 transformer: noisy patches, timesteps and text in, velocity out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wan_core.config import PATCH_SIZE
from wan_core.model.config import WanTransformerConfig
from wan_core.model.embeddings import ImageEmbedding, TextEmbedding, TimeEmbedding
from wan_core.model.layer import WanLayer
from wan_core.model.ops import modulated_norm
from wan_core.model.recompute import selective
from wan_core.model.rope import packed_rotary
from wan_core.packing import Packing
from wan_core.parallel import Parallel

EMBEDDERS = ("time_embedding.", "text_embedding.", "image_embedding.")  # replicated on every pipeline stage


class Head(nn.Module):
    """Modulated norm and the projection to patches."""

    def __init__(self, config: WanTransformerConfig) -> None:
        super().__init__()
        self.eps = config.layernorm_epsilon
        h, out = config.hidden_size, config.out_channels * math.prod(PATCH_SIZE)
        self.modulation = nn.Parameter(torch.zeros(2, h, dtype=torch.float32, device=config.device))
        self.linear = nn.Linear(h, out, dtype=config.params_dtype, device=config.device)

    def forward(self, x: Tensor, embedding: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """x [tokens, h], embedding [samples, h], lengths of the samples -> [tokens, 4 * out_channels]."""
        shift, scale = (self.modulation + embedding.unsqueeze(1)).unbind(1)
        return self.linear(modulated_norm(x, shift, scale, lengths, self.eps))


class WanModel(MegatronModule):
    """One pipeline stage of the transformer; the whole of it without pipeline parallelism."""

    share_embeddings_and_output_weights = False  # megatron's pipeline asks every model

    def __init__(self, config: WanTransformerConfig, parallel: Parallel | None = None) -> None:
        super().__init__(config)
        self.parallel = parallel = parallel or Parallel.current(config.sequence_parallel)
        self.pre_process, self.post_process = parallel.is_first_stage, parallel.is_last_stage
        self.input_tensor: Tensor | None = None  # from the previous stage, [local tokens, 1, h]
        self.time_embedding = TimeEmbedding(config)
        self.text_embedding = TextEmbedding(config)
        if config.image_dim:
            self.image_embedding = ImageEmbedding(config)
        if self.pre_process:
            features, h = config.in_channels * math.prod(PATCH_SIZE), config.hidden_size
            self.patch_embedding = nn.Linear(features, h, dtype=config.params_dtype, device=config.device)
        numbers = parallel.layer_range(config.num_layers)  # global ones, so that names do not depend on the layout
        self.layers = nn.ModuleDict({str(number): WanLayer(config, parallel) for number in numbers})
        if self.post_process:
            self.head = Head(config)
        self._mark_parameters()

    def forward(
        self, patches: Tensor, timesteps: Tensor, text_embeds: Tensor, packing: Packing,
        image_embeds: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Predict the velocity of a pack.

        Args:
            patches: noisy latents of this context-parallel rank, [packing.num_local_tokens, 4 * in_channels].
            timesteps: one per sample, [samples] in [0, 1000], float32 (bf16 would round them to multiples of 4).
            text_embeds: the samples' texts as `pack_text` makes them, [text rows, text_dim].
            packing: the pack's grids and text lengths, and this context-parallel rank's share of it.
            image_embeds: of an image-to-video model, the samples' images one after another, [257 * samples, image_dim].

        Returns:
            velocity [packing.num_local_tokens, 4 * out_channels], features (pt, ph, pw, c), on the last pipeline
            stage; elsewhere hidden states [local tokens, 1, h] for the next one.
        """
        shard = packing.part(self.parallel.tp_rank, self.parallel.tp) if self.parallel.sequence_parallel else packing
        rotary = packed_rotary(packing, self.config.kv_channels, patches.device)
        embedding, modulation = self.time_embedding(timesteps)
        text = self.text_embedding(text_embeds)
        image = self.image_embedding(image_embeds) if self.config.image_dim else None
        if self.pre_process:
            local = patches[shard.start - packing.start : shard.stop - packing.start]
            x = self.patch_embedding(local.to(self.patch_embedding.weight.dtype))
        else:
            assert self.input_tensor is not None
            x = self.input_tensor.squeeze(1)
        with selective(self.config.recompute_granularity == "selective" and self.training):
            for layer, recompute in self._layers_to_run():
                inputs = (x, modulation, text, image, rotary, shard.local_lengths, packing)
                x = (
                    checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=self._draws)
                    if recompute
                    else layer(*inputs)
                )
        if not self.post_process:
            return x.unsqueeze(1)
        velocity = self.head(x, embedding, shard.local_lengths)
        if self.parallel.sequence_parallel:  # every TP rank computes the same loss, so its gradient is only split
            velocity = gather_from_sequence_parallel_region(velocity, tensor_parallel_output_grad=False)
        return velocity

    def _layers_to_run(self) -> Iterator[tuple[nn.Module, bool]]:
        """Each layer, and whether all of its activations are recomputed in the backward pass."""
        full = self.config.recompute_granularity == "full" and self.training and torch.is_grad_enabled()
        count = len(self.layers)
        if full and self.config.recompute_method == "block":
            count = self.config.recompute_num_layers or 0
        for index, layer in enumerate(self.layers.values()):
            yield layer, full and index < count

    @cached_property
    def _draws(self) -> bool:
        """Whether layers draw random numbers, as adapters with dropout do: recomputed, they must draw the same ones."""
        return any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.layers.modules())

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor] | None) -> None:
        """Take the previous stage's output; megatron's pipeline schedule calls this with a list of one."""
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def _mark_parameters(self) -> None:
        """Tell megatron which gradients to sum over which ranks, and which parameters stay float32 under bf16.

        Under sequence parallelism every parameter that is applied to a shard of the tokens gets a part of its
        gradient only: the norms, the modulation, the head, the patch and time embeddings, but not the text and image
        embeddings, whose input is whole on every rank. (Row-parallel biases are marked by megatron's own layers.)
        """
        for name, parameter in self.named_parameters():
            if name.startswith(EMBEDDERS):
                parameter.pipeline_parallel = True  # summed over the pipeline stages
                # A bucket of its own, so that every stage cuts it alike over its data-parallel ranks: each of these
                # holds no more than its own piece reduced when the stages are summed.
                parameter.shared_embedding = self.parallel.pp > 1
                parameter.shared = not self.pre_process  # counted once in the gradient norm
            split = ("time_embedding.", "patch_embedding.", "head.", "modulation", "cross_norm.")
            if any(part in name for part in split):
                parameter.sequence_parallel = self.parallel.sequence_parallel
        for module in self.modules():
            own = [name for name, value in module.named_parameters(recurse=False) if value.dtype == torch.float32]
            if own and self.config.params_dtype != torch.float32:
                module._keep_in_float32_parameter_names = own  # read by megatron-bridge when it casts the model

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """WAN's initialisation for pretraining, the same weights on every layout.

        Xavier-uniform linears (per projection: q, k and v each), N(0, embedder_init_std) for the text and time MLPs,
        randn / sqrt(h) modulation, zero biases, zero head. Every parameter draws from a generator of its own, seeded by
        its name, and keeps its slice.
        """
        h = self.config.hidden_size
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1)
            elif name.endswith("bias") or name == "head.linear.weight":
                parameter.zero_()
            else:
                split = self.parallel.tp if getattr(parameter, "tensor_model_parallel", False) else 1
                dim = parameter.partition_dim if split > 1 else 0
                shape = list(parameter.shape)
                shape[dim] *= split
                number = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")
                generator = torch.Generator(parameter.device).manual_seed(number)
                whole = torch.empty(shape, device=parameter.device, dtype=torch.float32)
                if "modulation" in name:
                    whole.normal_(0, h**-0.5, generator=generator)
                elif name.startswith(("time_embedding.linear", "text_embedding.linear")):
                    whole.normal_(0, self.config.embedder_init_std, generator=generator)
                else:
                    fused = {"linear_qkv": 3, "linear_kv": 2, "linear_image_kv": 2}.get(name.split(".")[-2], 1)
                    bound = math.sqrt(6 / (shape[1] + shape[0] // fused))
                    whole.uniform_(-bound, bound, generator=generator)
                parameter.copy_(whole.chunk(split, dim)[self.parallel.tp_rank] if split > 1 else whole)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Megatron's distributed checkpoint: one key per parameter, named alike in every layout."""
        state = {}
        for name, module in self.named_children():
            if name != "layers":
                state.update(_replicated(module, f"{prefix}{name}.", self.parallel, name + "." in EMBEDDERS))
        for number, layer in self.layers.items():
            assert isinstance(layer, WanLayer)
            state.update(layer.sharded_state_dict(f"{prefix}layers.{number}.", sharded_offsets, metadata))
        return {key: value for key, value in state.items() if not key.endswith("_extra_state")}  # TE's FP8 state


def _replicated(module: nn.Module, prefix: str, parallel: Parallel, on_every_stage: bool) -> dict[str, Any]:
    """Sharded state of a module that is whole on every rank; the first stage's copy is the one that is saved."""
    state = make_sharded_tensors_for_checkpoint(module.state_dict(keep_vars=True), prefix)
    for tensor in state.values():
        stage = parallel.pp_rank if on_every_stage else 0
        tensor.replica_id = (stage, *tensor.replica_id[1:])
    return state

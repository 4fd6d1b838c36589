"""The model as Megatron-Bridge's training loop asks for it."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.bridge.models.model_provider import ModelProviderMixin

from wan_core import fsdp
from wan_core.architecture import Architecture
from wan_core.config import IMAGE_LENGTH, TEXT_LENGTH, check
from wan_core.convert.mapping import parameter_names
from wan_core.convert.weights import load_into
from wan_core.model.config import WanTransformerConfig, architecture_fields
from wan_core.model.model import WanModel


@dataclass
class WanProvider(WanTransformerConfig, ModelProviderMixin[WanModel]):
    """WanTransformerConfig whose checks wait for `finalize`, so that overrides may change fields first."""

    initial_weights: str | None = None  # a Diffusers folder; None: random weights from init_seed
    freeze: tuple[str, ...] = ()  # patterns of names of parameters that are not trained, as layers.0.*
    seq_length: int = 4096  # Bridge checks that it divides by 2 cp (see finalize); packs have their own lengths
    vocab_size: int = 1  # Bridge builds a tokenizer for every model; nothing reads it
    should_pad_vocab: bool = False
    make_vocab_size_divisible_by: int = 1

    def __post_init__(self) -> None:
        """Nothing yet: see `finalize`."""

    def finalize(self) -> None:
        """Check the layout and fill in what follows from the fields.

        Raises:
            ValueError: the layout cannot work.
        """
        check(
            self.virtual_pipeline_model_parallel_size is None,
            f"virtual_pipeline_model_parallel_size={self.virtual_pipeline_model_parallel_size} is not supported; "
            "leave it out",
        )
        self.seq_length = 4096 * self.context_parallel_size
        WanTransformerConfig.__post_init__(self)

    @classmethod
    def of_architecture(cls, architecture: Architecture, **values: Any) -> WanProvider:
        return cls(**architecture_fields(architecture), **values)

    def provide_distributed_model(self, *args: Any, **kwargs: Any) -> list[WanModel]:
        """Build this rank's model and wrap it for data parallelism, as Bridge asks."""
        fsdp.prepare()
        return super().provide_distributed_model(*args, **kwargs)

    def provide(
        self, pre_process: bool | None = None, post_process: bool | None = None, vp_stage: int | None = None
    ) -> WanModel:
        """Build this rank's pipeline stage with its initial weights. (Which stage it is, the process groups tell.)"""
        model = WanModel(self)
        if self.initial_weights is None:
            model.initialize(self.init_seed)
        else:
            load_into(model, Path(self.initial_weights))
        self._freeze(model)
        return model

    def _freeze(self, model: WanModel) -> None:
        for pattern in self.freeze:
            check(
                bool(fnmatch.filter(parameter_names(self.architecture), pattern)),
                f"model.freeze holds {pattern!r}, which no parameter's name matches; names are such as "
                "layers.0.self_attention.linear_qkv.weight, text_embedding.linear_1.bias, head.modulation",
            )
        for name, parameter in model.named_parameters():
            if any(fnmatch.fnmatch(name, pattern) for pattern in self.freeze):
                parameter.requires_grad_(False)

    def _get_num_floating_point_operations_with_runtime_stats(
        self, batch_size: int, seqlen_sum: int | None, seqlen_squared_sum: int | None,
        cross_seqlen_sum: int | None, cross_seqlen_product_sum: int | None,
    ) -> int:  # fmt: skip
        """Model FLOPs of one step, for Bridge's throughput log: the forward formula of Architecture, three times."""
        assert seqlen_sum is not None and seqlen_squared_sum is not None and cross_seqlen_sum is not None
        h, f = self.hidden_size, self.ffn_hidden_size or 0
        positions = TEXT_LENGTH + (IMAGE_LENGTH if self.image_dim else 0)
        tokens = seqlen_sum * (2 * (6 * h * h + 2 * h * f) + 4 * positions * h)
        attended_to = cross_seqlen_sum * positions // TEXT_LENGTH  # it counts text alone
        return 3 * self.num_layers * (tokens + 4 * h * seqlen_squared_sum + 4 * h * h * attended_to)

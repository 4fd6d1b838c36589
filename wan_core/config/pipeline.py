"""Where the two heavy stages run, and the whole pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from wan_core.config.base import STRICT, check
from wan_core.config.data import EncodeConfig, IndexConfig, ShardConfig
from wan_core.config.model import ConvertConfig, EvaluateConfig, SampleConfig, TrainConfig
from wan_core.config.ranges import Count, CountOrZero, PositiveOrZero, check_ranges
from wan_core.described import described


@described
@dataclass(frozen=True)
class RayConfig:
    """Where encode runs: Ray actors, each holding one VAE and one text encoder."""

    address: str | None = None
    """Address of a Ray cluster, for example ray://head:10001; empty: a Ray of this run's own on this machine."""
    actors: Count = 1
    """Encoders that work side by side, one per GPU."""
    gpus_per_actor: PositiveOrZero = 0.0
    """GPUs of each; 0 encodes on CPUs."""
    cpus_per_actor: PositiveOrZero = 1.0
    """CPU cores that Ray sets aside for each."""
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check_ranges(self)


@described
@dataclass(frozen=True)
class LaunchConfig:
    """Where train runs: torchrun on this machine, on the nodes of a Ray cluster, or under Slurm."""

    launcher: Literal["local", "ray", "slurm"] = "local"
    """torchrun on this machine, on the nodes of the Ray cluster, or under Slurm."""
    nodes: Count = 1
    """Machines that train."""
    processes_per_node: Count = 1
    """Ranks on each machine, one per GPU."""
    gpus_per_node: CountOrZero = 0
    """GPUs of each machine; 0 trains on CPUs with gloo."""
    min_nodes: Count | None = None
    """With Ray: machines that an attempt may begin with when there are not enough; empty: all of `nodes`."""
    placement_seconds: PositiveOrZero = 300.0
    """With Ray: how long to wait for the machines; an autoscaling cluster may have to start them."""
    stop_seconds: PositiveOrZero = 20.0
    """How long the ranks may take to save and end when a run is cancelled; a Prefect worker kills after 30."""
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check_ranges(self)
        check(
            self.launcher != "local" or self.nodes == 1,
            f"launcher='local' cannot start nodes={self.nodes}; choose launcher='ray' or 'slurm', or nodes=1",
        )
        check(
            self.min_nodes is None or self.min_nodes <= self.nodes,
            f"min_nodes={self.min_nodes} exceeds nodes={self.nodes}; leave it empty to need all of them",
        )


Name = Annotated[str, Field(json_schema_extra={"pattern": r"^[\w-]+$"})]  # for the form; it names folders


@described
@dataclass(frozen=True)
class PipelineConfig:
    """The end-to-end flow: one config per stage, and where the two heavy stages run."""

    name: Name = "wan"
    """Names the dataset and the run inside the workspace."""
    encode: EncodeConfig = EncodeConfig()
    shard: ShardConfig = ShardConfig()
    index: IndexConfig = IndexConfig()
    train: TrainConfig = TrainConfig()
    convert: ConvertConfig = ConvertConfig()
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    ray: RayConfig = RayConfig()
    launch: LaunchConfig = LaunchConfig()
    __pydantic_config__ = STRICT

    def __post_init__(self) -> None:
        check(
            bool(self.name) and all(c.isalnum() or c in "-_" for c in self.name),
            f"name={self.name!r} is not made of letters, digits, - and _; it names folders, so choose another",
        )

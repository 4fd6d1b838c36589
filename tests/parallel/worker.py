"""One rank's work in every layout. See `tests.parallel.layouts`, which starts it."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import start_processes

from tests.model.reference import reference_model  # imports diffusers, which must come before the line below
from tests.parallel.layouts import Layout
from wan_core.architecture import Architecture
from wan_core.config import TrainConfig
from wan_core.runtime import cpu

cpu.install()  # before megatron.bridge is imported

import megatron.bridge.training.initialize as bridge_initialize  # noqa: E402
from megatron.bridge.training.callbacks import Callback, CallbackContext  # noqa: E402
from megatron.bridge.training.pretrain import pretrain  # noqa: E402
from megatron.bridge.training.utils.checkpoint_utils import read_run_config, read_train_state  # noqa: E402
from megatron.core.utils import get_model_config  # noqa: E402

from wan_core.convert.checkpoint import has_checkpoint  # noqa: E402
from wan_core.convert.formats import loadable  # noqa: E402
from wan_core.data.batch import Pack  # noqa: E402
from wan_core.data.synthetic import SyntheticConfig  # noqa: E402
from wan_core.dataset import WanDatasetProvider  # noqa: E402
from wan_core.parallel import Parallel  # noqa: E402
from wan_core.recipes import WanConfigContainer, build  # noqa: E402
from wan_core.step import WanStep  # noqa: E402

# 3 layers do not divide over 2 stages, and the embedders are so large a part that a cut between two ranks' shares of a
# stage goes through them. On GPUs, 128 features a head as WAN has: kernels differ by that number.
GPU = torch.cuda.is_available()
SMALL = Architecture(512 if GPU else 64, 160, 4, 3, text_dim=4096 if GPU else 512, freq_dim=64)
SMALL_I2V = dataclasses.replace(SMALL, in_channels=36, image_dim=24)
# 45 + 9 + 35 + 24 tokens: an odd sum, so that CP and SP pad. On GPUs 4500 + 841 + 3500 + 2400: short samples would go
# to another kernel than WAN's; again an odd sum, and the second of two ranks holds nothing of the first sample.
FOUR_SAMPLES = ("3x60x100", "1x58x58", "5x20x140", "1x80x120") if GPU else ("3x6x10", "1x6x6", "5x2x14", "1x8x12")
ONE_SAMPLE = ("3x80x120",) if GPU else ("3x8x12",)  # 7200 tokens; 72
I2V_MODEL = "i2v-model"


class SplitSamples:
    """The samples of each step, in order, split evenly over `packs` packs; the data-parallel ranks take turns."""

    def __init__(self, samples: SyntheticConfig, packs: int, parallel: Parallel) -> None:
        assert packs % parallel.dp == 0 and len(samples.shapes) % packs == 0, (packs, parallel.dp, samples.shapes)
        self.samples, self.packs, self.dp, self.number = samples, packs, parallel.dp, parallel.dp_rank

    def __iter__(self) -> SplitSamples:
        return self

    def __next__(self) -> Pack:
        step, part = divmod(self.number, self.packs)
        self.number += self.dp
        pack, size = self.samples.pack(step), len(self.samples.shapes) // self.packs
        cut = slice(part * size, (part + 1) * size)
        return dataclasses.replace(
            pack, latents=pack.latents[cut], text_embeds=pack.text_embeds[cut], seeds=pack.seeds[cut],
            first_frames=pack.first_frames[cut],
        )  # fmt: skip


@dataclass(kw_only=True)
class SplitSamplesProvider(WanDatasetProvider):
    """The dataset section: the same samples in every layout."""

    packs: int = 1
    first_step: int = 0

    def build_datasets(self, context: Any) -> tuple[Any, Any, Any]:
        samples = SyntheticConfig(
            shapes=self.mock_shapes, text_dim=self.mock_text_dim, image_dim=self.mock_image_dim
        )  # fmt: skip
        loader = SplitSamples(samples, self.packs, Parallel.current())
        loader.number += self.first_step * self.packs
        return loader, None, None


class Recorder(Callback):
    """Keeps each step's loss and gradient norm, the first step's gradients and the last step's weights."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.grad_norms: dict[int, float] = {}
        self.gradients: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        self.split: dict[str, int] = {}  # the dimension that TP splits, of the parameters that it does split
        self.parallel = Parallel()

    def on_train_start(self, context: CallbackContext) -> None:
        self.parallel = Parallel.current()
        config = get_model_config(context.model[0])
        finalize = config.finalize_model_grads_func
        assert finalize is not None

        def finalize_and_record(*args: Any, **kwargs: Any) -> None:  # gradients are whole now, and not yet clipped
            finalize(*args, **kwargs)
            config.finalize_model_grads_func = finalize
            self.gradients = dict(whole_gradients(context.model[0]))

        config.finalize_model_grads_func = finalize_and_record

    def on_train_step_end(self, context: CallbackContext) -> None:
        assert context.grad_norm is not None and not context.skipped_iter
        step = context.state.train_state.step + 1
        self.grad_norms[step] = float(context.grad_norm)
        if self.parallel.is_last_stage:
            assert context.loss_dict
            self.losses[step] = float(context.loss_dict["loss"])

    def on_train_end(self, context: CallbackContext) -> None:
        for name, parameter in plain_model(context.model[0]).named_parameters():
            self.weights[name] = whole(parameter.detach())
            if getattr(parameter, "tensor_model_parallel", False) and self.parallel.tp > 1:
                self.split[name] = getattr(parameter, "partition_dim")  # noqa: B009  (megatron's own attribute)

    def save(self, path: Path) -> None:
        """What this rank knows, for `compare.read_run`."""
        p = self.parallel
        torch.save(
            {
                "tp": p.tp, "tp_rank": p.tp_rank, "losses": self.losses, "grad_norms": self.grad_norms,
                "gradients": self.gradients, "weights": self.weights, "split": self.split,
            },
            path,
        )  # fmt: skip


def plain_model(model: nn.Module) -> nn.Module:
    """The model inside of Megatron's wrappers."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return model


def whole(tensor: Tensor) -> Tensor:
    """A copy in float32 on the CPU, put together from the data-parallel ranks' rows where Megatron-FSDP shards it."""
    if isinstance(tensor, DTensor):
        group = tensor.device_mesh.get_group(0)
        parts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, tensor.to_local().cpu(), group=group)  # of uneven sizes
        tensor = torch.cat(parts)
    return tensor.float().cpu().clone()


def whole_gradients(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every parameter's averaged gradient on this rank, before clipping.

    The distributed optimizer leaves each rank only its own shard of a bucket reduced; gathering puts them together.
    """
    if model.ddp_config.use_megatron_fsdp:
        for name, gradient in sorted(model.param_and_grad_buffer.dist_main_grad.items()):
            yield re.sub(r"^(module\.)+", "", name), whole(gradient)
        return
    assert model.ddp_config.use_distributed_optimizer
    for buffer in model.buffers:
        ranks = buffer.data_parallel_group.size()
        for bucket in buffer.buckets:
            shard = bucket.grad_data.chunk(ranks)[buffer.data_parallel_group.rank()].clone()
            dist.all_gather_into_tensor(bucket.grad_data, shard, group=buffer.data_parallel_group)
    for name, parameter in plain_model(model).named_parameters():
        yield name, whole(getattr(parameter, "main_grad"))  # noqa: B009  (megatron's own attribute)


def write_model(folder: Path) -> None:
    """A Diffusers folder with random weights in every place: WAN's own start has a zero head, which hides all else.
    Beside it one for image-to-video."""
    for path, architecture in ((folder, SMALL), (folder.with_name(I2V_MODEL), SMALL_I2V)):
        if not path.exists():
            reference_model(architecture).save_pretrained(path / "transformer")


def container(layout: Layout, out: Path, steps: int, extra: list[str]) -> WanConfigContainer:
    """The config of the first half of `steps` steps; of all of them, or the second half, where the layout says so."""
    half = steps // 2
    overrides = (*layout.overrides(), f"train.train_iters={steps if layout.long or layout.load else half}", *extra)
    config = build(
        TrainConfig("wan_demo", "finetune", overrides), model_dir=out / (I2V_MODEL if layout.i2v else "model"),
        dataset_dir=None, run_dir=None, mock=True,
    )  # fmt: skip
    config.dataset = SplitSamplesProvider(
        mock=True, mock_shapes=ONE_SAMPLE if layout.single else FOUR_SAMPLES, packs=layout.packs,
        mock_text_dim=config.model.text_dim, mock_image_dim=config.model.image_dim,
        first_step=half if layout.load else 0,
    )  # fmt: skip
    config.scheduler.lr_decay_style, config.scheduler.lr_warmup_iters = "constant", 0
    config.logger.log_interval = sys.maxsize
    config.checkpoint.save_interval = half
    config.checkpoint.save = str(out / layout.folder / "checkpoints") if layout.save else None
    config.checkpoint.load = str(out / layout.load / "checkpoints") if layout.load else None
    assert layout.load is None or has_checkpoint(Path(str(config.checkpoint.load))), f"{layout.name} has none to load"
    return config


@contextlib.contextmanager
def process_group(store: dist.Store, rank: int, ranks: int) -> Iterator[None]:
    """The default process group, among the first `ranks` of all ranks."""
    if GPU:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
    backend = "nccl" if GPU else "gloo"
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=ranks, timeout=timedelta(minutes=30)
    )  # idle ranks wait for their turn
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run(layout: Layout, out: Path, steps: int, extra: list[str]) -> float:
    """Train in one layout; returns the seconds."""
    since = time.perf_counter()
    folder = out / layout.folder
    folder.mkdir(parents=True, exist_ok=True)
    for cached in (read_run_config, read_train_state):  # they broadcast when they read: the next layout's ranks may not
        cached.cache_clear()
    bridge_initialize.compile_helpers = lambda: None  # GPT dataset helpers; pip's package has no Makefile for them
    config, recorder = container(layout, out, steps, extra), Recorder()
    with loadable(config.checkpoint):
        pretrain(config, WanStep(config.flow_matching), callbacks=[recorder])
    recorder.save(folder / f"rank{dist.get_rank()}.pt")
    return time.perf_counter() - since


def work(rank: int, store: dist.Store, layouts: list[Layout], out: Path, steps: int, extra: list[str]) -> None:
    """One rank's part in all layouts; those of fewer ranks pass it by."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=os.environ.get("LOCAL_RANK", str(rank)))
    for number, layout in enumerate(layouts):
        if rank < layout.ranks:
            os.environ["WORLD_SIZE"] = str(layout.ranks)
            with process_group(dist.PrefixStore(str(number), store), rank, layout.ranks):
                seconds = run(layout, out, steps, extra)
            if rank == 0:
                print(f"layout {layout.name}: {seconds:.1f} s", flush=True)


def started(layouts: list[Layout], out: Path, steps: int, extra: list[str]) -> None:
    """Work as one of torchrun's ranks."""
    store, rank, _ = next(dist.rendezvous("env://"))
    if rank == 0:
        write_model(out / "model")
        store.set("model", "written")
    store.wait(["model"])
    work(rank, store, layouts, out, steps, extra)


def fork(stores: Path, layouts: list[Layout], out: Path, steps: int, extra: list[str]) -> None:
    """Work in forks of this process, new ones for each layout; the first failure ends it.

    Gloo's threads outlive their process groups: in one process, 30 layouts leave over a thousand of them polling.
    """
    write_model(out / "model")
    gc.freeze()  # else each fork's first collection walks through, and copies, all that was imported
    for number, layout in enumerate(layouts):
        arguments = (layout, stores / str(number), out, steps, extra)
        start_processes(_forked, arguments, nprocs=layout.ranks, start_method="fork")


def _forked(rank: int, layout: Layout, store: Path, *arguments: Any) -> None:
    work(rank, dist.FileStore(str(store), layout.ranks), [layout], *arguments)

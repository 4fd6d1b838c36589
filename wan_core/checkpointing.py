"""Bridge's checkpoint manager, made atomic: sealed when whole, thinned out, and a sentence when the disk is full."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import queue
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import yaml
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.checkpointing import CheckpointSaveContext, DefaultCheckpointManager
from megatron.bridge.training.config import CheckpointConfig
from megatron.bridge.training.state import GlobalState
from megatron.bridge.utils.instantiate_utils import register_allowed_target_prefix
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint import CheckpointException

from wan_core import async_writer, checkpoints
from wan_core.architecture import Architecture
from wan_core.config import check
from wan_core.convert.checkpoint import has_checkpoint, iteration_dir
from wan_core.data.stream import Position
from wan_core.model.config import architecture_fields

register_allowed_target_prefix("wan_core.")  # Bridge builds no other classes by name
async_writer.install(GlobalState)
# Bridge writes run_config.yaml with every checkpoint: 0.5 s by PyYAML's own writer, while all ranks wait.
yaml.SafeDumper = yaml.CSafeDumper  # type: ignore[misc, assignment]


@dataclass(kw_only=True)
class WanCheckpointConfig(CheckpointConfig):
    """Bridge's section, with a retention that can spare every k-th checkpoint."""

    keep_last: int = 0  # so many of the latest checkpoints stay; 0: all
    keep_every: int = 0  # multiples of this iteration stay, too; 0: none
    custom_manager_class: str | None = "wan_core.checkpointing.CheckpointManager"

    def finalize(self) -> None:
        """Raises `ValueError` for a retention that cannot be meant."""
        check(self.keep_last >= 0, f"checkpoint.keep_last={self.keep_last} is negative; choose 0 to keep all")
        check(self.keep_every >= 0, f"checkpoint.keep_every={self.keep_every} is negative; choose 0 for none")
        check(
            self.most_recent_k == -1,
            f"checkpoint.most_recent_k={self.most_recent_k} is not used here; set checkpoint.keep_last, beside which "
            "checkpoint.keep_every can spare every k-th one",
        )
        check(
            not self.async_save or torch.cuda.is_available(),
            "checkpoint.async_save=true needs a GPU: its writer is a process of Megatron's own; set it to false",
        )
        super().finalize()


class CheckpointManager(DefaultCheckpointManager):
    """Saves through Bridge. Built by Bridge, from `checkpoint.custom_manager_class`."""

    current: ClassVar[CheckpointManager]  # Bridge hands it to no callback

    def __init__(self, checkpoint_config: WanCheckpointConfig) -> None:
        super().__init__(checkpoint_config)
        self.config = checkpoint_config
        self.last: int | None = None  # iteration that was saved last
        self._written: deque[tuple[int, dict[str, Any]]] = deque()  # saves under way, oldest first
        CheckpointManager.current = self

    def save(self, ctx: CheckpointSaveContext, callback_manager: Any) -> None:
        """Write a checkpoint; with `async_save` only begin to.

        Raises:
            CheckpointError: it could not be written; those before it are as they were.
        """
        iteration = ctx.state.train_state.step
        if iteration == self.last:  # the interval and the end of the run fell together
            return
        folder = checkpoints.folder_of(self.folder, iteration)
        state = {name: state() for name, state in saved_parts(callback_manager).items()}
        with self._explained(folder):
            self._check_room()
            dist.barrier()  # after a rollback the folder is an older checkpoint, which other ranks have looked at now
            if dist.get_rank() == 0:
                checkpoints.begin(folder)
            dist.barrier()
            with contextlib.nullcontext() if self.config.async_save else _queue_of_this_process():
                super().save(ctx, callback_manager)
            self.last = iteration
            self._written.append((iteration, state))
            if not self.config.async_save:
                self._seal()

    def finalize_async_saves(self, state: Any, blocking: bool = False, terminate: bool = False) -> None:
        """Seal what was written in the background meanwhile. All ranks call it together."""
        if not self._written:
            super().finalize_async_saves(state, blocking, terminate)
            return
        with self._explained(checkpoints.folder_of(self.folder, self._written[0][0])):
            super().finalize_async_saves(state, blocking, terminate)
            while len(self._written) > state.async_calls_queue.get_num_unfinalized_calls():
                self._seal()

    @property
    def folder(self) -> Path:
        return Path(self.config.save)

    def _seal(self) -> None:
        iteration, state = self._written.popleft()
        if dist.get_rank() == 0:
            checkpoints.seal(checkpoints.folder_of(self.folder, iteration), state)
            own = [i for i in checkpoints.whole_iterations(self.folder) if checkpoints.is_sealed(self.folder, i)]
            for old in checkpoints.expired(own, self.config.keep_last, self.config.keep_every):
                checkpoints.remove(checkpoints.folder_of(self.folder, old))
            print(f"checkpoint {iteration} saved to {self.folder}", flush=True)
        dist.barrier()

    def _check_room(self) -> None:
        """Refuse to begin what would end half-way: a checkpoint takes as much as the one before."""
        before = checkpoints.latest(self.folder)
        if before is None:
            return
        needed = checkpoints.num_bytes(checkpoints.folder_of(self.folder, before))
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"a checkpoint takes {needed / 2**30:.2f} GiB")

    @contextlib.contextmanager
    def _explained(self, folder: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, CheckpointException) as error:
            shutil.rmtree(folder, ignore_errors=True)  # what it holds is lost, and its room is needed
            free = shutil.disk_usage(self.folder).free / 2**30
            before = checkpoints.latest(self.folder)
            left = "there is no earlier one" if before is None else f"checkpoint {before} is whole"
            raise CheckpointError(
                f"{folder} could not be written ({free:.2f} GiB are free there): {str(error).splitlines()[0]}; {left}. "
                "Make room, or set checkpoint.save or checkpoint.keep_last; the same command goes on from there"
            ) from error


@contextlib.contextmanager
def _queue_of_this_process() -> Iterator[None]:
    """Spare a save that no other process carries out the process that megatron starts to pass it messages."""
    filesystem_async._results_queue = queue.Queue()
    try:
        yield
    finally:
        filesystem_async._results_queue = None


class CheckpointError(RuntimeError):
    """A checkpoint could not be written."""


def saved_parts(callback_manager: Any) -> dict[str, Callable[[], Any]]:
    """What callbacks want to find again after a resume: functions that return JSON values, by name."""
    return callback_manager.user_state.setdefault("saved", {}) if callback_manager is not None else {}


class Resume(Callback):
    """Gives the loader its place in the data, and every checkpoint the loader's. First of the callbacks.

    What the loaded checkpoint knew lies in `user_state["loaded"]` for those behind; what they add to
    `user_state["saved"]` goes into every checkpoint.
    """

    def on_data_init_start(self, context: CallbackContext) -> None:
        config, done = context.state.cfg, context.state.train_state
        loaded = checkpoints.read_state(loaded_folder(config.checkpoint, done.step)) if done.step else {}
        # Without a place in the data (a checkpoint of Bridge's own) the stream is packed anew up to that pack.
        place = loaded.get("data", {"pack": done.consumed_train_samples})
        config.dataset.go_on_from(Position(**place))
        context.user_state["loaded"] = loaded
        context.user_state.setdefault("saved", {})["data"] = lambda: dataclasses.asdict(config.dataset.loader.position)


def loaded_folder(config: CheckpointConfig, step: int) -> Path:
    """The folder that a resumed run was loaded from."""
    load = Path(config.load)
    return load if load.name.startswith("iter_") else checkpoints.folder_of(load, step)


def prepare_resume(container: Any, rank: int) -> None:
    """Before any group exists: clear away what a killed run left half-written, and refuse a foreign checkpoint.

    Raises:
        ValueError: the checkpoint is of another architecture, or there is none in a folder that is not the run's own.
    """
    save, load = container.checkpoint.save, container.checkpoint.load
    if rank == 0 and save is not None and Path(save).is_dir():
        checkpoints.repair(Path(save))  # Bridge loads much later, behind barriers
    if load is not None and (load != save or has_checkpoint(Path(load))):  # a run's first start has none to go on from
        check_architecture(iteration_dir(Path(load)), container.model)


def check_architecture(folder: Path, model: Any) -> None:
    """Refuse a checkpoint of another architecture before anything is loaded.

    Raises:
        ValueError: it differs; names the fields and both values.
    """
    found = yaml.safe_load((folder / "run_config.yaml").read_text(encoding="utf-8"))["model"]
    pairs = {name: (found.get(name), getattr(model, name)) for name in architecture_fields(Architecture(64, 64, 1, 1))}
    differing = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    check(
        not differing,
        f"checkpoint {folder} is of another architecture: "
        + ", ".join(f"{name}={theirs}, here {ours}" for name, (theirs, ours) in differing.items())
        + "; choose another run folder (or checkpoint.load), or the model that it was trained from",
    )

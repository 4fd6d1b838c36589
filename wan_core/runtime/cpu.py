"""Megatron-Bridge's training loop on a host without CUDA.

Megatron asks torch.cuda for devices, streams, memory and random state, and Bridge imports GPU-only packages.
`install()` answers those calls with the CPU, so that the very loop that trains on GPUs runs under gloo: for the demo,
and for tests of every parallel layout. It does nothing where a CUDA device exists.

Call it before megatron.bridge is imported.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._device import _device_constructors

CPU = torch.device("cpu")
GPU_ONLY_PACKAGES = (
    "transformer_engine", "transformer_engine.pytorch", "nvidia_resiliency_ext", "nvidia_resiliency_ext.inprocess",
)  # fmt: skip


def install() -> None:
    """Answer megatron's CUDA calls with the CPU, unless there is a CUDA device."""
    if torch.cuda.is_available() or getattr(install, "done", False):
        return
    install.done = True  # type: ignore[attr-defined]
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling megatron's small fusions takes 20 s and gains nothing
    warnings.filterwarnings("ignore", module="megatron|modelopt")  # a page about absent GPU packages
    import megatron.core.extensions.transformer_engine
    import peft  # noqa: F401  (asks which GPU packages there are, and must not see the placeholders)

    with _placeholders():
        import megatron.bridge.peft.dora
        import megatron.bridge.peft.lora
        import megatron.bridge.training.config
        import megatron.bridge.training.pretrain
    megatron.bridge.peft.utils.HAVE_TE = False  # megatron's own placeholders for its layers are no types
    _answer_cuda_calls()
    _send_to_cpu()
    _adapt_megatron()


class _Anything(type):
    """A class whose attributes are classes like itself: enough for `class A(package.B)` and annotations."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _Anything(name, (), {})
        setattr(cls, name, value)
        return value


class _Placeholder(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012  (makes it a package)
    __version__ = "2.20.2"  # Bridge compares it

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


@contextlib.contextmanager
def _placeholders() -> Iterator[None]:
    """Stand-ins for GPU-only packages while Bridge is imported; gone afterwards, so nobody takes them for real."""
    absent = [name for name in GPU_ONLY_PACKAGES if name not in sys.modules]
    sys.modules.update({name: _Placeholder(name) for name in absent})
    try:
        yield
    finally:
        for name in absent:
            sys.modules.pop(name, None)


class _Stream:
    """The one stream of a CPU: everything that was asked for is done."""

    device = CPU
    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 0.0


def _answer_cuda_calls() -> None:
    def nothing(*_: Any, **__: Any) -> None: ...

    def zero(*_: Any, **__: Any) -> int:
        return 0

    stream = _Stream()
    answers: dict[str, Any] = {
        "current_device": zero, "device_count": lambda: 1, "set_device": nothing, "synchronize": nothing,
        "empty_cache": nothing, "reset_peak_memory_stats": nothing, "set_stream": nothing,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed, "memory_stats": lambda *_, **__: collections.defaultdict(int),
        "memory_allocated": zero, "max_memory_allocated": zero, "memory_reserved": zero, "max_memory_reserved": zero,
        "Stream": _Stream, "Event": _Event, "current_stream": lambda *_: stream, "default_stream": lambda *_: stream,
        "stream": lambda _: contextlib.nullcontext(), "get_device_capability": lambda *_: (0, 0),
        "get_device_properties": lambda *_: types.SimpleNamespace(
            name="cpu", total_memory=8 << 30, major=0, minor=0, multi_processor_count=1
        ),
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[assignment,method-assign]
    torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[assignment,method-assign]


def _send_to_cpu() -> None:
    """Make every tensor that is asked for on "cuda" on the CPU, and name its type as the GPU's.

    Each function that takes a device is wrapped. (A TorchFunctionMode would be shorter, but is called for every
    operation of a step: a fifth of the demo's time.)
    """

    def on_cpu(value: Any) -> Any:
        if isinstance(value, str):
            return CPU if value.startswith("cuda") else value
        return CPU if isinstance(value, torch.device) and value.type == "cuda" else value

    def wrapped(function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if "device" in kwargs:  # a number is torch.cuda.current_device()'s
                kwargs["device"] = CPU if isinstance(kwargs["device"], int) else on_cpu(kwargs["device"])
            elif function is move and type(args[-1]) is int:
                args = (*args[:-1], CPU)
            return function(*map(on_cpu, args), **kwargs)

        return call

    move: Any = torch.Tensor.to
    constructors = _device_constructors()
    for name, value in list(vars(torch).items()):
        if callable(value) and value in constructors:
            setattr(torch, name, wrapped(value))
    for name in ("to", "new_empty", "new_full", "new_ones", "new_tensor", "new_zeros"):
        setattr(torch.Tensor, name, wrapped(getattr(torch.Tensor, name)))
    name_of = torch.Tensor.type

    def type_name(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = name_of(self, *args, **kwargs)  # megatron's optimizer compares these names
        return found.replace("torch.", "torch.cuda.") if isinstance(found, str) else found

    torch.Tensor.type = type_name  # type: ignore[assignment,method-assign]


def _adapt_megatron() -> None:
    import megatron.bridge.training.setup as bridge_setup
    import megatron.core.tensor_parallel.random as megatron_random

    bridge_setup.initialize_megatron = functools.partial(bridge_setup.initialize_megatron, allow_no_cuda=True)
    bridge_setup.set_jit_fusion_options = lambda *_, **__: None  # warms up CUDA fusions
    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    _load_adam_state()
    _complete_collectives()


def _complete_collectives() -> None:
    """Let coalesced collectives end before anything else happens.

    Megatron-FSDP frees gathered weights once the CUDA stream has passed them. Gloo works on threads of its own, which
    no stream orders: it would write to memory that is gone.
    """
    from torch.distributed.distributed_c10d import _CoalescingManager

    def wait(self: _CoalescingManager, work: Any = None) -> None:
        if work is not None:
            work.wait()

    setattr(_CoalescingManager, "append", wait)  # noqa: B010  (mypy: a method)


def _load_adam_state() -> None:
    """Let a run resume: without Transformer Engine megatron falls back to torch's AdamW, whose state it cannot load.

    It asks an optimizer that has not stepped yet for its number of steps, expects that number beside every
    parameter's moments, where it is not saved, and hands all parameters one tensor to count their steps in, which
    each parameter's update then increments.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    sharded_state_dict, load_state_dict = DistributedOptimizer.sharded_state_dict, DistributedOptimizer.load_state_dict
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    @functools.wraps(sharded_state_dict)
    def sharded(self: Any, model: Any, is_loading: bool = False, *args: Any, **kwargs: Any) -> Any:
        if is_loading and not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()
        return sharded_state_dict(self, model, is_loading, *args, **kwargs)

    @functools.wraps(set_states)
    def set_without_step(self: Any, parameter: Any, tensors: dict[str, Any]) -> None:
        set_states(self, parameter, {"step": None, **tensors})

    @functools.wraps(load_state_dict)
    def load(self: Any, state_dict: Any) -> None:
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    DistributedOptimizer.sharded_state_dict = sharded
    DistributedOptimizer.load_state_dict = load
    DistributedOptimizer._set_main_param_and_optimizer_states = set_without_step

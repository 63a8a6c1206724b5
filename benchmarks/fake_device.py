"""A device that is none, on which the waits of the host for the device are counted.

``FakeDevice`` is a dispatch mode of torch: tensors that are moved to the device ``lazy`` keep their numbers
on the CPU but report that device, so that every operation that a GPU would queue passes one place. A *wait*
is an operation at which the host stops until the device has done all that was queued before:

- reading a number (``item``, ``float``, ``bool``), and any copy to the CPU (``tolist``, ``cpu``);
- a copy from the CPU without ``non_blocking``, also of an index or of ``torch.tensor(x, device=...)``, after
  which torch synchronises the stream;
- an operation whose result has a size that numbers decide (``nonzero``, a mask as an index, ``unique``).

These are the operations that ``torch.cuda.set_sync_debug_mode`` reports. Not seen: waits inside of a kernel
or a library (an allocation when memory is full, a collective), copies of more than 64 KiB from memory that is
not pinned (``utils.transfer.sent`` pins them), float16's loss scaling, and the fused optimizer, which exists
for real devices alone. As on a GPU, an operation of tensors of both devices is an error.
"""

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

ROOT = Path(__file__).parents[1]
DEVICE = torch.device("lazy")
"""A device type of torch whose backward runs in the calling thread, and that no library treats apart."""

_SIZED = {
    "nonzero", "masked_select", "unique_dim", "unique_consecutive", "_unique2", "bincount", "equal",
    "multinomial", "repeat_interleave",
}  # fmt: skip
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


@dataclass(frozen=True)
class Wait:
    """A wait: the operation, and the line of this repository that made it."""

    operation: str
    place: str


class Placed(Tensor):
    """A tensor on the fake device; ``held`` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Placed":
        """Return the tensor that reports the fake device."""
        made: Placed = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=DEVICE, requires_grad=False,
        )  # fmt: skip
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:
        """Return the numbers, without an operation."""
        return f"Placed({self.held!r})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """Return the names of inner tensors, so that a module swaps its parameters when it is moved."""
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> "Placed":
        """Return the tensor of its inner ones."""
        return Placed(inner["held"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute on the numbers, also where no mode is active."""
        return _computed(func, args, kwargs or {})


def _held(values: Any) -> Any:
    return tree_map_only(Placed, lambda tensor: tensor.held, values)


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Return an operation's result on the fake device."""
    named = {**_held(kwargs), "device": torch.device("cpu")} if "device" in kwargs else _held(kwargs)
    result = func(*_held(args), **named)
    placed = tree_map_only(Tensor, lambda t: t if isinstance(t, Placed) else Placed(t), result)
    return return_and_correct_aliasing(func, args, kwargs, placed)


class _Made(TorchFunctionMode):
    """Numbers of Python become tensors on the CPU, which are then copied, as torch does it for a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        if func is Tensor.tolist and isinstance(args[0], Placed):
            return args[0].cpu().tolist()  # torch refuses it for subclasses
        if func is Tensor.new_tensor:
            named = {"dtype": args[0].dtype, "device": args[0].device, **named}
            func, args = torch.tensor, args[1:]
        made = func in (torch.tensor, torch.as_tensor)
        if not made or torch.device(named.get("device") or "cpu") != DEVICE:
            return func(*args, **named)
        del named["device"]
        return func(*args, **named).to(DEVICE)


class FakeDevice(TorchDispatchMode):
    """Within it, ``lazy`` is a device; ``waits`` are those so far."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Wait] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute one operation, and note whether the host would wait."""
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in ("_to_copy", "copy_"):
            return self._copied(name, func, args, kwargs)
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = any(isinstance(leaf, Placed) for leaf in leaves)
        target = kwargs.get("device")
        if not here and (target is None or torch.device(target) != DEVICE):
            return func(*args, **kwargs)
        if here and target is not None and torch.device(target) != DEVICE:  # zeros_like(x, device="cpu")
            return func(*_held(args), **_held(kwargs))
        if name == "_local_scalar_dense":
            self._note(name)
            return func(*_held(args))
        self._check(name, args, kwargs, leaves)
        return _computed(func, args, kwargs)

    def _check(self, name: str, args: Any, kwargs: dict[str, Any], leaves: Sequence[Tensor]) -> None:
        """Note a wait of an operation on the device; RuntimeError for one of both devices."""
        if name in _SIZED:
            if kwargs.get("output_size") is None:
                self._note(name)
        elif name in _INDEXED:
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self._note(f"{name} with a mask")
            elif not all(isinstance(index, Placed) for index in indices):
                self._note(f"{name} with an index on the CPU")
        elif strays := [leaf for leaf in leaves if leaf.ndim and not isinstance(leaf, Placed)]:
            raise RuntimeError(
                f"{name} of tensors on two devices: one of {tuple(strays[0].shape)} on the CPU"
            )

    def _copied(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Copy, within a device or between the two."""
        asynchronous = kwargs.get("non_blocking", False)
        if name == "copy_":
            target, source, *rest = args
            into, out_of = isinstance(target, Placed), isinstance(source, Placed)
            asynchronous = asynchronous or any(rest)
        else:
            out_of = isinstance(args[0], Placed)
            wanted = kwargs.get("device")
            into = out_of if wanted is None else torch.device(wanted) == DEVICE
        if not into and not out_of:
            return func(*args, **kwargs)
        if out_of and not into:
            self._note("copy to the CPU")
        elif into and not out_of and not asynchronous and not (name == "copy_" and not source.ndim):
            self._note("copy from the CPU")
        if into:
            return _computed(func, args, kwargs)
        return func(*_held(args), **_held(kwargs))

    def _note(self, operation: str) -> None:
        self.waits.append(Wait(operation, _place()))


def _place() -> str:
    """Return the innermost line of the package; without one, of this repository outside of this file."""
    stack = [(Path(frame.f_code.co_filename), line) for frame, line in traceback.walk_stack(None)]
    rooms = [ROOT / name for name in ("diffalign", "benchmarks", "tests")]
    here = [
        (file, line)
        for file, line in stack
        if any(file.is_relative_to(room) for room in rooms) and file != Path(__file__)
    ]
    own = [(file, line) for file, line in here if file.is_relative_to(rooms[0])]
    file, line = (own or here)[0]
    return f"{file.relative_to(ROOT)}:{line}"


class _Autocast(torch.autocast):
    """Autocast that is off on the fake device, for which torch has none."""

    def __init__(self, device_type: str, *args: Any, **named: Any):
        """Take the arguments of ``torch.autocast``."""
        if device_type == DEVICE.type:
            device_type, args, named = "cpu", (), {"enabled": False}
        super().__init__(device_type, *args, **named)


@contextmanager
def fake_device(accelerator: Accelerator | None = None) -> Iterator[FakeDevice]:
    """Within the context, ``lazy`` is a device, and that of ``accelerator`` if one is given."""
    state = None if accelerator is None else accelerator.state
    before, autocast = None if state is None else state.device, torch.autocast
    torch.autocast = _Autocast  # type: ignore[misc]
    setattr(torch, DEVICE.type, SimpleNamespace(manual_seed=lambda seed: None))  # torch.get_device_module
    try:
        if state is not None:
            state.device = DEVICE
        with FakeDevice() as device, _Made():
            yield device
    finally:
        if state is not None:
            state.device = before
        torch.autocast = autocast  # type: ignore[misc]
        delattr(torch, DEVICE.type)

"""A safetensors file written tensor by tensor, without a second copy of the weights in memory.

Layout (huggingface/safetensors, README "Format"): eight bytes of little-endian header length, a JSON header
padded with spaces, then the tensors' bytes without gaps.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffalign.utils.files import open_atomic

_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Entry:
    """One tensor of the file.

    Attributes:
        name: in the file.
        shape: of the tensor.
        dtype: that it is written in.
        make: returns the tensor, in any dtype; called once, when the tensor is written.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Bytes."""
        count = 1
        for side in self.shape:
            count *= side
        return count * self.dtype.itemsize


def write_safetensors(path: Path, entries: Sequence[Entry], metadata: Mapping[str, str]) -> int:
    """Write the entries in their order; the file appears when it is complete.

    Returns:
        Bytes written.

    Raises:
        ValueError: two entries of one name, or a tensor of another shape than announced.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for entry in entries:
        if entry.name in header:
            raise ValueError(f"two tensors are named {entry.name}")
        header[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [end, end + entry.size],
        }
        end += entry.size
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open_atomic(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            tensor = entry.make().detach().to("cpu", entry.dtype).contiguous()
            if tuple(tensor.shape) != entry.shape:
                raise ValueError(f"{entry.name} is {tuple(tensor.shape)}, announced {entry.shape}")
            if tensor.numel():
                file.write(tensor.flatten().view(torch.uint8).numpy().data)
    return 8 + len(text) + end

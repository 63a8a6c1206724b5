"""Tensors on disk under the name of what they were computed from.

A file's name is a digest of its inputs, so it never needs to be brought up to date: it is there or it is not.
Writing is atomic (a temporary name in the same folder, then os.replace), so that several processes may write
the same file; each file carries a digest of its tensors, and one that does not match is as good as absent.
"""

import errno
import shutil
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from diffalign.data.reading.examples import digest
from diffalign.errors import UserError
from diffalign.utils.files import write_atomic

Tensors = dict[str, Tensor]


class Store:
    """A folder of content-addressed safetensors files, by kind ("latents", "text") and key."""

    def __init__(self, folder: Path | str):
        """Raises UserError if the folder cannot be made."""
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"data.cache_dir {str(self.folder)!r} cannot be made: {error.strerror}"
            ) from error

    def path(self, kind: str, key: str) -> Path:
        """Where the file of a key lies."""
        return self.folder / kind / key[:2] / f"{key}.safetensors"

    def size(self, kind: str, key: str) -> int:
        """The file's bytes; 0 if there is none."""
        try:
            return self.path(kind, key).stat().st_size
        except FileNotFoundError:
            return 0

    def read(self, kind: str, key: str) -> Tensors | None:
        """The tensors of a key, or None if there is no file or it is damaged."""
        try:
            with safe_open(self.path(kind, key), framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
                return tensors if (file.metadata() or {}).get("digest") == tensors_digest(tensors) else None
        except (OSError, SafetensorError):
            return None

    def write(self, kind: str, key: str, tensors: Tensors) -> int:
        """Write the file of a key and return its bytes; OSError where the disk refuses."""
        content = save(tensors, metadata={"digest": tensors_digest(tensors)})
        write_atomic(self.path(kind, key), content)
        return len(content)

    def remove(self, kind: str, key: str) -> None:
        """Remove the file of a key, if it is there."""
        self.path(kind, key).unlink(missing_ok=True)


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """A digest of names, types, shapes and values."""
    parts: list[bytes] = []
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        parts += [f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), tensor.numpy().tobytes()]
    return digest(*parts)


def is_full(error: OSError) -> bool:
    """Whether an error of writing says that the disk, or the user's share of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def no_space(folder: Path, needed: int) -> UserError:
    """The error of a full disk: the folder, the bytes needed and the bytes free."""
    free = shutil.disk_usage(folder).free
    return UserError(
        f"no space left in {folder}: about {needed / 2**20:.1f} MiB more are needed, "
        f"{free / 2**20:.1f} MiB are free; "
        f"make room or set data.cache_dir to another disk (what is there already is kept)"
    )


class Memory:
    """A store whose tensors used last stay in memory, float32, up to ``budget`` bytes: a small set whole."""

    def __init__(self, store: Store, budget: int = 2 * 2**30):
        self.store = store
        self._budget = budget
        self._held: OrderedDict[tuple[str, str], Tensors] = OrderedDict()
        self._bytes = 0

    def get(self, kind: str, key: str) -> Tensors:
        """The tensors of a key in float32; UserError if the file is gone or damaged since it was encoded."""
        if (kind, key) in self._held:
            self._held.move_to_end((kind, key))
            return self._held[kind, key]
        stored = self.store.read(kind, key)
        if stored is None:
            self.store.remove(kind, key)
            raise UserError(
                f"{self.store.path(kind, key)}: missing or damaged since it was encoded; "
                f"it is removed, start again and it will be encoded anew"
            )
        tensors = {name: tensor.to(torch.float32) for name, tensor in stored.items()}
        self._held[kind, key] = tensors
        self._bytes += _bytes(tensors)
        while self._bytes > self._budget and len(self._held) > 1:
            self._bytes -= _bytes(self._held.popitem(last=False)[1])
        return tensors


def _bytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())

"""Cache of inverted trajectories in a folder, so that a reference inverts a sample once.

A trajectory is identified by a digest of the latents, of all conditions of the sample (negative conditions of
guidance included) and of the inversion's settings. Each is one file that is written atomically, so several
processes may share a folder. Nothing is held in memory between batches.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffalign.diffusion.guidance import Guided
from diffalign.types import Cond, Denoiser
from diffalign.utils.files import open_atomic


class TrajectoryCache:
    """The cached trajectories of one batch.

    Attributes:
        known: for each sample the cached states (n, *d) after the first n steps of its grid; n is 0 where
            nothing is cached.
    """

    def __init__(self, folder: str | None, settings: str, denoiser: Denoiser, x0: Tensor, cond: Cond):
        """Read the batch's trajectories.

        Args:
            folder: folder of the trajectories; None: no cache.
            settings: settings of the inversion, as text.
            denoiser: the network that inverts; only the negative conditions of ``Guided`` enter the digest.
            x0: clean latents (B, *d).
            cond: conditions, every tensor (B, ...).
        """
        empty = x0.new_zeros(0, *x0.shape[1:])
        self._paths: list[Path] = []
        self.known: Sequence[Tensor] = [empty] * len(x0)
        if folder is None:
            return
        named = {"x0": x0, **{f"cond {name}": value for name, value in cond.items()}}
        if isinstance(denoiser, Guided):
            for name, value in denoiser.negative.items():
                named[f"negative {name}"] = value.expand(len(x0), *value.shape[1:])
        keys = _digests(settings, named, len(x0))
        self._paths = [Path(folder) / key[:2] / f"{key}.pt" for key in keys]
        self.known = [
            torch.load(path, map_location=x0.device, weights_only=True) if path.is_file() else empty
            for path in self._paths
        ]

    def write(self, states: Sequence[Tensor], counts: Sequence[int]) -> None:
        """Write new states: of sample b those of ``states`` (each (B, *d)) from 1 to ``counts[b]``."""
        for row, path in enumerate(self._paths):
            if counts[row] > len(self.known[row]):
                trajectory = torch.stack([state[row] for state in states[1 : counts[row] + 1]])
                with open_atomic(path) as file:
                    torch.save(trajectory.cpu(), file)


def _digests(settings: str, named: dict[str, Tensor], count: int) -> list[str]:
    """Return one digest per sample of the tensors in ``named``, each (count, ...)."""
    host = {name: named[name].detach().cpu().reshape(count, -1).contiguous() for name in sorted(named)}
    keys = []
    for row in range(count):
        digest = hashlib.blake2b(settings.encode(), digest_size=20)
        for name, value in host.items():
            digest.update(f"\x1f{name} {value.dtype} {tuple(named[name].shape[1:])}\x1f".encode())
            digest.update(value[row].view(torch.uint8).numpy().tobytes())
        keys.append(digest.hexdigest())
    return keys

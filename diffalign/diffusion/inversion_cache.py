"""A folder of inverted trajectories: what a reference has inverted once it need not invert again.

A trajectory is known by its content: a digest of the latents, of every condition of that sample (what
guidance guides away from included) and of the inversion's settings. It is one file, written whole or not at
all, so several processes may share a folder. Nothing is kept in memory between batches.
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
    """The trajectories of one batch.

    Attributes:
        known: for each sample what the folder has, the states (n, *d) after the first n steps of its grid; n
            is 0 where it has none.
    """

    def __init__(self, folder: str | None, settings: str, denoiser: Denoiser, x0: Tensor, cond: Cond):
        """Look the batch up.

        Args:
            folder: where trajectories are; None knows and keeps nothing.
            settings: of the inversion, as text.
            denoiser: who inverts: of it only what guidance guides away from is part of the digest.
            x0: clean latents (B, *d).
            cond: conditions, every tensor (B, ...).
        """
        none = x0.new_zeros(0, *x0.shape[1:])
        self._paths: list[Path] = []
        self.known: Sequence[Tensor] = [none] * len(x0)
        if folder is None:
            return
        named = {"x0": x0, **{f"cond {name}": value for name, value in cond.items()}}
        if isinstance(denoiser, Guided):
            for name, value in denoiser.negative.items():
                named[f"negative {name}"] = value.expand(len(x0), *value.shape[1:])
        keys = _digests(settings, named, len(x0))
        self._paths = [Path(folder) / key[:2] / f"{key}.pt" for key in keys]
        self.known = [
            torch.load(path, map_location=x0.device, weights_only=True) if path.is_file() else none
            for path in self._paths
        ]

    def keep(self, states: Sequence[Tensor], whole: Sequence[int]) -> None:
        """Write what is new: of sample b the ``states`` 1 to ``whole[b]``, each (B, *d)."""
        for row, path in enumerate(self._paths):
            if whole[row] > len(self.known[row]):
                trajectory = torch.stack([state[row] for state in states[1 : whole[row] + 1]])
                with open_atomic(path) as file:
                    torch.save(trajectory.cpu(), file)


def _digests(settings: str, named: dict[str, Tensor], count: int) -> list[str]:
    """One digest per sample of everything in ``named``, every tensor (count, ...)."""
    host = {name: named[name].detach().cpu().reshape(count, -1).contiguous() for name in sorted(named)}
    keys = []
    for row in range(count):
        digest = hashlib.blake2b(settings.encode(), digest_size=20)
        for name, value in host.items():
            digest.update(f"\x1f{name} {value.dtype} {tuple(named[name].shape[1:])}\x1f".encode())
            digest.update(value[row].view(torch.uint8).numpy().tobytes())
        keys.append(digest.hexdigest())
    return keys

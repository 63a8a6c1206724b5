"""Where and how a reward runs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where a reward runs: a torch device, a dtype name, and how many images it takes at once."""

    device: str = "cpu"
    dtype: str = "float32"
    batch_size: int = 16

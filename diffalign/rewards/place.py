"""Where and how a reward runs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where and how a reward runs.

    Attributes:
        device: a torch device.
        dtype: name of the network's dtype: float32, bfloat16 or float16.
        batch_size: images a forward pass.
    """

    device: str = "cpu"
    dtype: str = "float32"
    batch_size: int = 16

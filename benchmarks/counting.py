"""What a method costs, counted at the network instead of assumed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook


@dataclass
class Calls:
    """Samples that went through a network.

    Attributes:
        held: forward without gradient (the reference, inversions, rollouts).
        trained: forward with gradient.
        back: backward.
    """

    held: float = 0
    trained: float = 0
    back: float = 0

    @property
    def cost(self) -> float:
        """Forward-equivalents: a backward is worth two forwards, so a trained sample costs 3."""
        return self.held + self.trained + 2 * self.back

    def per(self, steps: int) -> "Calls":
        """Return the mean over ``steps``."""
        return Calls(self.held / steps, self.trained / steps, self.back / steps)


@contextmanager
def counted(kind: type[nn.Module]) -> Iterator[Calls]:
    """Count the samples through every module of type ``kind`` inside the context, wherever it was made."""
    calls = Calls()

    def backward(count: int) -> None:
        calls.back += count

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        if not isinstance(module, kind):
            return
        out: Tensor = output if isinstance(output, Tensor) else output[0]
        if out.requires_grad:
            calls.trained += len(out)
            out.register_hook(lambda gradient: backward(len(gradient)))
        else:
            calls.held += len(out)

    handle = register_module_forward_hook(after)
    try:
        yield calls
    finally:
        handle.remove()

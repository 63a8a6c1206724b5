"""Count the network calls of a method, which give its cost."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook


@dataclass
class Calls:
    """Counts of samples that passed through a network.

    Attributes:
        held: samples forward without gradient (reference, inversions, rollouts).
        trained: samples forward with gradient.
        back: samples backward.
    """

    held: float = 0
    trained: float = 0
    back: float = 0

    @property
    def cost(self) -> float:
        """The cost in forward-equivalents; a backward counts 2, so a trained sample costs 3."""
        return self.held + self.trained + 2 * self.back

    def per(self, steps: int) -> "Calls":
        """Return the counts divided by ``steps``."""
        return Calls(self.held / steps, self.trained / steps, self.back / steps)


@contextmanager
def counted(kind: type[nn.Module]) -> Iterator[Calls]:
    """Count the samples that pass through any module of type ``kind`` inside the context."""
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

"""Out of memory is no bug: it ends with what was being done, how much was in use, and what would help.

The advice names options of the run that are not set yet, those that save the most first. How much a run needs
can be known before: `diffalign estimate`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffalign.errors import UserError

if TYPE_CHECKING:
    pass

GIB = 2**30
# What torch says on the CPU (two allocators), and what CUDA's libraries say that torch does not translate.
_WORDS = ("can't allocate memory", "not enough memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


# Where nothing is known of the run.
ANYWHERE = (
    "--model.gradient_checkpointing true",
    "--training.batch_size 1 with a larger --training.accumulation",
    "--model.dtype bfloat16",
    "a smaller --data.resolution, or fewer --data.frames",
    "--optimizer.type adamw8bit",
)


class OutOfMemory(UserError):
    """What was being done needs more memory than there is; the message says what would help."""


@dataclass(frozen=True)
class Peak:
    """The most memory that this process has had in use at once.

    Attributes:
        bytes: how much; 0 where the system does not tell.
        of: which memory.
    """

    bytes: int
    of: str

    @property
    def gib(self) -> float:
        """In units of 2^30 bytes."""
        return self.bytes / GIB

    @property
    def text(self) -> str:
        """``3.21 GiB of GPU memory``."""
        return f"{self.gib:.2f} GiB of {self.of}"


def peak_memory() -> Peak:
    """Return the peak so far: of tensors on the GPU where one is in use, else of the whole process."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return Peak(torch.cuda.max_memory_allocated(), "GPU memory")
    try:
        import resource
    except ImportError:  # Windows
        return Peak(0, "main memory")
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return Peak(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "main memory")


def ran_out(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory: Python's, torch's of the GPU or of the CPU."""
    if isinstance(error, UserError):
        return False
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def explained(error: BaseException, doing: str, advice: Sequence[str]) -> str:
    """Return the message of an error."""
    peak = peak_memory()
    so_far = f", after a peak of {peak.text}" if peak.bytes else ""
    why = " ".join(str(error).split()).split(". ")[0][:160]
    helps = (
        "; ".join(advice) if advice else "a machine with more of it, since every option that saves it is set"
    )
    return (
        f"out of memory while {doing}{so_far} ({why or type(error).__name__}). What helps, the most first: "
        f"{helps}. `diffalign estimate` says what a run needs before it is run"
    )


@contextmanager
def advised(doing: str, advice: Sequence[str]) -> Iterator[None]:
    """Inside it running out of memory is an OutOfMemory that says what was being done and what would help."""
    try:
        yield
    except Exception as error:
        if not ran_out(error):
            raise
        raise OutOfMemory(explained(error, doing, advice)) from error

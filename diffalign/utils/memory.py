"""Turn out-of-memory errors into messages with the activity, the peak so far and advice.

The advice lists options of the run that are not set yet, in descending order of the memory that they save.
`diffalign estimate` predicts what a run needs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from diffalign.errors import UserError

GIB = 2**30
# Messages of torch on the CPU (two allocators), and of CUDA libraries whose errors torch does not convert.
_WORDS = ("can't allocate memory", "not enough memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


# Advice where the run's settings are unknown.
ANYWHERE = (
    "--model.gradient_checkpointing true",
    "--training.batch_size 1 with a larger --training.accumulation",
    "--model.dtype bfloat16",
    "a smaller --data.resolution, or fewer --data.frames",
    "--optimizer.type adamw8bit",
)


class OutOfMemory(UserError):
    """The process ran out of memory; the message has advice."""


@dataclass(frozen=True)
class Peak:
    """Peak memory of this process.

    Attributes:
        bytes: size in bytes; 0 if the system does not report it.
        of: kind of memory, "GPU memory" or "main memory".
    """

    bytes: int
    of: str

    @property
    def gib(self) -> float:
        """The size in units of 2^30 bytes."""
        return self.bytes / GIB

    @property
    def text(self) -> str:
        """Size and kind as text: ``3.21 GiB of GPU memory``."""
        return f"{self.gib:.2f} GiB of {self.of}"


def peak_memory() -> Peak:
    """Return the peak so far: of tensors on the GPU if one is in use, else of the process's main memory."""
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
    """Return whether an error is an out-of-memory error of Python, of torch on the GPU or on the CPU."""
    if isinstance(error, UserError):
        return False
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def explained(error: BaseException, doing: str, advice: Sequence[str]) -> str:
    """Return the message of an out-of-memory error; ``doing`` names the activity, such as "training"."""
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
    """Convert out-of-memory errors inside the context into ``OutOfMemory`` with activity and advice."""
    try:
        yield
    except Exception as error:
        if not ran_out(error):
            raise
        raise OutOfMemory(explained(error, doing, advice)) from error

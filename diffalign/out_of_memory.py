"""Out of memory is no bug: it ends with what was being done, how much was in use, and what would help.

The advice names options of the run that are not set yet, those that save the most first. How much a run needs
can be known before: `diffalign estimate`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffalign.config import Run
from diffalign.errors import UserError

if TYPE_CHECKING:
    from diffalign.reward_config import RewardRun

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
    """The peak so far: of tensors on the GPU where one is in use, else of the process in main memory."""
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


def said(error: BaseException, doing: str, advice: Sequence[str]) -> str:
    """The message."""
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
        raise OutOfMemory(said(error, doing, advice)) from error


def when_loading(run: "Run | RewardRun") -> list[str]:
    """What makes a loaded model smaller."""
    return _of_dtype(run)


def when_encoding(run: "Run | RewardRun") -> list[str]:
    """What makes encoding smaller: batches and sizes of what the autoencoder sees."""
    at_once = run.data.cache_batch_size
    advice = [f"--data.cache_batch_size 1 (now {at_once})"] if at_once > 1 else []
    return [*advice, *_of_tiles(run), *_of_size(run), *_of_dtype(run)]


def when_training(run: Run) -> list[str]:
    """What makes a training step smaller, and online the sampling of a round."""
    advice, training, rollout = [], run.training, run.rollout
    if not run.model.gradient_checkpointing:
        advice.append("--model.gradient_checkpointing true (a third more time)")
    if training.batch_size > 1:
        steps = training.batch_size * training.accumulation
        advice.append(f"--training.batch_size 1 --training.accumulation {steps} (the same step)")
    advice += _of_rivals(run)
    if rollout.prompts and rollout.batch_size > 1:
        advice.append(f"--rollout.batch_size 1 (now {rollout.batch_size})")
    if training.mixed_precision == "no":
        advice.append("--training.mixed_precision bf16")
    advice += [*_of_dtype(run), *_of_size(run)]
    if rollout.prompts and rollout.resolution:
        advice[-1] = f"a smaller --rollout.resolution (now {rollout.resolution})"
    if rollout.prompts:
        advice += _of_tiles(run)
    if run.optimizer.type == "adamw":
        advice.append("--optimizer.type adamw8bit")
    if run.model.train == "full":
        advice.append("--model.train lora")
    return advice


def _of_rivals(run: Run) -> list[str]:
    """Fewer samples of a prompt, and fewer times of each, in one gradient batch of an online run."""
    from diffalign.micro_batch import may_be_parted, rivals_of, strata_of

    advice: list[str] = []
    if not run.rollout.prompts:
        return advice
    if may_be_parted(run) and (rivals := rivals_of(run)) > 1:
        advice.append(f"--rollout.part 1 (now {rivals}) with {rivals} times the --training.accumulation")
    if (strata := strata_of(run)) > 1:
        advice.append(f"--method.time.strata 1 (now {strata})")
    return advice


def when_validating(run: Run) -> list[str]:
    """What makes the drawing of validation images or videos smaller."""
    frames = run.validation.frames or run.data.frames or 1
    advice = [f"--validation.frames {_fewer(frames)} (now {frames})"] if frames > 1 else []
    return [*_of_tiles(run), *advice, *_of_dtype(run)]


def _fewer(frames: int) -> int:
    """About half of them, 1 more than a multiple of 8 or 4, as causal autoencoders want it."""
    step = 8 if frames > 16 else 4
    return 1 + (frames - 1) // (2 * step) * step


def _of_dtype(run: "Run | RewardRun") -> list[str]:
    return ["--model.dtype bfloat16"] if run.model.dtype == "float32" else []


def _of_tiles(run: "Run | RewardRun") -> list[str]:
    return [] if run.model.vae_tiling else ["--model.vae_tiling true"]


def _of_size(run: "Run | RewardRun") -> list[str]:
    """Fewer frames of a video first, since its length is what a video has too much of."""
    data = run.data
    frames = data.frames or 1
    advice = [f"--data.frames {_fewer(frames)} (now {frames})"] if frames > 1 else []
    if data.height and data.width:
        return [*advice, f"a smaller --data.height and --data.width (now {data.height} and {data.width})"]
    return [*advice, f"a smaller --data.resolution (now {data.resolution})"]

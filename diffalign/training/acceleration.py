"""The accelerator: one process or many, which device, which precision."""

import os
from datetime import timedelta

from accelerate import Accelerator as Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from diffalign.config.schema import TrainingConfig
from diffalign.errors import UserError

_PLUGINS = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_FSDP")

# What one rank does alone (validation images, a slow judge) the others wait for.
PATIENCE = timedelta(hours=2)


def accelerator_for(settings: TrainingConfig) -> Accelerator:
    """Return the accelerator of a run; processes come from the launcher (``torchrun`` or ``accelerate
    launch``).

    Accumulation is the loop's own, so accelerate's stays at one. Buffers are not broadcast at each forward:
    the networks have no running statistics, and a collective inside a forward would hang whatever only one
    rank runs, such as validation.

    Raises:
        UserError: float16 asked for where there is no accelerator, or a launcher's plugin whose package is
            not installed.
    """
    # accelerate keeps the first precision of a process for ever; a second run in the same process may want
    # another.
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != settings.mixed_precision:
        AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(
            mixed_precision=settings.mixed_precision,
            gradient_accumulation_steps=1,
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False),
                InitProcessGroupKwargs(timeout=PATIENCE),
            ],
        )
    except ImportError as error:
        plugins = [name for name in _PLUGINS if os.environ.get(name, "").lower() in ("1", "true")]
        raise UserError(
            f"the launcher sets {', '.join(plugins) or 'a plugin'}, and accelerate says: {error}; allowed: "
            "that package, or a launch without it (accelerate launch --num_processes N)"
        ) from error
    if settings.mixed_precision == "fp16" and accelerator.scaler is None:
        raise UserError(
            f"training.mixed_precision=fp16 needs a GPU, and this run is on {accelerator.device.type!r}; "
            "allowed here: no, bf16"
        )
    return accelerator

"""The accelerator: one process or many, which device, which precision."""

import os
from datetime import timedelta

import torch
from accelerate import Accelerator as Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import nn

from diffalign.config.schema import TrainingConfig
from diffalign.errors import UserError
from diffalign.training.sharding import is_sharded

_PLUGINS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed (ZeRO)",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
"""What a launcher may ask for that runs do not do, by its variable."""

# What one rank does alone (validation images, a slow judge) the others wait for.
PATIENCE = timedelta(hours=2)


def accelerator_for(settings: TrainingConfig) -> Accelerator:
    """Return the accelerator of a run; processes come from the launcher (``torchrun`` or ``accelerate
    launch``).

    Accumulation is the loop's own, so accelerate's stays at one. Buffers are not broadcast at each forward:
    the networks have no running statistics, and a collective inside a forward would hang whatever only one
    rank runs, such as validation.

    FSDP that the launcher asks for has become ``training.shard`` by now (``runs.launcher``), and weights are
    spread by ``training.sharding``, on the CPU as on GPUs; so the plugin itself is not made.

    Raises:
        UserError: float16 asked for where there is no accelerator, or a launcher's plugin that runs do not
            have.
    """
    for variable, plugin in _PLUGINS.items():
        if os.environ.get(variable, "").lower() in ("1", "true"):
            raise UserError(
                f"the launcher asks for {plugin} ({variable}), which runs do not have; allowed: a launch "
                "without it, and training.shard full or hybrid, which spread weights and moments (FSDP2)"
            )
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # transformers, too, would load weights on one process only
    # accelerate keeps the first precision of a process for ever; a second run in the same process may want
    # another.
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != settings.mixed_precision:
        AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        gradient_accumulation_steps=1,
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=PATIENCE),
        ],
    )
    if settings.mixed_precision == "fp16" and accelerator.scaler is None:
        raise UserError(
            f"training.mixed_precision=fp16 needs a GPU, and this run is on {accelerator.device.type!r}; "
            "allowed here: no, bf16"
        )
    return accelerator


def set_products(precision: str, device: str) -> str:
    """Set how float32 products are computed on a device, and return it in words; nothing changes on a CPU.

    Args:
        precision: ``training.float32_matmul``.
        device: its type, such as "cuda".
    """
    if device == "cpu":
        return ""
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision != "highest"  # convolutions
    kinds = {"highest": "exact", "high": "in TF32", "medium": "in bfloat16 or TF32"}
    return f"float32 products and convolutions: {kinds[precision]} (training.float32_matmul {precision})"


def prepare(accelerator: Accelerator, network: nn.Module) -> nn.Module:
    """Return the network as training calls it: under autocast, and with its gradients synchronised, by
    DistributedDataParallel or, where its weights are spread over the processes, by FSDP2 itself.
    """
    if any(map(is_sharded, network.parameters())):
        prepared: nn.Module = accelerator.prepare_model(network, device_placement=False, evaluation_mode=True)
        return prepared
    prepared = accelerator.prepare(network)
    return prepared

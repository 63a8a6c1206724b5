"""The accelerator of a run: processes, device and precision."""

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
from diffalign.utils.devices import check_group, share

_PLUGINS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed (ZeRO)",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
"""Plugins of launchers that runs do not support, by environment variable."""

DYNAMO = "ACCELERATE_DYNAMO_BACKEND"
"""The launcher's compiler. ``runs.launcher`` turns it into ``model.compile``, so accelerate's is not used."""

# Timeout of collectives: other ranks wait while one makes validation images or calls a slow reward.
PATIENCE = timedelta(hours=2)


def accelerator_for(settings: TrainingConfig) -> Accelerator:
    """Return the accelerator of a run; the launcher (``torchrun``, ``accelerate launch``) starts processes.

    The loop does its own accumulation, so accelerate's is 1. Buffers are not broadcast at each forward: the
    networks have no running statistics, and a collective inside a forward would block code that runs on one
    rank only, such as validation.

    FSDP settings of the launcher have been converted to ``training.shard`` (``runs.launcher``), and
    ``training.sharding`` shards the weights, so accelerate's FSDP plugin is not created.

    Raises:
        UserError: float16 on the CPU, a launcher's plugin that runs do not support, a variable of it that
            is none, or processes that are not joined.
    """
    check_group()
    for variable, plugin in _PLUGINS.items():
        if os.environ.get(variable, "").lower() in ("1", "true"):
            raise UserError(
                f"the launcher requests {plugin} ({variable}), which runs do not support; allowed: a launch "
                "without it, and training.shard full or hybrid, which shard weights and moments (FSDP2)"
            )
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # otherwise transformers loads weights on one process only
    os.environ.pop(DYNAMO, None)
    # accelerate keeps the precision of the first run of a process; a later run may have another one.
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
    except (ValueError, ImportError) as error:  # of a variable, or of a package that one asks for
        first = " ".join(str(error).split())[:200]
        raise UserError(
            f"the launcher's settings cannot be used: {first}; look at the variables ACCELERATE_* and "
            "those of torchrun"
        ) from error
    _, world = share()
    if world > 1 and accelerator.num_processes != world:
        raise UserError(
            f"the launcher has started {world} processes (WORLD_SIZE), which accelerate does not join on "
            f"{accelerator.device.type!r}: each would be a run of its own; allowed: one process, or on CPUs "
            "ACCELERATE_USE_CPU=true"
        )
    if settings.mixed_precision == "fp16" and accelerator.scaler is None:
        raise UserError(
            f"training.mixed_precision=fp16 needs a GPU, and this run is on {accelerator.device.type!r}; "
            "allowed here: no, bf16"
        )
    return accelerator


def set_products(precision: str, device: str) -> str:
    """Set the precision of float32 products on a device and return a description; a no-op on the CPU.

    Args:
        precision: value of ``training.float32_matmul``.
        device: type of the device, such as "cuda".
    """
    if device == "cpu":
        return ""
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision != "highest"  # convolutions
    kinds = {"highest": "exact", "high": "in TF32", "medium": "in bfloat16 or TF32"}
    return f"float32 products and convolutions: {kinds[precision]} (training.float32_matmul {precision})"


def prepare(accelerator: Accelerator, network: nn.Module) -> nn.Module:
    """Return the network with autocast and with synchronised gradients.

    DistributedDataParallel synchronises them, or FSDP2 if the weights are sharded.
    """
    if any(map(is_sharded, network.parameters())):
        prepared: nn.Module = accelerator.prepare_model(network, device_placement=False, evaluation_mode=True)
        return prepared
    prepared = accelerator.prepare(network)
    return prepared

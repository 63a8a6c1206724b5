"""Estimate memory, FLOPs and time of a run from shapes alone: no weights, data or connection.

The network runs once forward and backward on meta tensors. Torch propagates shapes and counts the FLOPs of
matrix products, convolutions and attention at 2 per multiply-add; autograd shows which activations it would
save. Attention is fused, so no attention matrix is stored.

FLOPs per pair = 2 images or videos x (policy forward + backward + recomputation + reference forward). The
backward is measured: about 2 forwards if all weights are trained, about 1 under LoRA, whose frozen weights
need no gradient. Recomputation is 1 policy forward with gradient checkpointing of all blocks, the forward of
the checkpointed blocks with that of every N-th, else 0. Methods without a reference have no reference
forward.

The memory of an online run is that of a gradient batch of its rounds: all samples of a prompt at once (or
``rollout.part``), at all times that its method uses. Its time is not estimated, since it is mostly sampling
and scoring. A run of one of two experts that draws samples holds the frozen weights of both throughout; what
an earlier run trained of the other, well below 1 % of it, is not counted.

Where devices share the tokens of each row (``training.context``), activations are divided by their number;
what attention exchanges is not counted.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from diffalign.errors import UserError
from diffalign.estimate.counting import Counts, count, size_of, stored
from diffalign.estimate.shapes import shapes_of
from diffalign.estimate.workload import Workload
from diffalign.models.loading import DTYPES
from diffalign.models.precision import AUTOCAST, only_errors

GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """Memory, FLOPs and time of a run on one device. Memory in bytes; FLOPs at 2 per multiply-add.

    Attributes:
        family: name of the model family.
        size: (height, width, frames), sides in pixels; images have one frame.
        network_parameters: parameters of the trained network, without adapters.
        encoder_parameters: parameters of the VAE and the text encoders.
        trainable_parameters: parameters that are trained: adapters, or all of the network.
        forward_flops: forward of one image or video without adapters, as of the reference.
        policy_flops: forward of one image or video with adapters.
        backward_flops: backward of one image or video.
        flops_per_pair: all FLOPs of one pair.
        memory: bytes by part during training, after the encoders are freed.
        encoder_memory: bytes of the encoders while the cache is filled.
        pairs_per_step: pairs of an optimizer step on one device, or on those of a group that shares tokens.
        pairs_per_second: throughput of these at the given speed; None without one.
        seconds: duration of the run at that speed; None without one.
        offloaded: bytes of activations in main memory (``model.offload_activations``).
        paged: bytes of paged optimizer state, on the device while there is room and otherwise in main memory;
            ``memory`` leaves them out.
        sharing: devices that share the tokens of each row (``training.context``); memory is that of one.
    """

    family: str
    size: tuple[int, int, int]
    network_parameters: int
    encoder_parameters: int
    trainable_parameters: int
    forward_flops: int
    policy_flops: int
    backward_flops: int
    flops_per_pair: int
    memory: dict[str, int]
    encoder_memory: int
    pairs_per_step: int
    pairs_per_second: float | None
    seconds: float | None
    offloaded: int = 0
    paged: int = 0
    sharing: int = 1

    @property
    def total_memory(self) -> int:
        """Bytes during training, without the allocator's overhead (5 to 10 %)."""
        return sum(self.memory.values())

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate as a dict for JSON."""
        return asdict(self) | {"total_memory": self.total_memory}

    def rows(self) -> list[tuple[str, str]]:
        """Return (name, value with its unit) for a table."""
        one = "image" if self.size[2] == 1 else "video"
        devices = "device" if self.sharing == 1 else f"group of {self.sharing} devices"
        rows = [
            ("family", self.family),
            ("resolution", resolution(*self.size)),
            ("network parameters", f"{self.network_parameters:,}"),
            ("VAE and text encoder parameters", f"{self.encoder_parameters:,}"),
            ("trainable parameters", f"{self.trainable_parameters:,}"),
            (f"forward of one {one}", tera(self.forward_flops)),
            (f"forward of one {one}, with adapters", tera(self.policy_flops)),
            (f"backward of one {one}", tera(self.backward_flops)),
            (f"one pair (2 {one}s: forward, backward, recomputation, reference)", tera(self.flops_per_pair)),
            *((f"memory: {name}", size(value)) for name, value in self.memory.items()),
            ("memory while training", size(self.total_memory)),
            ("memory of the encoders while caching", size(self.encoder_memory)),
            (f"pairs per step and {devices}", str(self.pairs_per_step)),
        ]
        if self.offloaded:
            rows.append(("main memory: activations", size(self.offloaded)))
        if self.paged:
            rows.append(("main memory, or the device's where it has room: optimizer state", size(self.paged)))
        if self.pairs_per_second is not None and self.seconds is not None:
            name = "pairs per second" if self.sharing == 1 else f"pairs per second of a {devices}"
            rows.append((name, f"{self.pairs_per_second:.3g}"))
            rows.append(("training time", f"{self.seconds / 3600:.3g} h"))
        return rows


def estimate(work: Workload, tflops: float | None = None, utilisation: float = 0.4) -> Estimate:
    """Estimate parameters, FLOPs and memory of a run on one device; its time, if the device's speed is given.

    Args:
        work: the run.
        tflops: peak speed of the device in TFLOP/s for the run's precision; None omits the time.
        utilisation: share of the peak that training reaches, in (0, 1].

    Raises:
        UserError: unknown shapes, LoRA targets that match no module, or a number out of range.
    """
    if tflops is not None and tflops <= 0:
        raise UserError(f"tflops={tflops}; allowed: more than 0")
    if not 0 < utilisation <= 1:
        raise UserError(f"utilisation={utilisation}; allowed: more than 0, at most 1")
    if tflops is not None and work.online:
        raise UserError(
            f"tflops={tflops} with rollout.prompts: how long sampling and judging take is not known; "
            "allowed: no speed, for parameters and memory alone"
        )
    shapes = shapes_of(work.model)
    counts = count(work, shapes)
    images = work.rows
    forward, policy, backward, blocks = (
        n // images
        for n in (counts.forward_flops, counts.policy_flops, counts.backward_flops, counts.recomputed_flops)
    )
    recomputation = policy if int(work.model.gradient_checkpointing) == 1 else blocks
    reference = forward if work.needs_reference else 0
    per_pair = 2 * (policy + backward + recomputation + reference)
    pairs_per_step = work.training.batch_size * work.training.accumulation
    sharing = work.training.context
    speed = sharing * tflops * 1e12 * utilisation / per_pair if tflops is not None else None
    encoders = shapes.encoders()
    return Estimate(
        family=shapes.family.name,
        size=size_of(work, shapes),
        network_parameters=counts.network_parameters,
        encoder_parameters=sum(p.numel() for module in encoders.values() for p in module.parameters()),
        trainable_parameters=counts.trainable_parameters,
        forward_flops=forward,
        policy_flops=policy,
        backward_flops=backward,
        flops_per_pair=per_pair,
        memory=memory(work, counts),
        encoder_memory=encoder_bytes(work, encoders),
        pairs_per_step=pairs_per_step,
        pairs_per_second=speed,
        seconds=work.training.steps * pairs_per_step / speed if speed is not None else None,
        offloaded=counts.offloaded,
        paged=counts.paged_bytes * work.adapter_sets,
        sharing=sharing,
    )


def memory(work: Workload, counts: Counts) -> dict[str, int]:
    """Return the bytes of each part during training."""
    lora, dtype = work.model.train == "lora", DTYPES[work.model.dtype]
    autocast = AUTOCAST[work.training.mixed_precision]
    trained = 4 * counts.trainable_parameters * work.adapter_sets
    parts = {
        "frozen weights": counts.frozen_bytes if lora else 0,
        "frozen weights of the other expert": counts.frozen_bytes if work.both_experts else 0,
        "largest layer, whole while it computes": counts.largest_layer,
        "text encoders that are trained": counts.text_parameters * dtype.itemsize,
        "trained weights (float32)": trained,
        "gradients (float32)": trained,
        f"optimizer state ({work.optimizer.type})": counts.optimizer_bytes * work.adapter_sets,
        "moving average": trained if work.training.ema_decay else 0,
        "reference copy": 0
        if lora or not work.needs_reference
        else counts.network_parameters * (dtype.itemsize if autocast == dtype else 4),
        "activations": math.ceil(counts.activations / work.training.context),
        "latents and conditions": counts.input_bytes,
    }
    return {name: value for name, value in parts.items() if value}


def encoder_bytes(work: Workload, encoders: Mapping[str, nn.Module]) -> int:
    """Return the bytes of the encoders, with the run's quantisation, while the cache is filled."""
    dtype, kind = DTYPES[work.model.dtype], work.model.text_encoder.quantize
    total = 0
    for name, module in encoders.items():
        with only_errors("diffusers"):  # silences its warning about casting
            module.to(dtype).requires_grad_(False)
        total += stored(module, "none" if name == "vae" else kind)
    return total


def resolution(height: int, width: int, frames: int) -> str:
    """Return a size in pixels as text."""
    sides = f"{width} px" if height == width else f"{width} x {height} px"
    return sides if frames == 1 else f"{sides}, {frames} frames"


def size(count_of_bytes: int) -> str:
    """Return a number of bytes as text, in GiB or MiB."""
    return (
        f"{count_of_bytes / GIB:.2f} GiB"
        if count_of_bytes >= GIB / 100
        else f"{count_of_bytes / 2**20:.2f} MiB"
    )


def tera(flops: int) -> str:
    """Return a number of FLOPs as text, in TFLOP or GFLOP."""
    return f"{flops / 1e12:.2f} TFLOP" if flops >= 1e10 else f"{flops / 1e9:.3f} GFLOP"

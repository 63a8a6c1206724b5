"""Count FLOPs and saved activations of one forward and backward of a run's network on the meta device.

Meta tensors have shapes and no data, so nothing is computed. ``flops.AsOnGpu`` reproduces fused attention and
autocast, which a GPU uses and the meta device does not.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.config.schema import ModelConfig, OptimizerConfig
from diffalign.errors import UserError
from diffalign.estimate.flops import AsOnGpu, Flops
from diffalign.estimate.shapes import Shapes
from diffalign.estimate.workload import Workload
from diffalign.models.denoisers import adapters_off
from diffalign.models.gradient_checkpointing import disable_checkpointing, enable_checkpointing
from diffalign.models.loading import DTYPES
from diffalign.models.lora import add_lora, freeze_idle, trainable
from diffalign.models.memory_format import check_channels_last
from diffalign.models.precision import AUTOCAST, only_errors
from diffalign.models.quantization import quantizable, stored_bytes
from diffalign.models.text_encoders import TextConditioned, call_conditioned
from diffalign.models.text_lora import add_text_lora, checkpoint_encoder, trained_encoders


@dataclass(frozen=True)
class Counts:
    """Counts of one forward and backward of a micro-batch on the meta device.

    Attributes:
        network_parameters: parameters of the network, without adapters.
        text_parameters: frozen parameters of the trained text encoders.
        trainable_parameters: parameters that are trained.
        optimizer_bytes: optimizer state of the trained parameters, without what is paged.
        paged_bytes: optimizer state in paged memory, on the device while there is room.
        forward_flops: forward without adapters, at 2 FLOPs per multiply-add.
        policy_flops: forward with adapters.
        backward_flops: backward.
        recomputed_flops: forward of the checkpointed blocks; 0 without checkpoints.
        activations: bytes that autograd saves for the backward, on the device.
        offloaded: bytes of activations in main memory.
        input_bytes: bytes of latents and conditions.
        frozen_bytes: bytes of the network's frozen weights, as stored.
        largest_layer: bytes of the largest quantised layer when it is dequantised.
    """

    network_parameters: int
    text_parameters: int
    trainable_parameters: int
    optimizer_bytes: int
    paged_bytes: int
    forward_flops: int
    policy_flops: int
    backward_flops: int
    recomputed_flops: int
    activations: int
    offloaded: int
    input_bytes: int
    frozen_bytes: int
    largest_layer: int


def count(work: Workload, shapes: Shapes) -> Counts:
    """Run the network of a run forward and backward on the meta device, and count.

    Raises:
        UserError: the size does not suit the family, or LoRA targets match no module.
    """
    lora, dtype, autocast = (
        work.model.train == "lora",
        DTYPES[work.model.dtype],
        AUTOCAST[work.training.mixed_precision],
    )
    images, size = work.rows, size_of(work, shapes)
    network, parameters = meta_network(work.model, shapes)
    if work.model.channels_last:
        check_channels_last(network)
    latents = shapes.latent_shape(*size)
    with torch.device("meta"):
        x_t = torch.zeros(images, *latents, dtype=dtype if lora else torch.float32)
        cond = {name: torch.zeros(images, *shape) for name, shape in shapes.cond_shapes(latents).items()}
        time = torch.zeros(images, dtype=torch.int64)
    encoders = meta_encoders(work.model, shapes)
    frozen = sum(p.numel() for e in encoders.values() for p in e.parameters() if not p.requires_grad)
    call: Any = shapes.family.call
    module: nn.Module = network
    if encoders:
        module, call = TextConditioned(network, encoders, shapes.family, call).train(), call_conditioned
        cond = _tokens(shapes, encoders, cond)
    policy = Flops()
    activations = Activations(
        network,
        work.model.gradient_checkpointing,
        encoders.values(),
        offload=work.model.offload_activations,
        flops=policy,
    )
    with Flops() as forward, torch.no_grad(), AsOnGpu(autocast), adapters_off(module):
        call(module, x_t, time, cond)
    with policy, AsOnGpu(autocast), activations.watch():
        prediction = call(module, x_t, time, cond)
    with Flops() as backward:
        prediction.float().sum().backward()
    trained = [p for _, p in trainable(module)]
    return Counts(
        network_parameters=parameters,
        text_parameters=frozen,
        trainable_parameters=sum(p.numel() for p in trained),
        optimizer_bytes=sum(state_bytes(p, work.optimizer) - paged_bytes(p, work.optimizer) for p in trained),
        paged_bytes=sum(paged_bytes(p, work.optimizer) for p in trained),
        forward_flops=forward.total,
        policy_flops=policy.total,
        backward_flops=backward.total,
        recomputed_flops=activations.recomputed,
        activations=activations.bytes,
        offloaded=activations.offloaded,
        input_bytes=sum(tensor.nbytes for tensor in (x_t, *cond.values())),
        frozen_bytes=stored(network, work.model.quantize),
        largest_layer=largest(network, work.model.quantize),
    )


def stored(module: nn.Module, kind: str) -> int:
    """Return the bytes of the frozen weights of a module with the quantisation ``kind``."""
    unquantised = sum(p.numel() * p.element_size() for p in module.parameters() if not p.requires_grad)
    saved = (layer.weight.nbytes - stored_bytes(layer, kind) for layer in _quantised(module, kind))
    return unquantised - sum(saved)


def largest(module: nn.Module, kind: str) -> int:
    """Return the bytes of the largest quantised layer after dequantisation; 0 for int8, which needs none."""
    return max((layer.weight.nbytes for layer in _quantised(module, kind) if kind != "int8"), default=0)


def _quantised(module: nn.Module, kind: str) -> list[nn.Linear]:
    """Return the quantised layers: the frozen linear ones, adapters excluded."""
    if kind == "none":
        return []
    return [layer for _, layer in quantizable(module, kind) if not layer.weight.requires_grad]


def size_of(work: Workload, shapes: Shapes) -> tuple[int, int, int]:
    """Return (height, width, frames) of the training samples, sides in pixels; images have one frame.

    Raises:
        UserError: ``data.frames`` is not set for a video family, or set for an image family.
    """
    video = shapes.family.codec.video
    if video != (work.frames is not None):
        allowed = "a number of frames, such as 49" if video else "null"
        raise UserError(f"data.frames={work.frames}; allowed with {shapes.family.name}: {allowed}")
    return work.height, work.width, work.frames or 1


def meta_network(model: ModelConfig, shapes: Shapes) -> tuple[Any, int]:
    """Return the network as it is trained, on the meta device, and its parameter count without adapters."""
    lora = model.train == "lora"
    with torch.device("meta"):
        network: Any = shapes.network()
        parameters = sum(p.numel() for p in network.parameters())
        with only_errors("diffusers"):  # silences its warning about casting
            network.to(DTYPES[model.dtype] if lora else torch.float32)
        if lora:
            network.requires_grad_(False)
            add_lora(network, model.lora)
        freeze_idle(network, shapes.family)
    return network.train(), parameters


def meta_encoders(model: ModelConfig, shapes: Shapes) -> dict[str, Any]:
    """Return the trained text encoders with their adapters, on the meta device, by name."""
    config = model.text_encoder.lora
    with torch.device("meta"):
        encoders = {
            name: shapes.text_encoder(name).to(DTYPES[model.dtype])
            for name in trained_encoders(config, shapes.family)
        }
        add_text_lora(encoders, config, shapes.family)
    return encoders


def _tokens(shapes: Shapes, encoders: Mapping[str, Any], cond: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the conditions of each encoder: tokens for trained ones, embeddings for frozen ones."""
    states = cond["encoder_hidden_states"]
    parts = {k: v for k, v in cond.items() if k not in ("encoder_hidden_states", "text_embeds")}
    last = shapes.family.text_encoders[-1]
    for name in shapes.family.text_encoders:
        if name in encoders:
            parts[f"{name}.tokens"] = states.new_zeros(states.shape[:2], dtype=torch.int32)
            continue
        width = shapes.configs[name]["hidden_size"]
        parts[f"{name}.encoder_hidden_states"] = states.new_zeros(*states.shape[:2], width)
        if name == last and "text_embeds" in cond:
            parts[f"{name}.text_embeds"] = cond["text_embeds"]
    return parts


class Activations:
    """Counts the bytes that autograd saves for the backward, each storage once, without parameters.

    With gradient checkpointing (``checkpointing``: true, or N for every N-th block) the inputs of all
    checkpointed blocks are saved, and the inside of one block at a time, of which the largest counts; with
    every N-th, what was saved after a block is freed before its inside is. Trained text encoders
    (``encoders``) are checkpointed as well. ``flops`` counts the forward.

    With ``offload`` saved tensors are in main memory (``offloaded``); the device holds the inside of one
    block, or the largest tensor that the backward needs.

    Attributes:
        bytes: bytes saved on the device so far.
        offloaded: bytes saved in main memory so far.
        recomputed: FLOPs of the checkpointed blocks so far, by ``flops``.
    """

    def __init__(
        self,
        network: Any,
        checkpointing: bool | int,
        encoders: Iterable[Any] = (),
        *,
        offload: bool = False,
        flops: Flops | None = None,
    ) -> None:
        self.bytes = self.offloaded = self.recomputed = 0
        self._flops = flops or Flops()
        self._offload, self._largest_tensor = offload, 0
        self._encoders = list(encoders)
        modules = [network, *self._encoders]
        self._parameters = {p.untyped_storage()._cdata for m in modules for p in m.parameters()}
        self._network = network
        self._checkpointing = checkpointing
        self._inside = 0
        self._largest = self._peak = 0
        self._in_block = False
        self._storages: dict[int, Tensor] = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count what is saved inside the context; ``bytes`` holds the sum after it."""
        every = int(self._checkpointing)
        if every:
            enable_checkpointing(self._network, self._block, every)
            for encoder in self._encoders:
                checkpoint_encoder(encoder, self._block, every)
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield
        if self._offload:
            self.offloaded, self.bytes = self.bytes, max(self._largest, self._largest_tensor)
        else:
            self.bytes = max(self.bytes, self._peak) if every > 1 else self.bytes + self._largest
        if every:
            disable_checkpointing(self._network)

    def _pack(self, tensor: Tensor) -> Tensor:
        new = self._new_bytes(tensor)
        if self._in_block:
            self._inside += new
        else:
            self.bytes += new
        return tensor

    def _new_bytes(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage._cdata in self._parameters or storage._cdata in self._storages:
            return 0
        # keeps the tensor alive, so that no other storage gets its address
        self._storages[storage._cdata] = tensor
        self._largest_tensor = max(self._largest_tensor, storage.nbytes())
        return storage.nbytes()

    def _block(self, block: Callable[..., Any], *inputs: Any) -> Any:
        """Run a block in place of torch's checkpoint; count its inputs and its inside separately. A block
        within another counts with it."""
        if self._in_block:
            return block(*inputs)
        before = self._flops.total
        self.bytes += sum(self._new_bytes(x) for x in inputs if isinstance(x, Tensor))
        self._in_block, self._inside = True, 0
        outputs = block(*inputs)
        self._in_block = False
        self._largest = max(self._largest, self._inside)
        self._peak = max(self._peak, self.bytes + self._inside)
        self.recomputed += self._flops.total - before
        return outputs


def state_bytes(parameter: Tensor, optimizer: OptimizerConfig) -> int:
    """Return the bytes of optimizer state for one parameter.

    AdamW has two float32 moments. Its 8-bit form has two bytes an element and, for each moment, a float32
    scale a block of 256; tensors under 4096 elements stay float32. Adafactor has a row and a column of second
    moments (Shazeer and Stern 2018, arXiv 1804.04235).
    """
    n = parameter.numel()
    if optimizer.type == "adafactor":
        return 4 * (n // parameter.shape[-1] + n // parameter.shape[-2]) if parameter.dim() > 1 else 4 * n
    if optimizer.type.endswith("adamw8bit") and n >= 4096:
        return 2 * n + 8 * -(-n // 256)
    return 8 * n


PAGED = 100_000
"""Elements from which on bitsandbytes pages the moments of a tensor (``Optimizer8bit.get_state_buffer``)."""


def paged_bytes(parameter: Tensor, optimizer: OptimizerConfig) -> int:
    """Return the bytes of a parameter's optimizer state that may leave the device: the moments of a paged
    optimizer, without the scales of 8 bits, of tensors that are large enough.
    """
    n = parameter.numel()
    if not optimizer.type.startswith("paged") or n < PAGED:
        return 0
    return 2 * n if optimizer.type.endswith("8bit") else 8 * n

"""Memory, FLOPs and time of a run before it is run, from shapes alone: no weights, no data, no network access.

The network is run once forward and backward on fake tensors: torch propagates shapes and counts the FLOPs of every matrix
product, convolution and attention at 2 per multiply-add, and autograd says which activations it would keep. Kernels are
those of fused attention, so no attention matrix is counted as stored.

FLOPs per pair = 2 images x (policy forward + backward + recomputation + reference forward), where backward is measured:
about 2 forwards when every weight is trained, about 1 under LoRA, whose frozen weights need no gradient of their own;
recomputation is 1 policy forward with gradient checkpointing, else 0; methods without a reference have no reference forward.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.config import OptimizerConfig, Run
from diffalign.errors import UserError
from diffalign.models.adapters import add_lora, trainable
from diffalign.models.denoisers import adapters_off
from diffalign.models.loaded import only_errors
from diffalign.models.loading import DTYPES
from diffalign.models.shapes import Shapes, shapes_of

GIB = 2**30
AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Estimate:
    """What a run takes on one device. Memory in bytes; FLOPs at 2 per multiply-add.

    Attributes:
        family: name of the model family.
        resolution: pixels of the square.
        network_parameters: of the network that is trained, without adapters.
        encoder_parameters: of the VAE and the text encoders.
        trainable_parameters: adapters, or the whole network.
        forward_flops: one image through the network, without adapters: the reference forward.
        policy_flops: one image through the network with its adapters.
        backward_flops: one image back through it.
        flops_per_pair: everything that one pair costs.
        memory: bytes by part while training, encoders freed.
        encoder_memory: bytes of the encoders while the cache is filled.
        pairs_per_step: on one device.
        pairs_per_second: at the stated speed; None without one.
        seconds: of the whole run at that speed.
    """

    family: str
    resolution: int
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

    @property
    def total_memory(self) -> int:
        """Bytes while training, before the allocator's own share (some 5 to 10 %)."""
        return sum(self.memory.values())

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"total_memory": self.total_memory}

    def rows(self) -> list[tuple[str, str]]:
        """(name, value with its unit) for a table."""
        rows = [
            ("family", self.family),
            ("resolution", f"{self.resolution} px"),
            ("network parameters", f"{self.network_parameters:,}"),
            ("VAE and text encoder parameters", f"{self.encoder_parameters:,}"),
            ("trainable parameters", f"{self.trainable_parameters:,}"),
            ("forward of one image", tera(self.forward_flops)),
            ("forward of one image, with adapters", tera(self.policy_flops)),
            ("backward of one image", tera(self.backward_flops)),
            ("one pair (2 images: forward, backward, recomputation, reference)", tera(self.flops_per_pair)),
            *((f"memory: {name}", size(value)) for name, value in self.memory.items()),
            ("memory while training", size(self.total_memory)),
            ("memory of the encoders while caching", size(self.encoder_memory)),
            ("pairs per step and device", str(self.pairs_per_step)),
        ]
        if self.pairs_per_second is not None and self.seconds is not None:
            rows.append(("pairs per second", f"{self.pairs_per_second:.3g}"))
            rows.append(("training time", f"{self.seconds / 3600:.3g} h"))
        return rows


def estimate(run: Run, tflops: float | None = None, utilisation: float = 0.4) -> Estimate:
    """Parameters, FLOPs and memory of ``run`` on one device; its time, if the device's speed is given.

    Args:
        tflops: peak speed of the device in TFLOP/s for the run's precision; None leaves time out.
        utilisation: share of the peak that training reaches.

    Raises:
        UserError: shapes are not known, LoRA targets match nothing, or a number that makes no sense.
    """
    if tflops is not None and tflops <= 0:
        raise UserError(f"tflops={tflops}; allowed: more than 0")
    if not 0 < utilisation <= 1:
        raise UserError(f"utilisation={utilisation}; allowed: more than 0, at most 1")
    shapes = shapes_of(run.model)
    if run.data.resolution % shapes.downscale:
        raise UserError(f"data.resolution={run.data.resolution}; allowed: a multiple of {shapes.downscale}")
    counts = count(run, shapes)
    images = 2 * run.training.batch_size
    forward, policy, backward = (n // images for n in (counts.forward_flops, counts.policy_flops, counts.backward_flops))
    recomputation = policy if run.model.gradient_checkpointing else 0
    reference = forward if needs_reference(run) else 0
    per_pair = 2 * (policy + backward + recomputation + reference)
    pairs_per_step = run.training.batch_size * run.training.accumulation
    speed = tflops * 1e12 * utilisation / per_pair if tflops is not None else None
    encoders = shapes.encoder_parameters()
    return Estimate(
        family=shapes.family.name,
        resolution=run.data.resolution,
        network_parameters=counts.network_parameters,
        encoder_parameters=encoders,
        trainable_parameters=counts.trainable_parameters,
        forward_flops=forward,
        policy_flops=policy,
        backward_flops=backward,
        flops_per_pair=per_pair,
        memory=memory(run, counts),
        encoder_memory=encoders * DTYPES[run.model.dtype].itemsize,
        pairs_per_step=pairs_per_step,
        pairs_per_second=speed,
        seconds=run.training.steps * pairs_per_step / speed if speed is not None else None,
    )


def needs_reference(run: Run) -> bool:
    """Whether the run's method asks a reference."""
    from diffalign.methods import build

    return bool(build(run.method).needs_reference)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Counts:
    """What one fake forward and backward of a micro-batch (2 images per pair) showed."""

    network_parameters: int
    trainable_parameters: int
    optimizer_bytes: int
    forward_flops: int
    policy_flops: int
    backward_flops: int
    activations: int
    input_bytes: int


def count(run: Run, shapes: Shapes) -> Counts:
    """Run the network forward and backward on fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    lora, dtype, autocast = run.model.train == "lora", DTYPES[run.model.dtype], AUTOCAST[run.training.mixed_precision]
    images, side = 2 * run.training.batch_size, run.data.resolution // shapes.downscale
    network, parameters = meta_network(run, shapes)
    with FakeTensorMode():
        on_fake_cpu(network)
        config = shapes.configs[shapes.family.network_name]
        dtype_in = dtype if lora else torch.float32
        x_t = torch.zeros(images, config.get("in_channels", 4), side, side, dtype=dtype_in)
        conditions = shapes.family.cond_shapes(config, shapes.tokens)
        cond = {name: torch.zeros(images, *shape) for name, shape in conditions.items()}
        time = torch.zeros(images, dtype=torch.int64)
        kept = Kept(network, run.model.gradient_checkpointing)
        precision = torch.autocast("cpu", autocast) if autocast is not None else nullcontext()
        with FlopCounterMode(display=False) as forward, torch.no_grad(), precision, adapters_off(network):
            shapes.family.call(network, x_t, time, cond)
        with FlopCounterMode(display=False) as policy, precision, kept.watch():
            prediction = shapes.family.call(network, x_t, time, cond)
        with FlopCounterMode(display=False) as backward:
            prediction.float().sum().backward()
        trained = [p for _, p in trainable(network)]
        return Counts(
            network_parameters=parameters,
            trainable_parameters=sum(p.numel() for p in trained),
            optimizer_bytes=sum(state_bytes(p, run.optimizer) for p in trained),
            forward_flops=forward.get_total_flops(),
            policy_flops=policy.get_total_flops(),
            backward_flops=backward.get_total_flops(),
            activations=kept.bytes,
            input_bytes=sum(tensor.nbytes for tensor in (x_t, *cond.values())),
        )


def meta_network(run: Run, shapes: Shapes) -> tuple[Any, int]:
    """The run's network on the meta device as it would be trained, and how many parameters it has without adapters."""
    lora = run.model.train == "lora"
    with torch.device("meta"):
        network: Any = shapes.network()
        parameters = sum(p.numel() for p in network.parameters())
        with only_errors("diffusers"):  # it advises against casting a network that keeps no module in float32
            network.to(DTYPES[run.model.dtype] if lora else torch.float32)
        if lora:
            network.requires_grad_(False)
            add_lora(network, run.model.lora)
    return network.train(), parameters


def on_fake_cpu(network: nn.Module) -> None:
    """Replace meta parameters by fake CPU ones of the mode in force: on meta, attention would not take its fused kernel."""
    for module in network.modules():
        for name, p in module.named_parameters(recurse=False):
            fake = nn.Parameter(torch.zeros(p.shape, dtype=p.dtype, device="cpu"), requires_grad=p.requires_grad)
            module._parameters[name] = fake
        for name, b in module.named_buffers(recurse=False):
            module._buffers[name] = torch.zeros(b.shape, dtype=b.dtype, device="cpu")


class Kept:
    """Counts the bytes that autograd keeps for the backward, each storage once, parameters left out.

    With checkpointing only the inputs of each checkpointed block are kept, and the inside of one block at a time: the
    largest counts.
    """

    def __init__(self, network: Any, checkpointing: bool) -> None:
        self.bytes = 0
        self._parameters = {p.untyped_storage()._cdata for p in network.parameters()}
        self._network = network
        self._checkpointing = checkpointing
        self._inside = 0
        self._largest = 0
        self._in_block = False
        self._storages: dict[int, Tensor] = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count what is saved inside the context; ``bytes`` holds the sum after it."""
        if self._checkpointing:
            self._network.enable_gradient_checkpointing(self._block)
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield
        self.bytes += self._largest
        if self._checkpointing:
            self._network.disable_gradient_checkpointing()

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
        self._storages[storage._cdata] = tensor  # held, so that no other storage gets its address
        return storage.nbytes()

    def _block(self, block: nn.Module, *inputs: Any) -> Any:
        """Stands in for torch's checkpoint: runs the block as it is, and counts its inputs and its inside apart."""
        self.bytes += sum(self._new_bytes(x) for x in inputs if isinstance(x, Tensor))
        self._in_block, self._inside = True, 0
        outputs = block(*inputs)
        self._in_block = False
        self._largest = max(self._largest, self._inside)
        return outputs


def memory(run: Run, counts: Counts) -> dict[str, int]:
    """Bytes by part while training."""
    lora, dtype = run.model.train == "lora", DTYPES[run.model.dtype]
    autocast = AUTOCAST[run.training.mixed_precision]
    trained = 4 * counts.trainable_parameters
    parts = {
        "frozen weights": counts.network_parameters * dtype.itemsize if lora else 0,
        "trained weights (float32)": trained,
        "gradients (float32)": trained,
        f"optimizer state ({run.optimizer.type})": counts.optimizer_bytes,
        "moving average": trained if run.training.ema_decay else 0,
        "reference copy": 0
        if lora or not needs_reference(run)
        else counts.network_parameters * (dtype.itemsize if autocast == dtype else 4),
        "activations": counts.activations,
        "latents and conditions": counts.input_bytes,
    }
    return {name: value for name, value in parts.items() if value}


def state_bytes(parameter: Tensor, optimizer: OptimizerConfig) -> int:
    """Bytes of optimizer state for one parameter.

    AdamW keeps two float32 moments; its 8-bit form two bytes and a float32 scale per block of 256 for each, but leaves
    tensors under 4096 elements in float32; Adafactor a row and a column of second moments (Shazeer and Stern 2018, arXiv
    1804.04235).
    """
    n = parameter.numel()
    if optimizer.type == "adafactor":
        return 4 * (n // parameter.shape[-1] + n // parameter.shape[-2]) if parameter.dim() > 1 else 4 * n
    if optimizer.type == "adamw8bit" and n >= 4096:
        return 2 * n + 8 * -(-n // 256)
    return 8 * n


def size(count_of_bytes: int) -> str:
    """Bytes for people."""
    return f"{count_of_bytes / GIB:.2f} GiB" if count_of_bytes >= GIB / 100 else f"{count_of_bytes / 2**20:.2f} MiB"


def tera(flops: int) -> str:
    """FLOPs for people."""
    return f"{flops / 1e12:.2f} TFLOP" if flops >= 1e10 else f"{flops / 1e9:.3f} GFLOP"

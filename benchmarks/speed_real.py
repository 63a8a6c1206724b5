"""Steps on a network of the real size with random weights made on the device, and latents drawn there.

Neither a checkpoint nor encoders are read: what is timed is the step of a run whose set is encoded.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from diffalign.config.io import apply_overrides
from diffalign.config.schema import DataConfig, LoraConfig, ModelConfig, Run, TrainingConfig
from diffalign.diffusion.paths import path_from_config
from diffalign.diffusion.reference_bank import NAME
from diffalign.estimate.estimate import Estimate, estimate
from diffalign.estimate.shapes import Shapes, shapes_of
from diffalign.methods import build
from diffalign.models.attention import set_attention
from diffalign.models.loaded import LoadedModel
from diffalign.models.loading import DTYPES
from diffalign.models.precision import AUTOCAST
from diffalign.runs.micro_batch import workload_of
from diffalign.runs.roles import assign_roles
from diffalign.training.acceleration import accelerator_for, set_products
from diffalign.training.loop import train
from diffalign.types import Batch


@dataclass(frozen=True)
class Size:
    """A model and what it is trained on.

    Attributes:
        path: ``model.path`` whose shapes are built in.
        side: of the images in pixels.
        batch: pairs a step.
        frames: of a video; None: images.
        scheduler: the configuration that its noising path is read from.
    """

    path: str
    side: int
    batch: int
    frames: int | None
    scheduler: Mapping[str, Any]


BETAS: Mapping[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW: Mapping[str, Any] = {"shift": 3.0}

SIZES: Mapping[str, Size] = {
    "sd15": Size("stable-diffusion-v1-5/stable-diffusion-v1-5", 512, 16, None, BETAS),
    "sdxl": Size("stabilityai/stable-diffusion-xl-base-1.0", 1024, 4, None, BETAS),
    "sd3": Size("stabilityai/stable-diffusion-3.5-medium", 1024, 4, None, FLOW),
    "flux": Size("black-forest-labs/FLUX.1-dev", 1024, 1, None, FLOW),
    "z_image": Size("Tongyi-MAI/Z-Image", 1024, 2, None, FLOW),
    "wan": Size("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 480, 1, 17, FLOW),
}


def run_of(size: Size, flags: Sequence[str], steps: int, batch: int) -> Run:
    """Return the run that is timed: DPO in bfloat16 on a GPU, in float32 on a CPU."""
    half = torch.cuda.is_available()
    base = Run(
        method={"type": "dpo", "beta": 5000.0},
        model=ModelConfig(path=size.path, lora=LoraConfig(rank=16), dtype="bfloat16" if half else "float32"),
        data=DataConfig(path="drawn", resolution=size.side, frames=size.frames),
        training=TrainingConfig(steps=steps, batch_size=batch, mixed_precision="bf16" if half else "no"),
    )
    return apply_overrides(base, list(flags))


def flops_per_pair(name: str, flags: Sequence[str]) -> int:
    """Return the FLOPs of one pair, without those of a recomputation: what the step is for."""
    size = SIZES[name]
    run = run_of(size, flags, 1, 1)
    return useful(estimate(workload_of(run)), reference=not run.data.reference_bank)


def useful(told: Estimate, reference: bool = True) -> int:
    """Return the FLOPs of one pair: forward and backward of the policy, and the reference's forward; those of
    a recomputation are no use.
    """
    return 2 * (told.policy_flops + told.backward_flops + told.forward_flops * reference)


def model_of(run: Run, size: Size, device: torch.device) -> tuple[LoadedModel, Shapes]:
    """Return a model without encoders, its network initialised by torch on the device."""
    shapes, dtype = shapes_of(run.model), DTYPES[run.model.dtype]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            network: Any = shapes.network()
    finally:
        torch.set_default_dtype(before)
    name = shapes.family.network_name
    vae = SimpleNamespace(config=shapes.configs["vae"])
    pipeline = SimpleNamespace(**{name: network.to(dtype).eval(), "vae": vae})
    path, target = path_from_config(size.scheduler, shapes.family.patch(network.config))
    set_attention(network, run.model.attention, device, AUTOCAST[run.training.mixed_precision] or dtype)
    return LoadedModel(shapes.family, pipeline, path, target, run.model.path, dtype), shapes


class Drawn:
    """The same pairs of random latents at every step, on the device; masks let everything through.

    Args:
        banked: whether noise and times are those of one draw of a bank, so that the reference is asked once.
    """

    def __init__(
        self, shapes: Shapes, size: Size, batch: int, device: torch.device, banked: bool = False
    ) -> None:
        rows = 2 * batch
        latents = shapes.latent_shape(size.side, size.side, size.frames or 1)
        cond = {
            name: (torch.ones if "mask" in name else torch.randn)(rows, *shape, device=device)
            for name, shape in shapes.cond_shapes(latents).items()
        }
        if banked:
            cond[NAME] = torch.arange(rows, device=device).float()
        group = torch.arange(batch).repeat_interleave(2)
        score = torch.tensor([1.0, 0.0], device=device).repeat(batch)
        x = torch.randn(rows, *latents, device=device)
        self._batch = Batch(x, cond, group, score, draws=list(range(batch)) if banked else None)

    def seek(self, micro_step: int) -> None:
        """Nothing to skip."""

    def __iter__(self) -> Iterator[Batch[Any]]:
        while True:
            yield self._batch


def steps_of(name: str, flags: Sequence[str], steps: int, batch: int) -> None:
    """Take optimizer steps."""
    size = SIZES[name]
    run = run_of(size, flags, steps, batch)
    accelerator = accelerator_for(run.training)
    set_products(run.training.float32_matmul, accelerator.device.type)
    torch.manual_seed(0)
    model, shapes = model_of(run, size, accelerator.device)
    method = build(run.method)
    roles = assign_roles(run, model, method, AUTOCAST[run.training.mixed_precision])
    train(
        method=method,
        denoiser_of=roles.policy_of,
        reference=roles.reference,
        network=roles.network,
        parameters=roles.parameters,
        source=Drawn(shapes, size, batch, accelerator.device, bool(run.data.reference_bank)),
        settings=run.training,
        optimizer=run.optimizer,
        accelerator=accelerator,
    )

"""What each of two processes does in ``test_context_parallel``: the gradient of its part of a FLUX's tokens.

``python -m torch.distributed.run --nproc_per_node 2 -m tests.models.context_worker UNUSED FOLDER``
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn


def network() -> nn.Module:
    """Make a FLUX of two heads, which two processes can share out, with the same weights everywhere."""
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    torch.manual_seed(0)
    made: nn.Module = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return made


def gradients(flux: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the prediction of 16 tokens of an image and 8 of a text, and gradients of its sum of squares."""
    generator = torch.Generator().manual_seed(1)
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    out = flux(
        hidden_states=torch.randn(2, 16, 4, generator=generator),
        encoder_hidden_states=torch.randn(2, 8, 32, generator=generator),
        pooled_projections=torch.randn(2, 32, generator=generator),
        timestep=torch.tensor([0.3, 0.7]),
        img_ids=torch.stack([torch.zeros(4, 4), rows, columns], -1).view(16, 3),
        txt_ids=torch.zeros(8, 3),
        return_dict=False,
    )[0]
    out.square().sum().backward()
    return out.detach(), {name: p.grad for name, p in flux.named_parameters() if p.grad is not None}


def main() -> None:
    """Write prediction and gradients of this process."""
    from diffusers import ContextParallelConfig

    torch.distributed.init_process_group("gloo")
    torch.accelerator.device_count = lambda: 2  # diffusers divides by it, and a CPU counts as none
    flux = network()
    flux.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))  # type: ignore[operator]
    out, found = gradients(flux)
    rank = torch.distributed.get_rank()
    torch.save({"": out, **found}, Path(sys.argv[2]) / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

"""What each of two processes does in ``test_context_parallel``: the gradient of its part of the tokens.

``python -m tests.ranks 2 tests.models.context_worker FOLDER FAMILY...``
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from diffalign.config.schema import ModelConfig, TrainingConfig
from diffalign.models.context import share_tokens
from diffalign.models.loaded import LoadedModel
from diffalign.models.loading import load
from diffalign.training.acceleration import accelerator_for
from diffalign.training.context import context_mesh
from tests.models.inputs import random_inputs


def model_of(folder: Path, family: str) -> LoadedModel:
    """Load a tiny random model with moved weights, all trained: some of a fresh one are 0."""
    model = load(ModelConfig(path=str(folder / family), family=family))
    model.network.requires_grad_(True).float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def gradients(model: LoadedModel) -> dict[str, Tensor]:
    """Return the prediction (as "") and the gradients of its sum of squares."""
    x, cond = random_inputs(model)
    times = model.path.model_time(torch.tensor([0.3, 0.7]))
    out = model.family.call(model.network, x, times, cond)
    out.square().sum().backward()
    found = {name: p.grad for name, p in model.network.named_parameters() if p.grad is not None}
    return {"": out.detach(), **found}


def main() -> None:
    """Write prediction and gradients of this process."""
    folder = Path(sys.argv[1])
    settings = TrainingConfig(context=2)
    accelerator = accelerator_for(settings)
    for family in sys.argv[2:]:
        model = model_of(folder, family)
        share_tokens(model.network, context_mesh(settings, accelerator))
        torch.save(gradients(model), folder / f"{family}-{accelerator.process_index}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

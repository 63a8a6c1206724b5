"""What each of two processes does in ``test_text_distributed``: the gradient of its row, through the prepared
module.

``python -m tests.ranks 2 tests.models.text_worker PIPELINE FOLDER``
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from diffalign.config.schema import TrainingConfig
from diffalign.training.acceleration import Accelerator, accelerator_for
from tests.models.inputs import conditions, states
from tests.models.test_text_encoders import PROMPTS, configured, prepared


def gradients(folder: str, accelerator: Accelerator | None = None) -> dict[str, Tensor]:
    """Gradients of the text encoders' adapters: of both rows, or of this rank's, synchronised."""
    model, policy, _, parameters = prepared(configured(folder))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    (x_t, t), cond = states(), conditions(model, PROMPTS)
    if accelerator is not None:
        policy = replace(policy, network=accelerator.prepare(policy.network))
        rank = accelerator.process_index
        x_t, t, cond = x_t[rank, None], t[rank, None], {k: v[rank, None] for k, v in cond.items()}
    policy(x_t, t, cond).square().mean().backward()
    return {name: p.grad for name, p in parameters.items() if p.grad is not None}


if __name__ == "__main__":
    accelerator = accelerator_for(TrainingConfig())
    result = gradients(sys.argv[1], accelerator)
    torch.save(result, Path(sys.argv[2]) / f"rank{accelerator.process_index}.pt")

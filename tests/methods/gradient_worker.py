"""What each of two processes does in ``test_distributed_gradients``: runs on the plane that differentiate a
reward, and what they end with, written to a folder.

``python -m tests.ranks 2 tests.methods.gradient_worker FOLDER``
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffalign.config.schema import OptimizerConfig, RolloutConfig, TrainingConfig
from diffalign.methods.adjoint_dpm import AdjointDPM
from diffalign.methods.adjoint_matching import AdjointMatching
from diffalign.methods.draft import DRaFT
from diffalign.plane.online import PROMPTS, PlaneRolloutModel, plane_setting
from diffalign.plane.plane import denoiser_of
from diffalign.rollout.noise import NoiseSource
from diffalign.training.acceleration import accelerator_for
from diffalign.training.loop import train
from tests.rollout.toys import network
from tests.training.toys import weights

METHODS: dict[str, Any] = {
    "adjoint_dpm": lambda: AdjointDPM(hold=0.1),
    "adjoint_dpm, exact": lambda: AdjointDPM(hold=0.1, backward="exact"),
    "adjoint_matching": lambda: AdjointMatching(beta=0.1, quantile=0.8),
    "draft": lambda: DRaFT(last=2, hold=0.1),
}
MOMENTS = "first moments after one step"


def rewarded(points: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """(N,): how near points are to (1, height of their prompt)."""
    heights = torch.tensor([float(PROMPTS.index(prompt)) for prompt in prompts])
    return -((points[:, 0] - 1) ** 2) - (points[:, 1] - heights) ** 2


def run(method: Any, dtype: torch.dtype, steps: int, **changes: Any) -> Any:
    """Return the state after steps of 8 prompts in 2 micro-batches, by any number of processes."""
    settings = TrainingConfig(steps=steps, accumulation=2, seed=1, **changes)
    accelerator = accelerator_for(settings)
    ranks = accelerator.num_processes
    settings = replace(settings, batch_size=4 // ranks)
    policy = network(0.1, dtype)
    sampling = RolloutConfig(steps=4, eta=float(method.eta), samples=1, shared_noise=False)
    source = NoiseSource(
        PlaneRolloutModel(), rewarded, PROMPTS, plane_setting(sampling), groups=4 // ranks,
        rank=accelerator.process_index, world=ranks, seed=3,
    )  # fmt: skip
    return train(
        method=method,
        denoiser_of=lambda prepared: replace(denoiser_of(policy), network=prepared),
        reference=denoiser_of(network(0, dtype)),
        network=policy,
        parameters=list(policy.named_parameters()),
        source=source,
        settings=settings,
        optimizer=OptimizerConfig(learning_rate=1e-3),
        accelerator=accelerator,
    )


def equal_runs(dtype: torch.dtype) -> dict[str, Any]:
    """Train runs that must not depend on the number of processes."""
    outcome: dict[str, Any] = {}
    for name, method in METHODS.items():
        state = run(method(), dtype, steps=4)
        outcome[name] = weights(state) | {"loss": torch.tensor(state.loss or 0.0)}
        outcome[f"{name} metrics"] = state.averages()
        first = run(method(), dtype, steps=1).optimizer.state_dict()["state"]
        outcome[f"{name} {MOMENTS}"] = {str(i): state["exp_avg"] for i, state in first.items()}
    return outcome


def main() -> None:
    """Write what this process ends with."""
    rank = accelerator_for(TrainingConfig()).process_index
    torch.save(equal_runs(torch.float64), Path(sys.argv[1]) / f"rank{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

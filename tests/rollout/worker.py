"""What each of two processes does in ``test_distributed_rounds``: online runs on the plane, and what they
measured, written to a folder.

``python -m tests.ranks 2 tests.rollout.worker FOLDER``
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diffalign.config.schema import OptimizerConfig, TrainingConfig
from diffalign.methods.d3po import D3PO
from diffalign.methods.ddpo import DDPO
from diffalign.methods.spo import SPO
from diffalign.rollout.store import NOWHERE, RoundStore
from diffalign.training.acceleration import accelerator_for
from diffalign.training.loop import train
from tests.rollout.toys import World, tied
from tests.training.toys import weights

METHODS = {"d3po": D3PO(beta=1), "spo": SPO(), "ddpo": DDPO(clip=0.2)}
MOMENTS = "first moments after one step"


@dataclass
class Recorder:
    """A method that keeps the weights of its micro-batches."""

    method: Any
    terms: list[float]

    def __call__(self, policy, reference, batch, generator):
        step = self.method(policy, reference, batch, generator)
        self.terms.append(float(step.weight))
        return step


def world_of(name, judge, dtype, store=NOWHERE):
    """Configure equal work for any number of processes: 8 prompts a round, 4 groups a micro-batch."""
    accelerator = accelerator_for(TrainingConfig())
    ranks = accelerator.num_processes
    advantage = ("group" if judge else "prompt") if name == "ddpo" else "none"
    return World(
        shape="tree" if name == "spo" else "trajectories",
        rollout={"prompts_per_round": 8 // ranks, "advantage": advantage},
        batch_size=4 // ranks,
        judge=judge,
        moved=0.0,
        dtype=dtype,
        rank=accelerator.process_index,
        world=ranks,
        store=store,
    )


def run(w, method, steps=6, **changes):
    """(state, weight of each micro-batch) of a few optimizer steps: some of them are of a second round."""
    settings = TrainingConfig(steps=steps, batch_size=w.plan.batch_size, accumulation=2, seed=1, **changes)
    terms: list[float] = []
    state = train(
        method=Recorder(method, terms),
        denoiser_of=lambda prepared: replace(w.policy.inner, network=prepared),
        reference=w.reference,
        network=w.network,
        parameters=list(w.network.named_parameters()),
        source=w.source,
        settings=settings,
        optimizer=OptimizerConfig(learning_rate=1e-3),
        accelerator=accelerator_for(settings),
    )
    return state, terms


def equal_runs(dtype: torch.dtype) -> dict:
    """Train runs that must not depend on the number of processes."""
    outcome = {}
    for name, method in METHODS.items():
        for kind, judge in (("", None), (" ragged", tied(0, 2, 3, 5)), (" all ties", tied(*range(6)))):
            w = world_of(name, judge, dtype)
            state, terms = run(w, method, steps=2 if "all" in kind else 6)
            outcome[name + kind] = weights(state) | {"loss": torch.tensor(state.loss or 0.0)}
            outcome[f"{name}{kind} metrics"] = state.averages()
            outcome[f"{name}{kind} report"] = w.source.report.figures
            outcome[f"{name}{kind} terms"] = terms
        clipped, _ = run(world_of(name, None, dtype), method, 1, max_grad_norm=1e-3)
        outcome[f"{name} {MOMENTS}"] = {
            str(i): s["exp_avg"] for i, s in clipped.optimizer.state_dict()["state"].items()
        }
    return outcome


def main() -> None:
    folder = Path(sys.argv[1])
    accelerator = accelerator_for(TrainingConfig())
    rank = accelerator.process_index
    outcome: dict[str, Any] = {"world": accelerator.num_processes}
    for dtype in (torch.float32, torch.float64):
        outcome[str(dtype)] = equal_runs(dtype)
    store = RoundStore(folder / "rollouts", rank)
    w = world_of("ddpo", None, torch.float32, store)
    kept, _ = run(w, METHODS["ddpo"])
    again = world_of("ddpo", None, torch.float32, store)
    accelerator.wait_for_everyone()
    asked = run(again, METHODS["ddpo"], 2) and [prompt for some in again.judge.asked for prompt in some]
    outcome |= {
        "prompts": [w.source.prompts_of(0), w.source.prompts_of(1)],
        "kept": weights(kept),
        "asked": asked,
    }
    torch.save(outcome, folder / f"rank{rank}.pt")
    accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

"""What each of two processes does in ``test_distributed``: runs, and what they measured, written to a folder.

``python -m tests.ranks 2 tests.training.worker FOLDER``
"""

import os
import signal
import sys
from pathlib import Path

import torch

from diffalign.config.schema import CheckpointConfig, LoggingConfig, OptimizerConfig, TrainingConfig
from diffalign.methods.dpo import DPO
from diffalign.plane.source import TensorSource
from diffalign.strategies.sdpo import SDPO
from diffalign.training.acceleration import accelerator_for
from diffalign.training.checkpoint import Checkpoints, fingerprint
from diffalign.training.diagnostics import HeldOut
from diffalign.training.hooks import standard_hooks
from diffalign.training.reference import RefreshReference
from tests.training.toys import Probe, Trial, chase, pairs, weights

RAGGED = (0, 1, 2, 3, 5, 7, 11, 13, 17, 19)


class Recorder(DPO):
    """DPO that keeps the noise it drew and its terms."""

    def __call__(self, policy, reference, batch, generator):
        class Listening:
            def uniform(self, *arguments):
                return generator.uniform(*arguments)

            def normal(self, *arguments):
                drawn = generator.normal(*arguments)
                NOISE.append(drawn)
                return drawn

        step = super().__call__(policy, reference, batch, Listening())
        TERMS.append(float(step.weight))
        return step


NOISE: list[torch.Tensor] = []
TERMS: list[float] = []
SAFE = SDPO(mu=0.9).wrap(DPO(beta=20.0))
MOMENTS = "first moments after one step"


def settings(world: int, **changes) -> TrainingConfig:
    """Configure equal work for any number of processes: 8 pairs a step."""
    return TrainingConfig(**{"steps": 6, "batch_size": 4 // world, "accumulation": 2, "seed": 1} | changes)


def whole_batch(world: int) -> TrainingConfig:
    """Without accumulation, over which SDPO's lambda would not be shared."""
    return settings(world, accumulation=1, batch_size=8 // world)


def following(config: TrainingConfig, optimizer: OptimizerConfig, dtype: torch.dtype) -> Trial:
    """Train a run whose reference moves half-way to the policy every other step."""
    trial = Trial(settings=config, optimizer=optimizer, dtype=dtype)
    trial.kept = {name: p.detach() for name, p in trial.reference.named_parameters()}
    trial.hooks = [RefreshReference(trial.kept, 2, 0.5)]
    return trial


def equal_runs(world: int, dtype: torch.dtype) -> dict:
    """Train runs that must not depend on the number of processes."""
    outcome, optimizer = {}, OptimizerConfig(learning_rate=1e-3)
    for name, ties in (("plain", ()), ("ragged", RAGGED), ("all ties", tuple(range(24)))):
        state = Trial(settings=settings(world), optimizer=optimizer, ties=ties, dtype=dtype).run()
        outcome[name] = weights(state) | {"loss": torch.tensor(state.loss or 0.0)}
        norms = [m["grad_norm"] for m in state.meter.of_all_ranks(state.accelerator) if "grad_norm" in m]
        outcome[f"{name} norms"] = sum(weight for _, weight in norms)
        outcome[f"{name} metrics"] = state.averages()
    for name, trial in (
        ("refreshed", following(settings(world), optimizer, dtype)),
        (
            "sdpo",
            Trial(settings=whole_batch(world), optimizer=optimizer, ties=RAGGED, dtype=dtype, method=SAFE),
        ),
    ):
        state = trial.run()
        outcome[name] = (
            weights(state)
            | {"loss": torch.tensor(state.loss or 0.0)}
            | {f"kept {n}": p for n, p in (trial.kept or {}).items()}
        )
        outcome[f"{name} metrics"] = state.averages()
    state = chase(settings(world), optimizer, dtype)
    outcome["fast slow"] = weights(state) | {"loss": torch.tensor(state.loss or 0.0)}
    outcome["fast slow metrics"] = state.averages()
    clipped = Trial(settings=settings(world, steps=1, max_grad_norm=1e-3), ties=RAGGED, dtype=dtype).run()
    outcome[MOMENTS] = {str(i): s["exp_avg"] for i, s in clipped.optimizer.state_dict()["state"].items()}
    hook = HeldOut([TensorSource(**pairs(RAGGED, dtype), batch_size=8).batch(m) for m in range(3)], bins=2)
    Trial(settings=settings(world), optimizer=optimizer, dtype=dtype, hooks=[hook]).run()
    outcome["held out"] = hook.history[-1][1]
    return outcome


def logged(folder: Path, rank: int, resume: str | None, stop_after: int | None):
    """Train a run with checkpoints; only the second rank receives the signal to stop."""
    config, optimizer = settings(2, steps=8), OptimizerConfig(learning_rate=1e-2)
    checkpoints = Checkpoints(folder / "checkpoints", 2, fingerprint(config, optimizer, 2))

    def stop(state):
        if state.step == stop_after and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    hooks = standard_hooks(
        folder, LoggingConfig(every=4, trackers=()), CheckpointConfig(100), checkpoints, [Probe(stop)]
    )
    return Trial(
        settings=config, optimizer=optimizer, dropout=0.3, hooks=hooks, resume=checkpoints.start(resume)
    ).run()


def main() -> None:
    folder = Path(sys.argv[1])
    accelerator = accelerator_for(TrainingConfig())
    rank = accelerator.process_index
    outcome = {"world": accelerator.num_processes, "device": str(accelerator.device)}
    for dtype in (torch.float32, torch.float64):
        outcome[str(dtype)] = equal_runs(2, dtype)
    Trial(settings=settings(2, steps=3), method=Recorder(beta=20.0), ties=RAGGED).run()
    outcome |= {"noise": torch.cat(NOISE), "terms": TERMS}

    whole = logged(folder / "whole", rank, None, None)
    first = logged(folder / "parts", rank, None, 4)
    accelerator.wait_for_everyone()
    second = logged(folder / "parts", rank, "latest", None)
    outcome |= {"whole": weights(whole), "second": weights(second)}
    outcome |= {"stopped": (first.interrupted, first.step), "ended": (second.interrupted, second.step)}
    torch.save(outcome, folder / f"rank{rank}.pt")
    accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

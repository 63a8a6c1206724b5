"""A network of a few weights on the plane, and a run of it: small enough to train in milliseconds."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from diffalign.config.schema import OptimizerConfig, TrainingConfig
from diffalign.methods.dpo import DPO
from diffalign.plane.source import TensorSource
from diffalign.strategies.fast_slow import FastSlow, Twin
from diffalign.training.acceleration import accelerator_for
from diffalign.training.exchange import Exchange
from diffalign.training.loop import train
from diffalign.training.state import TrainState
from tests.helpers import sd_path


class Mlp(nn.Module):
    """eps(x_t, t, c) on the plane."""

    def __init__(self, width: int = 8, dropout: float = 0.0):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, width),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2),
        )

    def forward(self, x_t, t, c):
        return self.layers(torch.cat([x_t, t[:, None].to(x_t), c.to(x_t)], 1))


@dataclass
class PlaneDenoiser:
    """A module as a ``types.Denoiser``."""

    network: nn.Module
    path: Any = field(default_factory=sd_path)
    target: str = "eps"

    def __call__(self, x_t, t, cond):
        return self.network(x_t, t, cond["c"])


def network(dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> Mlp:
    torch.manual_seed(7)
    return Mlp(dropout=dropout).to(dtype).eval()


def pairs(
    ties: tuple[int, ...] = (), dtype: torch.dtype = torch.float64, count: int = 24, gap: float = 1.0
) -> dict[str, Any]:
    """(x, score, cond) of pairs; winners lie ``gap`` to the right, and either member may be the winner."""
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(count, 2, 2, generator=draw, dtype=dtype)
    first = torch.randint(0, 2, (count,), generator=draw)
    score = torch.stack([1 - first, first], 1).to(torch.float32)
    x[..., 0] += gap * score.to(dtype)
    for index in ties:
        score[index] = 0.5
    return {"x": x, "score": score, "cond": {"c": torch.randn(count, 2, 1, generator=draw, dtype=dtype)}}


@dataclass
class Trial:
    """One run, ready to start; fields are what tests vary."""

    settings: TrainingConfig = TrainingConfig(steps=5, batch_size=4, max_grad_norm=1.0)
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-2)
    method: Any = DPO(beta=20.0)
    ties: tuple[int, ...] = ()
    dropout: float = 0.0
    dtype: torch.dtype = torch.float64
    hooks: Any = ()
    resume: Any = None
    source: Any = None
    network: Any = None
    accelerator: Any = None
    moved: bool = True
    kept: Any = None

    def __post_init__(self) -> None:
        self.accelerator = self.accelerator or accelerator_for(self.settings)
        self.network = self.network or network(self.dropout, self.dtype)
        self.reference = copy.deepcopy(self.network).requires_grad_(False).eval()
        if self.moved:  # a policy that has left its reference, so that no margin is exactly 0
            with torch.no_grad():
                for p in self.network.parameters():
                    p.mul_(1.1)
        self.source = self.source or TensorSource(
            **pairs(self.ties, self.dtype),
            batch_size=self.settings.batch_size,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
            seed=self.settings.seed,
        )

    def run(self) -> TrainState:
        return train(
            method=self.method,
            denoiser_of=PlaneDenoiser,
            reference=PlaneDenoiser(self.reference),
            network=self.network,
            parameters=list(self.network.named_parameters()),
            source=self.source,
            settings=self.settings,
            optimizer=self.optimizer,
            accelerator=self.accelerator,
            hooks=self.hooks,
            resume=self.resume,
            kept=self.kept,
        )


class Two(nn.Module):
    """Two small networks in one module; a flag says which is asked."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        super().__init__()
        torch.manual_seed(7)
        self.fast, self.slow = Mlp().to(dtype), Mlp().to(dtype)

    def forward(self, x_t, t, c, which):
        return (self.fast if which == "fast" else self.slow)(x_t, t, c)


@dataclass
class Side(PlaneDenoiser):
    """One of the two."""

    which: str = "fast"

    def __call__(self, x_t, t, cond):
        return self.network(x_t, t, cond["c"], self.which)


def chase(
    settings: TrainingConfig,
    optimizer: OptimizerConfig,
    dtype: torch.dtype = torch.float64,
    every: int = 2,
    hooks: Any = lambda extra: extra,
    resume: Any = None,
) -> TrainState:
    """Train a run of fast-slow chasing; ``hooks`` adds other hooks around the exchanging one."""
    network, tally = Two(dtype), torch.zeros(3)
    fellows = {n: n.replace("fast.", "slow.", 1) for n, _ in network.named_parameters() if "fast." in n}
    trial = Trial(settings=settings, moved=False, dtype=dtype)
    return train(
        method=FastSlow(weight=0.2).wrap(DPO(beta=20.0)),
        denoiser_of=lambda prepared: Twin(Side(prepared), Side(prepared, which="slow"), tally),
        reference=PlaneDenoiser(trial.reference),
        network=network,
        parameters=list(network.named_parameters()),
        source=trial.source,
        settings=settings,
        optimizer=optimizer,
        accelerator=trial.accelerator,
        hooks=hooks([Exchange(fellows, tally, every)]),
        resume=resume,
        kept={"tally": tally},
    )


class Probe:
    """A hook that calls a function after each step."""

    def __init__(self, function):
        self.function = function

    def on_start(self, state):
        pass

    def on_step(self, state):
        self.function(state)

    def on_end(self, state):
        pass


def weights(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in state.parameters}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)

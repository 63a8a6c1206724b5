"""The plane: a two-dimensional problem on which alignment takes two seconds and the optimum is known.

The data are eight Gaussian modes on a ring. The label (the "prompt") selects an arc of it: 0 all, 1 the left
half, 2 the right half. The reward is the height of a point. Latents are (B, 2) and use the same code as
images, on SD's noise schedule or, in a flow version, as a rectified flow.

Since the reward is linear, the KL-regularised optimum p*(x | c) ~ p(x | c) exp(reward(x) / tau) is again a
Gaussian mixture (``Plane.optimum``). So three quantities can be measured that images do not allow: the gain
in reward, the mass off the support (over-optimisation), and the distance to the optimum of the same reward.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffalign.config.schema import OptimizerConfig, TrainingConfig
from diffalign.diffusion.paths import path_from_config
from diffalign.diffusion.samplers import sample
from diffalign.methods.sft import SFT
from diffalign.models.denoisers import NetworkDenoiser
from diffalign.plane.source import TensorSource
from diffalign.plane.trailing import followers
from diffalign.training.acceleration import accelerator_for
from diffalign.training.loop import train
from diffalign.types import Batch, Cond, Denoiser, Method

SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "epsilon",
}
FLOW_SCHEDULER = {"shift": 1.0}
LABELS = 3


@dataclass(frozen=True)
class Mixture:
    """A Gaussian mixture of K isotropic modes.

    Attributes:
        weights: (K,), summing to 1.
        means: (K, 2).
        std: standard deviation of every mode.
    """

    weights: Tensor
    means: Tensor
    std: float

    def points(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw points (count, 2)."""
        mode = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        return self.means[mode] + self.std * torch.randn(count, 2, generator=generator)

    def mean_reward(self) -> float:
        """Return the exact mean height."""
        return float((self.weights * self.means[:, 1]).sum())


@dataclass(frozen=True)
class Plane:
    """The data: ``modes`` Gaussians of width ``std`` on a ring of radius ``radius``."""

    modes: int = 8
    radius: float = 1.2
    std: float = 0.12

    def data(self, label: int) -> Mixture:
        """Return p(x | label): all modes, those on the left, or those on the right."""
        angle = (torch.arange(self.modes) + 0.5) * (2 * math.pi / self.modes)
        means = self.radius * torch.stack([angle.cos(), angle.sin()], 1)
        side = (torch.ones(self.modes), (means[:, 0] < 0).float(), (means[:, 0] > 0).float())[label]
        return Mixture(side / side.sum(), means, self.std)

    def optimum(self, label: int, tau: float) -> Mixture:
        """Return p(x | label) exp(height / tau), normalised.

        Mode weights are multiplied by exp(y / tau), and means are shifted up by std^2 / tau.
        """
        data = self.data(label)
        weights = (data.weights.log() + data.means[:, 1] / tau).softmax(0)
        return Mixture(weights, data.means + torch.tensor([0.0, self.std**2 / tau]), self.std)

    def temperature(self, label: int, reward: float) -> float:
        """Return the tau whose optimum has this mean reward, by bisection; infinity up to the data's mean."""
        if reward <= self.data(label).mean_reward():
            return math.inf
        low, high = 1e-3, 1e3
        for _ in range(60):
            middle = math.sqrt(low * high)
            above = self.optimum(label, middle).mean_reward() > reward
            low, high = (middle, high) if above else (low, middle)
        return math.sqrt(low * high)

    def reward(self, x: Tensor) -> Tensor:
        """Return the heights (B,) of points (B, 2)."""
        return x[:, 1]

    def off_support(self, x: Tensor) -> float:
        """Return the share of points (B, 2) more than 0.4 away from the ring; for the data it is 0.1 %."""
        return ((x.norm(dim=1) - self.radius).abs() > 0.4).float().mean().item()


class PlaneNetwork(nn.Module):
    """An MLP from x, sinusoidal features of time and label to (B, 2): the noise, or a velocity (``flow``)."""

    def __init__(self, width: int = 128, frequencies: int = 16, flow: bool = False):
        super().__init__()
        self.flow = flow
        self.register_buffer(
            "frequencies", torch.exp(torch.linspace(0, math.log(1000.0), frequencies)) / 1000
        )
        self.frequencies: Tensor
        self.label = nn.Embedding(LABELS, 16)
        inputs = 2 + 2 * frequencies + 16
        self.layers = nn.Sequential(
            nn.Linear(inputs, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
        )
        self.out = nn.Linear(width, 2)

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        """Return the prediction (B, 2) for x (B, 2), time (B,) in [0, 1000] and label (B,), int64."""
        phase = time[:, None].to(x.dtype) * self.frequencies
        return self.out(self.layers(torch.cat([x, phase.sin(), phase.cos(), self.label(label)], 1)))


def denoiser_of(network: PlaneNetwork) -> NetworkDenoiser:
    """Return the network as a denoiser on SD's noise schedule, or of a rectified flow."""
    path, target = path_from_config(FLOW_SCHEDULER if network.flow else SCHEDULER)
    return NetworkDenoiser(network, path, target, _call)


def _call(network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """Call the network on points (B, 2), or on films (B, 2, F, 1, 1) as B F points."""
    if x_t.ndim == 2:
        out: Tensor = network(x_t, time, cond["label"])
        return out
    frames = x_t.shape[2]
    time, label = (rows.repeat_interleave(frames) for rows in (time, cond["label"]))
    points = network(x_t.movedim(1, -1).reshape(-1, 2), time, label)
    return points.reshape(-1, frames, 2).transpose(1, 2)[..., None, None]


def data_batch(plane: Plane, count: int, seed: int, mislabelled: float = 0.0) -> Batch[Tensor]:
    """Return ``count`` labelled points of the data, each a group of its own with score 1, to train a base.

    A share ``mislabelled`` of the points of each half has the label of the other half.
    """
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(LABELS, (count,), generator=g)
    x = torch.stack([plane.data(i).points(count, g) for i in range(LABELS)])[label, torch.arange(count)]
    wrong = (torch.rand(count, generator=g) < mislabelled) & (label > 0)
    return Batch(x, {"label": torch.where(wrong, 3 - label, label)}, torch.arange(count), torch.ones(count))


def pretrain(plane: Plane, seed: int = 0, steps: int = 2500, flow: bool = False) -> PlaneNetwork:
    """Train a base model on the plane's data; this takes ten seconds on one core."""
    torch.manual_seed(seed)
    network = PlaneNetwork(flow=flow)
    fit(
        SFT(),
        network,
        data_batch(plane, 60_000, seed),
        steps=steps,
        batch_size=512,
        rate=2e-3,
        schedule="cosine",
        seed=seed,
    )
    return network


def align(
    method: Method[Any],
    base: PlaneNetwork,
    data: Batch[Tensor],
    *,
    steps: int = 150,
    seed: int = 0,
    groups: int = 192,
    rate: float = 4e-4,
) -> PlaneNetwork:
    """Return a copy of ``base`` trained by a method, with the base as reference; a second on one core.

    Args:
        method: the method.
        base: the base model.
        data: groups of equal size.
        steps: optimizer steps.
        seed: seed of all randomness.
        groups: groups a step.
        rate: learning rate.
    """
    network = copy.deepcopy(base)
    fit(method, network, data, reference=base, steps=steps, batch_size=groups, rate=rate, seed=seed)
    return network


def fit(
    method: Method[Any],
    network: PlaneNetwork,
    data: Batch[Tensor],
    *,
    reference: PlaneNetwork | None = None,
    steps: int,
    batch_size: int,
    rate: float,
    schedule: Literal["constant", "linear", "cosine"] = "constant",
    seed: int = 0,
) -> None:
    """Train ``network`` in place with the loop that trains image models.

    The groups of ``data`` have equal size, with contiguous members.

    Raises:
        KeyboardInterrupt: a signal ended the training early, so its result must not be measured.
    """

    def by_group(tensor: Tensor) -> Tensor:
        return tensor.reshape(data.num_groups, -1, *tensor.shape[1:])

    def named(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: by_group(value) for name, value in tensors.items()}

    settings = TrainingConfig(steps=steps, batch_size=batch_size, seed=seed)
    behind = followers(method, network if reference is None else reference, denoiser_of)
    state = train(
        method=method,
        denoiser_of=lambda prepared: replace(denoiser_of(network), network=prepared),
        reference=behind.reference,
        network=network,
        parameters=list(network.named_parameters()),
        source=TensorSource(
            by_group(data.x),
            by_group(data.score),
            named(data.cond),
            negative=named(data.negative),
            extra=named(data.extra),
            batch_size=batch_size,
            seed=seed,
        ),
        settings=settings,
        optimizer=OptimizerConfig(learning_rate=rate, weight_decay=1e-4, schedule=schedule),
        accelerator=accelerator_for(settings),
        hooks=behind.hooks,
        kept=behind.kept,
    )
    if state.interrupted:
        raise KeyboardInterrupt


@dataclass(frozen=True)
class PlaneResult:
    """Measurements of a model on the plane.

    Attributes:
        reward: mean height of its samples.
        off_support: share of samples off the ring.
        distance: square root of the energy distance to the optimum of the same mean reward, averaged over
            labels; two equal distributions give about 0.02 at this sample size.
        fidelity: share of the samples of "left" and "right" that are on their side.
    """

    reward: float
    off_support: float
    distance: float
    fidelity: float


@torch.no_grad()
def points(denoiser: Denoiser, count: int, seed: int, steps: int = 50) -> Tensor:
    """Return samples (LABELS, count, 2) of a model, ``count`` for each label."""
    g = torch.Generator().manual_seed(seed)
    label = torch.arange(LABELS).repeat_interleave(count)
    return sample(denoiser, torch.randn(len(label), 2, generator=g), {"label": label}, g, steps).reshape(
        LABELS, count, 2
    )


def measure(
    plane: Plane, denoiser: Denoiser, count: int = 3000, seed: int = 1, steps: int = 50
) -> PlaneResult:
    """Sample ``count`` points, equally many a label, in ``steps`` steps; compare them with the optimum."""
    g = torch.Generator().manual_seed(seed + 1)
    x = points(denoiser, count // LABELS, seed, steps)
    distances = []
    for label in range(LABELS):
        tau = plane.temperature(label, plane.reward(x[label]).mean().item())
        best = plane.data(label) if math.isinf(tau) else plane.optimum(label, tau)
        distances.append(energy_distance(x[label], best.points(count // LABELS, g)))
    all_points = x.flatten(0, 1)
    on_side = torch.cat([x[1, :, 0] < 0, x[2, :, 0] > 0]).float()
    return PlaneResult(
        plane.reward(all_points).mean().item(),
        plane.off_support(all_points),
        sum(distances) / LABELS,
        on_side.mean().item(),
    )


def energy_distance(a: Tensor, b: Tensor) -> float:
    """Return sqrt(2 E|a - b| - E|a - a'| - E|b - b'|) of two samples (N, 2) (Szekely 2003).

    The terms within a sample are unbiased; a negative estimate of the square becomes 0.
    """

    def within(x: Tensor) -> Tensor:
        return torch.cdist(x, x).sum() / (len(x) * (len(x) - 1))

    squared = 2 * torch.cdist(a, b).mean() - within(a) - within(b)
    return squared.clamp(min=0).sqrt().item()

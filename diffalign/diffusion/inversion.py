"""DDIM inversion as a noising: the noisy state that the model itself would have come from, in place of a
random one.

DDIM's step (Song et al. 2020, arXiv 2010.02502, equation 12), read from less to more noise: from a state of
level s to level t with the noise estimate e,

    x_t = alpha_t (x_s - sigma_s e) / alpha_s + sigma_t e;

for rectified flow this is the Euler step of its ODE. Whoever trains on the state regresses the noise that it
implies, tau = (x_t - alpha_t x0) / sigma_t. No gradient passes through an inversion.

Two things differ between implementations, and published numbers depend on both. **The grid**: diffusers up
to 0.20, which InPO and SmPO pin, tells the network the level that a step starts from (N = 10: -99, 1, ...,
801; ``grid="source"``), later versions and null-text inversion the one it leads to (1, 101, ..., 901;
``grid="destination"``). **Where it ends** (``mode``): released code stops on the grid and then speaks of the
sampled time t, so the state's level is off by up to 100 steps of 1000 from what the network is told and from
what tau is computed with (``"paper"``, which reproduces it); ``"exact"`` starts at level 0 and makes its last
step land on t.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffalign.diffusion.inversion_cache import TrajectoryCache
from diffalign.diffusion.inversion_steps import explicit_step, implicit_step, posterior_std, rows_of
from diffalign.diffusion.likelihood import at_least_float32
from diffalign.diffusion.noising import expand, rank_in_group
from diffalign.diffusion.paths import VariancePreserving
from diffalign.diffusion.randomness import normal
from diffalign.errors import UserError, unknown
from diffalign.types import Cond, Denoiser, Noised, Path, Random, TimeSampler

_NEAR = 1e-6
"""Times closer than this are one: a float32 0.3 is the grid point 3 / 10."""


@dataclass(frozen=True)
class Inversion:
    """x_t by inverting DDIM from x0, and the noise that x_t implies; every sample to its own time.

    Attributes:
        steps: N, of the whole grid from 0 to 1; a sample makes those below its time.
        grid: which end of a step the network is told, "source" or "destination".
        mode: "exact" lands on the sampled time; "paper" stops on the grid, as released.
        offset: timestep of the first grid point (``steps_offset``): 1 in SD's schedulers, 0 in null-text
            inversion. A variance-preserving path's alone.
        eta: share of DDIM's posterior noise that is added after each step (InPO: 0.1), drawn for each sample
            on its own; variance-preserving paths only.
        renoise: how many times a step is made again from where it has led, told the same time; the step then
            takes the mean of all its noise estimates (ReNoise, Garibi et al. 2024, arXiv 2403.14602; SmPO:
            1).
        fixed_point: up to how many iterations solve a step for the x_t from which DDIM leads back to x_s
            exactly; 0 is the explicit step. Needs the destination grid.
        tolerance: a sample's iterations end when no element of it moves by more.
        guidance: scale of classifier-free guidance of the predictions; 1 is none.
        by: whose predictions, "policy" or "reference".
        cache: a folder that keeps the reference's trajectories, so that the same latents under the same
            conditions are never inverted twice; null keeps none. It takes N latents of disk per image and
            condition. Latents must be the same at every visit for that (``data.posterior: mean``), and a
            folder belongs to one reference: another model, or a reference that is refreshed while training,
            needs another one.
    """

    steps: int = 10
    grid: Literal["source", "destination"] = "source"
    mode: Literal["exact", "paper"] = "exact"
    offset: int = 1
    eta: float = 0.0
    renoise: int = 0
    fixed_point: int = 0
    tolerance: float = 1e-6
    guidance: float = 1.0
    by: Literal["policy", "reference"] = "policy"
    cache: str | None = None

    def __post_init__(self) -> None:
        for name, words in _WORDS.items():
            if getattr(self, name) not in words:
                raise unknown(f"noising.{name}", getattr(self, name), words)
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise UserError(f"noising.{name}={getattr(self, name)}; allowed: {least} or more")
        if self.fixed_point and (self.renoise or self.grid == "source"):
            raise UserError(
                f"noising.fixed_point={self.fixed_point} with grid={self.grid}, renoise={self.renoise}; "
                "allowed: grid=destination and renoise=0"
            )
        if self.cache is not None and (self.by == "policy" or self.eta):
            raise UserError(
                f"noising.cache={self.cache!r} with by={self.by}, eta={self.eta}; allowed: by=reference and "
                "eta=0, since a policy changes and noise is new at every visit"
            )

    @torch.no_grad()
    def __call__(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        t: Tensor,
        cond: Cond,
        group: Tensor,
        generator: Random | torch.Generator,
    ) -> Noised:
        """Invert ``x0`` (B, *d) to times ``t`` (B,).

        With ``eta``, one draw of (members, steps, *d) normals per group, whatever the times.

        Raises:
            UserError: more steps than the path has, or ``eta`` on a path that is not variance-preserving.
        """
        noise = None
        if self.eta:
            if not isinstance(denoiser.path, VariancePreserving):
                raise UserError(
                    f"noising.eta={self.eta} on {type(denoiser.path).__name__}; allowed there: eta = 0"
                )
            groups, rank = int(group.max()) + 1, rank_in_group(group)
            shape = (int(rank.max()) + 1, self.steps, *x0.shape[1:])
            noise = normal(generator, groups, shape)[group.to("cpu"), rank.to("cpu")]
        x_t = walk(self, denoiser, x0, route_to(self, denoiser.path, t), cond, noise)[-1]
        return Noised(x0, implied_noise(denoiser.path, x0, x_t, t), x_t, t)


_WORDS = {
    "grid": ("source", "destination"),
    "mode": ("exact", "paper"),
    "by": ("policy", "reference"),
}
_LEAST = {"steps": 1, "offset": 0, "eta": 0, "renoise": 0, "fixed_point": 0, "tolerance": 0}


class Route(NamedTuple):
    """The steps of each sample, on the CPU.

    ``source``, ``destination`` and ``told`` are float64 times (B, K): of the levels that step k leads from
    and to, and the one the network hears. ``length`` (B,) is how many steps a sample makes, ``whole`` (B,)
    how many of them end on the grid.
    """

    source: Tensor
    destination: Tensor
    told: Tensor
    length: Tensor
    whole: Tensor


def grid_of(inversion: Inversion, path: Path) -> tuple[Float[Tensor, " N"], float]:
    """Return the N grid points, float64 times ascending, and their spacing.

    A variance-preserving path of T training steps has offset + k (T // N), as diffusers' "leading" spacing;
    any other k / N.
    """
    k = torch.arange(inversion.steps, dtype=torch.float64)
    if not isinstance(path, VariancePreserving):
        return k / inversion.steps, 1 / inversion.steps
    spacing = path.steps // inversion.steps
    if spacing < 1:
        raise UserError(f"noising.steps={inversion.steps}; allowed: 1 to {path.steps}")
    return (inversion.offset + k * spacing) / path.steps, spacing / path.steps


def route_to(inversion: Inversion, path: Path, t: Float[Tensor, " B"]) -> Route:
    """Return the steps from level 0 to the times ``t``, as ``mode`` says."""
    points, spacing = grid_of(inversion, path)
    t = t.detach().double().cpu()
    if isinstance(path, VariancePreserving):
        t = path.index(t).double() / path.steps
    if inversion.mode == "paper":
        entries = points - spacing if inversion.grid == "source" else points
        return along_grid(inversion, path, (entries < t[:, None] - _NEAR).sum(1))
    # What the grid's first step would do, from level 0 to `offset`, the first exact step does on its way.
    points = torch.cat([points.new_zeros(1), points[1:]])
    t = t[:, None]
    count = (points < t - _NEAR).sum(1)
    source = points.expand(len(t), -1)
    destination = torch.minimum(torch.cat([points[1:], points.new_ones(1)]), t)
    told = source if inversion.grid == "source" else destination
    return Route(source, destination, told, count, (points[1:] <= t + _NEAR).sum(1))


def along_grid(inversion: Inversion, path: Path, count: Int[Tensor, " B"]) -> Route:
    """Return the first ``count`` steps of the grid as released code makes them.

    The first leads from level 0 to the first point; on the source grid the network hears a negative time
    then (a variance-preserving path; elsewhere 0).
    """
    points, spacing = grid_of(inversion, path)
    before = points - spacing
    source = before.clamp(min=0)
    heard = before if isinstance(path, VariancePreserving) else source
    told = heard if inversion.grid == "source" else points
    rows = len(count)
    return Route(source.expand(rows, -1), points.expand(rows, -1), told.expand(rows, -1), count, count)


@torch.no_grad()
def walk(
    inversion: Inversion,
    denoiser: Denoiser,
    x0: Tensor,
    route: Route,
    cond: Cond,
    noise: Tensor | None = None,
) -> list[Tensor]:
    """Return the states of a route, each (B, *d) in float32 at least: ``x0``, then after every step.

    A sample that has arrived stays as it is and costs no further calls; nor does a step that the cache holds.

    Args:
        inversion: how steps are made.
        denoiser: whom to ask; ``Guided`` where predictions are guided.
        x0: clean latents (B, *d).
        route: the steps of each sample.
        cond: conditions, every tensor (B, ...).
        noise: (B, >= K, *d) standard normals for ``eta``, or None.
    """
    x = at_least_float32(x0)
    cache = TrajectoryCache(inversion.cache, repr(replace(inversion, cache=None)), denoiser, x, cond)
    seen = [min(len(known), whole) for known, whole in zip(cache.known, route.whole.tolist(), strict=True)]
    count, states = route.length.tolist(), [x]
    for k in range(max(count, default=0)):
        x = x.clone()
        for row in (row for row, steps in enumerate(seen) if k < steps):
            x[row] = cache.known[row][k].to(x)
        here = [row for row, steps in enumerate(seen) if steps <= k < count[row]]
        if here:
            index = torch.tensor(here)
            s, t, told = (times[index, k].to(x.device, x.dtype) for times in route[:3])
            selected, start = rows_of(denoiser, index, len(x)), x[index.to(x.device)]
            some = {name: v[index.to(v.device)] for name, v in cond.items()}
            if inversion.fixed_point:
                after = implicit_step(
                    selected, start, s, t, some,
                    iterations=inversion.fixed_point, tolerance=inversion.tolerance,
                )  # fmt: skip
            else:
                after = explicit_step(selected, start, s, t, told=told, cond=some, renoise=inversion.renoise)
            if noise is not None:
                std = expand(posterior_std(denoiser.path, s, t), after)
                after = after + inversion.eta * std * noise[index, k].to(after)
            x[index.to(x.device)] = after
        states.append(x)
    cache.keep(states, route.whole.tolist())
    return states


def implied_noise(path: Path, x0: Tensor, x_t: Tensor, t: Float[Tensor, " B"]) -> Tensor:
    """tau = (x_t - alpha x0) / sigma, (B, *d); 0 where there is no noise."""
    alpha, sigma = (expand(c, x_t) for c in path.coefficients(t))
    return (x_t - alpha * x0) / sigma.clamp(min=torch.finfo(sigma.dtype).tiny)


def grid_states(
    inversion: Inversion, denoiser: Denoiser, x0: Tensor, cond: Cond, steps: Int[Tensor, " B K"], after: bool
) -> tuple[Tensor, Tensor]:
    """States before (or ``after``) some ``steps`` of each sample's grid (0 .. N-1), as released.

    Returns:
        (x_t (B K, *d), t (B K,)): the states, samples slowest, and the grid points that those steps lead to.
    """
    reached = steps.cpu() + int(after)
    route = along_grid(inversion, denoiser.path, reached.amax(1))
    states = torch.stack(walk(inversion, denoiser, x0, route, cond), 1)
    rows = torch.arange(len(x0))[:, None].expand(reached.shape)
    times = grid_of(inversion, denoiser.path)[0][steps.cpu()].flatten()
    return states[rows.flatten(), reached.flatten()], times.to(states.device, states.dtype)


def drawn_steps(
    time: TimeSampler, steps: int, subset: int | None, count: int, generator: Random | torch.Generator
) -> Int[Tensor, " count K"]:
    """Which of a grid's ``steps`` each of ``count`` groups learns from: all, or ``subset`` drawn by ``time``.

    Time t means step floor(t N). Draws are independent, so a mean over them is unbiased.
    """
    if subset is None:
        return torch.arange(steps).expand(count, -1)
    t = torch.stack([time(count, generator) for _ in range(subset)], 1).cpu()
    return (t * steps + _NEAR).long().clamp(max=steps - 1)


def velocity_weight(denoiser: Denoiser, t: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Weight (B,) on a squared error of the network's target that makes it half a squared error of v.

    For noise predictions it is 1 / (2 alpha^2), for v and flow 1 / 2: given x_t, an error of the noise is
    alpha times one of v.
    """
    alpha, sigma = denoiser.path.coefficients(t)
    alpha = alpha.clamp(min=0.03)  # below SD's smallest; 0 at zero terminal SNR
    if denoiser.target in ("v", "flow"):
        return torch.full_like(alpha, 0.5)
    return 0.5 / (alpha if denoiser.target == "eps" else sigma) ** 2

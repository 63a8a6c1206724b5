"""DDIM inversion as a noising: compute the noisy state from which DDIM sampling leads to x0.

DDIM's step (Song et al. 2020, arXiv 2010.02502, equation 12) in the direction of more noise, from a state of
level s to level t > s with the noise estimate e, is

    x_t = alpha_t (x_s - sigma_s e) / alpha_s + sigma_t e;

for rectified flow this is the Euler step of its ODE. The regression target on the state is the noise that it
implies, tau = (x_t - alpha_t x0) / sigma_t. No gradient passes through an inversion.

Implementations differ in two choices that published numbers depend on. **The network's time** (``grid``):
diffusers up to 0.20, which InPO and SmPO pin, passes the level that a step starts from (N = 10: -99, 1, ...,
801; "source"); later versions and null-text inversion pass the level that it leads to (1, 101, ..., 901;
"destination"). **The last step** (``mode``): released code stops on the grid and uses the sampled time t from
then on, so that the state's level differs by up to 100 of 1000 steps from the time that the network and tau
are computed with ("paper", which reproduces this); "exact" starts at level 0 and ends its last step at t.
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
"""Times closer than this are equal: a float32 0.3 is the grid point 3 / 10."""


@dataclass(frozen=True)
class Inversion:
    """Invert DDIM from x0 to x_t, and compute the noise that x_t implies; each sample has its own time.

    Attributes:
        steps: number N of steps of the grid from time 0 to 1, at least 1; a sample makes those below its
            time.
        grid: level of a step that is the network's time input, "source" or "destination".
        mode: "exact": end at the sampled time; "paper": end on the grid, as in released code.
        offset: timestep of the first grid point (``steps_offset``): 1 in SD's schedulers, 0 in null-text
            inversion. Variance-preserving paths only.
        eta: factor of the standard deviation of DDIM's posterior noise, which is added after each step (InPO:
            0.1) independently for each sample; variance-preserving paths only.
        renoise: number of times that a step is repeated with the noise estimate at its own result, at the
            same time input; the step then uses the mean of all its estimates (ReNoise, Garibi et al. 2024,
            arXiv 2403.14602; SmPO: 1).
        fixed_point: most iterations that solve a step for the x_t from which DDIM leads to x_s exactly; 0 is
            the explicit step. Needs the destination grid.
        tolerance: largest change of an element of a sample at which its iterations end.
        guidance: scale of classifier-free guidance of the predictions; 1 is none.
        by: network that makes the predictions, "policy" or "reference".
        cache: folder of the reference's trajectories, so that the same latents with the same conditions are
            inverted once; null: no cache. It takes N latents of disk per image and condition. The latents of
            an image must not change between visits (``data.posterior: mean``). A folder belongs to one
            reference: use another one for another model, or for a reference that is refreshed in training.
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
                "eta=0, since the policy and the noise change between visits"
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

        With ``eta`` it draws (members, steps, *d) normals per group, independent of the times.

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
    """The inversion steps of each sample, on the CPU.

    Attributes:
        source: (B, K) float64 times from which the steps start.
        destination: (B, K) float64 times to which they lead.
        model_time: (B, K) float64 time inputs of the network.
        length: (B,) number of steps of a sample.
        on_grid: (B,) number of those that end on the grid.
    """

    source: Tensor
    destination: Tensor
    model_time: Tensor
    length: Tensor
    on_grid: Tensor


def grid_of(inversion: Inversion, path: Path) -> tuple[Float[Tensor, " N"], float]:
    """Return the N grid points (ascending float64 times) and their spacing.

    On a variance-preserving path of T training steps point k is (offset + k (T // N)) / T, as in diffusers'
    "leading" spacing; on other paths it is k / N.

    Raises:
        UserError: N exceeds T.
    """
    k = torch.arange(inversion.steps, dtype=torch.float64)
    if not isinstance(path, VariancePreserving):
        return k / inversion.steps, 1 / inversion.steps
    spacing = path.steps // inversion.steps
    if spacing < 1:
        raise UserError(f"noising.steps={inversion.steps}; allowed: 1 to {path.steps}")
    return (inversion.offset + k * spacing) / path.steps, spacing / path.steps


def route_to(inversion: Inversion, path: Path, t: Float[Tensor, " B"]) -> Route:
    """Return the steps from level 0 to the times ``t`` (B,), as ``mode`` defines them."""
    points, spacing = grid_of(inversion, path)
    t = t.detach().double().cpu()
    if isinstance(path, VariancePreserving):
        t = path.index(t).double() / path.steps
    if inversion.mode == "paper":
        entries = points - spacing if inversion.grid == "source" else points
        return along_grid(inversion, path, (entries < t[:, None] - _NEAR).sum(1))
    # The grid's first step, from level 0 to `offset`, is a part of the first exact step.
    points = torch.cat([points.new_zeros(1), points[1:]])
    t = t[:, None]
    count = (points < t - _NEAR).sum(1)
    source = points.expand(len(t), -1)
    destination = torch.minimum(torch.cat([points[1:], points.new_ones(1)]), t)
    model_time = source if inversion.grid == "source" else destination
    return Route(source, destination, model_time, count, (points[1:] <= t + _NEAR).sum(1))


def along_grid(inversion: Inversion, path: Path, count: Int[Tensor, " B"]) -> Route:
    """Return the first ``count`` steps of the grid as in released code.

    The first step leads from level 0 to the first point. On the source grid its time input is negative on a
    variance-preserving path, and 0 on other paths.
    """
    points, spacing = grid_of(inversion, path)
    before = points - spacing
    source = before.clamp(min=0)
    start_time = before if isinstance(path, VariancePreserving) else source
    model_time = start_time if inversion.grid == "source" else points
    rows = len(count)
    return Route(source.expand(rows, -1), points.expand(rows, -1), model_time.expand(rows, -1), count, count)


@torch.no_grad()
def walk(
    inversion: Inversion,
    denoiser: Denoiser,
    x0: Tensor,
    route: Route,
    cond: Cond,
    noise: Tensor | None = None,
) -> list[Tensor]:
    """Return the states of a route, each (B, *d) in float32 or wider: ``x0``, then one after every step.

    A sample that has made its steps is not changed and takes part in no further network call; steps that the
    cache holds need no call either.

    Args:
        inversion: settings of the steps.
        denoiser: the network that makes the predictions; ``Guided`` if they are guided.
        x0: clean latents (B, *d).
        route: the steps of each sample.
        cond: conditions, every tensor (B, ...).
        noise: (B, >= K, *d) standard normals for ``eta``, or None.
    """
    x = at_least_float32(x0)
    cache = TrajectoryCache(inversion.cache, repr(replace(inversion, cache=None)), denoiser, x, cond)
    cached = [
        min(len(states), steps) for states, steps in zip(cache.known, route.on_grid.tolist(), strict=True)
    ]
    count, states = route.length.tolist(), [x]
    for k in range(max(count, default=0)):
        x = x.clone()
        for row in (row for row, steps in enumerate(cached) if k < steps):
            x[row] = cache.known[row][k].to(x)
        pending = [row for row, steps in enumerate(cached) if steps <= k < count[row]]
        if pending:
            index = torch.tensor(pending)
            s, t, model_time = (times[index, k].to(x.device, x.dtype) for times in route[:3])
            selected, start = rows_of(denoiser, index, len(x)), x[index.to(x.device)]
            pending_cond = {name: v[index.to(v.device)] for name, v in cond.items()}
            if inversion.fixed_point:
                after = implicit_step(
                    selected, start, s, t, pending_cond,
                    iterations=inversion.fixed_point, tolerance=inversion.tolerance,
                )  # fmt: skip
            else:
                after = explicit_step(
                    selected, start, s, t,
                    model_time=model_time, cond=pending_cond, renoise=inversion.renoise,
                )  # fmt: skip
            if noise is not None:
                std = expand(posterior_std(denoiser.path, s, t), after)
                after = after + inversion.eta * std * noise[index, k].to(after)
            x[index.to(x.device)] = after
        states.append(x)
    cache.write(states, route.on_grid.tolist())
    return states


def implied_noise(path: Path, x0: Tensor, x_t: Tensor, t: Float[Tensor, " B"]) -> Tensor:
    """Return tau = (x_t - alpha x0) / sigma, (B, *d); 0 where sigma is 0 and x_t is x0."""
    alpha, sigma = (expand(c, x_t) for c in path.coefficients(t))
    return (x_t - alpha * x0) / sigma.clamp(min=torch.finfo(sigma.dtype).tiny)


def grid_states(
    inversion: Inversion, denoiser: Denoiser, x0: Tensor, cond: Cond, steps: Int[Tensor, " B K"], after: bool
) -> tuple[Tensor, Tensor]:
    """Return the states before (or ``after``) given ``steps`` (0 .. N-1) of each sample's grid, as released.

    Returns:
        x_t (B K, *d) and t (B K,): the states, sample by sample, and the grid points to which the steps lead.
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
    """Return the grid steps that each of ``count`` groups uses: all, or ``subset`` drawn by ``time``.

    A time t selects step floor(t N). Draws are independent (with repetition), so a mean over them is
    unbiased.
    """
    if subset is None:
        return torch.arange(steps).expand(count, -1)
    t = torch.stack([time(count, generator) for _ in range(subset)], 1).cpu()
    return (t * steps + _NEAR).long().clamp(max=steps - 1)


def velocity_weight(denoiser: Denoiser, t: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Return weights (B,) that turn a squared error of the network's target into half that of v.

    At a given x_t an error of the noise is alpha times, one of x0 sigma times that of v, so the weights are
    1 / (2 alpha^2), 1 / (2 sigma^2), and 1 / 2 for v and flow.
    """
    alpha, sigma = denoiser.path.coefficients(t)
    alpha = alpha.clamp(min=0.03)  # less than SD's smallest alpha; alpha is 0 at zero terminal SNR
    if denoiser.target in ("v", "flow"):
        return torch.full_like(alpha, 0.5)
    return 0.5 / (alpha if denoiser.target == "eps" else sigma) ** 2

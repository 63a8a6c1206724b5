"""The three kinds of rounds: finished samples, the steps of trajectories, or a tree of rival steps.

Each shape samples K rivals for each of n prompts with the current policy. A prompt has S *slots*, groups of K
rivals that are trained on together, and J *verdicts*, the scores of the clean estimates of K rivals. Each
slot has one verdict; slots may share one.

    samples       S = 1: the clean latents (for any offline method)
    trajectories  S steps of the sampler, all scored by the trajectory's end (D3PO, DDPO)
    tree          a branch of K candidates at each step (SPO)

Not every step need be stochastic. A flow model's last step, to time 0, is the ODE's: Flow-GRPO does not train
on it, DanceGRPO scores the clean estimate there, and noise must not be on the scored image. With a window
(MixGRPO, Li et al. 2025, arXiv 2507.21802) all steps outside it are the ODE's.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from diffalign.diffusion.guidance import Guided
from diffalign.diffusion.likelihood import log_density
from diffalign.diffusion.randomness import normal
from diffalign.diffusion.samplers import clean_and_noise
from diffalign.rollout.setting import Divided, Setting
from diffalign.types import Cond, Denoiser, Path, Random, Transition
from diffalign.utils.transfer import sent


@dataclass(frozen=True)
class Sampled:
    """The samples of n prompts.

    Attributes:
        x: clean latents (n, 1, K, *d), or transitions, every tensor (n, S, K, ...).
        reference_mean: (n, S, K, *d) means of the reference's steps; None for clean latents and where no
            method reads them.
        judged: (n, J, K, *d) latents to score: clean, or noisy where nothing is estimated.
        at: (J,) the times of the estimates, 0 for finished samples; or the times that noisy latents were
            drawn at.
        verdict: (S,) index of a slot's verdict among the J.
        shared: (S,) whether the rivals of a slot share x_t.
        drawn_mean: (n, S, K, *d) means of the policy's steps; None where they are not recorded.
    """

    x: Tensor | Transition
    reference_mean: Tensor | None
    judged: Tensor
    at: Tensor
    verdict: Tensor
    shared: Tensor
    drawn_mean: Tensor | None = None


@dataclass(frozen=True)
class Request:
    """A request for samples of n prompts: the denoisers, the conditions and the settings.

    Attributes:
        policy: samples.
        reference: whose means are recorded, or a reference for each prompt; None: none are.
        cond: conditions, (n, ...).
        negative: what guidance guides away from, (n, ...).
        setting: how to sample.
    """

    policy: Denoiser
    reference: Denoiser | Divided | None
    cond: Cond
    negative: Cond
    setting: Setting

    def estimates(
        self, who: Denoiser, x: Tensor, t: float, guidance: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """(x0, eps) of ``who`` at states x (n, k, *d), each like x; the rivals may be one to all K.

        ``guidance`` is its scale; None: the setting's.
        """
        guidance = self.setting.guidance if guidance is None else guidance
        flat = x.flatten(0, 1)
        every = torch.arange(len(flat), device=flat.device)
        parts = [
            self._of_some(who, flat, t, rows, x.shape[1], guidance)
            for rows in every.split(self.setting.at_once or max(1, len(flat)))
        ]
        x0, eps = (torch.cat(some) for some in zip(*parts, strict=True))
        return x0.reshape(x.shape), eps.reshape(x.shape)

    def _of_some(
        self, who: Denoiser, flat: Tensor, t: float, rows: Tensor, rivals: int, guidance: float
    ) -> tuple[Tensor, Tensor]:
        """(x0, eps) of the ``rows`` of states (n * k, *d), in one call of the network."""

        def pick(cond: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: v[rows // rivals] for name, v in cond.items()}

        if guidance != 1:
            who = Guided(who, pick(self.negative), guidance)
        x = flat[rows]
        return clean_and_noise(who, x, _time(t, x), pick(self.cond))

    def after(self, x0: Tensor, eps: Tensor, t: float, s: float) -> tuple[Tensor, Tensor]:
        """(mean, std) of the step from t to s, like x0 (n, k, *d)."""
        flat = x0.flatten(0, 1)
        mean, std = self.setting.kernel_at(t).after(
            self.policy.path, flat, eps.flatten(0, 1), _time(t, flat), _time(s, flat)
        )
        return mean.reshape(x0.shape), std.reshape(*x0.shape[:2], *std.shape[1:])

    def reference_mean(self, x: Tensor, t: float, s: float) -> Tensor | None:
        """Return the means of the reference's step from x (n, k, *d)."""
        if self.reference is None:
            return None
        if isinstance(self.reference, Divided):
            return self._divided(self.reference, x, t, s)
        guidance = self.setting.reference_guidance
        return self.after(*self.estimates(self.reference, x, t, guidance), t, s)[0]

    def _divided(self, reference: Divided, x: Tensor, t: float, s: float) -> Tensor:
        """Where each prompt's reference would go from x (n, k, *d)."""
        found = torch.empty_like(x)
        for number, denoiser in enumerate(reference.denoisers):
            rows = (reference.index == number).nonzero()[:, 0].to(x.device)
            if not len(rows):
                continue
            cond, negative = ({k: v[rows] for k, v in c.items()} for c in (self.cond, self.negative))
            own = replace(self, reference=denoiser, cond=cond, negative=negative)
            mean = own.reference_mean(x[rows], t, s)
            assert mean is not None
            found[rows] = mean.to(found)
        return found


class Steps:
    """The steps that are trained on, in order."""

    def __init__(self, request: Request):
        self._request, self._rivals = request, request.setting.samples
        self._rows: list[tuple[Tensor, ...]] = []
        self._references: list[Tensor] = []
        self._means: list[Tensor] = []
        self.shared: list[bool] = []

    def add(self, x: Tensor, after: Tensor, mean: Tensor, std: Tensor, t: float, s: float) -> None:
        """Add one step x (n, 1 or K, *d) -> after (n, K, *d), unless it was deterministic and no teacher is
        asked, or from too low a time or another expert's."""
        if not (self._request.setting.learns(t) and self._request.setting.records(std)):
            return
        wide = partial(_wide, rivals=self._rivals)
        self.shared.append(x.shape[1] == 1 and self._rivals > 1)
        mean, std, flat = wide(mean), wide(std), after.flatten(0, 1)
        logp = log_density(self._request.setting.kernel, flat, mean.flatten(0, 1), std.flatten(0, 1))
        logp = logp.reshape(after.shape[:2])
        times = [torch.full(after.shape[:2], v, device=after.device, dtype=after.dtype) for v in (t, s)]
        self._rows.append((wide(x), after, *times, logp))
        if self._request.setting.means:
            self._means.append(mean)
        reference = self._request.reference_mean(x, t, s)
        if reference is not None:
            self._references.append(wide(reference))

    def sampled(self, judged: Tensor, at: Sequence[float], verdict: Sequence[int]) -> Sampled:
        """Return the steps and the latents to score."""
        columns = zip(*self._rows, strict=True)
        return Sampled(
            Transition(*(torch.stack(column, 1) for column in columns)),
            torch.stack(self._references, 1) if self._references else None,
            judged,
            torch.tensor(at, dtype=torch.float64),
            torch.tensor(verdict),
            torch.tensor(self.shared),
            torch.stack(self._means, 1) if self._means else None,
        )


@torch.no_grad()
def samples(request: Request, shape: Sequence[int], random: Random) -> Sampled:
    """K finished samples of each of n prompts, the last one by the reference where the setting says so; else
    it is not called. See ``trajectories``.
    """
    x, count = start(request, shape, random), request.setting.samples
    if request.setting.by_reference:
        assert request.reference is not None and not isinstance(request.reference, Divided)
        own = replace(request, setting=replace(request.setting, samples=count - 1))
        other = replace(request, policy=request.reference, setting=replace(request.setting, samples=1))
        first = x if x.shape[1] == 1 else x[:, :-1]
        x = torch.cat([_finished(own, first, random), _finished(other, x[:, -1:], random)], 1)[:, None]
    else:
        x = _finished(request, x, random)[:, None]
    return Sampled(x, None, x, torch.zeros(1), torch.zeros(1, dtype=torch.long), torch.zeros(1) > 0)


def _finished(request: Request, x: Tensor, random: Random) -> Tensor:
    """(n, K, *d) clean samples of the policy from noise x (n, 1 or K, *d)."""
    times = request.setting.times.tolist()
    for t, s in itertools.pairwise(times[:-1]):
        x, _, _ = step(request, x, t, s, random)
    # where a variance-preserving grid ends a state still holds noise; the estimate does not
    return _wide(request.estimates(request.policy, x, times[-2])[0], request.setting.samples)


@torch.no_grad()
def trajectories(request: Request, shape: Sequence[int], random: Random) -> Sampled:
    """Return every stochastic step of K trajectories of each of n prompts.

    Args:
        request: the denoisers, the conditions of n prompts and the settings.
        shape: of one sample's latents.
        random: a stream for each prompt.
    """
    x, steps = start(request, shape, random), Steps(request)
    for t, s in pairs(request.setting.times):
        after, mean, std = step(request, x, t, s, random)
        steps.add(x, after, mean, std, t, s)
        x = after
    return steps.sampled(x[:, None], [0.0], [0] * len(steps.shared))


def drawn_steps(setting: Setting, path: Path, first: int = 0) -> int:
    """Return how many steps from number ``first`` on are trained on: stochastic ones, which have a density,
    or all that a teacher is asked about.
    """
    grid = [(t, s) for t, s in list(pairs(setting.times))[first:] if setting.learns(t)]
    return sum(setting.records(std_of(setting, path, t, s)) for t, s in grid)


def std_of(setting: Setting, path: Path, t: float, s: float) -> Tensor:
    """Return the std (1, 1) of the step from t to s; on the CPU, so that the host does not wait for the
    samples.
    """
    one = torch.zeros(1, 1)
    return setting.kernel_at(t).after(path, one, one, _time(t, one), _time(s, one))[1]


def step(
    request: Request, x: Tensor, t: float, s: float, random: Random, rivals: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(after (n, K, *d), mean, std) of a step of the policy from x (n, 1 or K, *d)."""
    mean, std = request.after(*request.estimates(request.policy, x, t), t, s)
    if not bool((std_of(request.setting, request.policy.path, t, s) > 0).any()):
        return mean, mean, std
    return mean + std * draws(x, random, rivals or request.setting.samples), mean, std


def draws(x: Tensor, random: Random, rivals: int) -> Tensor:
    """Return standard normal noise (n, rivals, *d) for states x (n, k, *d)."""
    return sent(normal(random, len(x), (rivals, *x.shape[2:])), x)


def start(request: Request, shape: Sequence[int], random: Random) -> Tensor:
    """(n, 1, *d) of shared noise, or (n, K, *d)."""
    rivals = 1 if request.setting.shared_noise else request.setting.samples
    first = next(iter(request.cond.values()))
    return sent(normal(random, len(first), (rivals, *shape)), first.device)


def _wide(x: Tensor, rivals: int) -> Tensor:
    return x.expand(-1, rivals, *x.shape[2:])


def pairs(times: Tensor) -> Iterator[tuple[float, float]]:
    """(t, s) of each step of a grid."""
    grid = times.tolist()
    return itertools.pairwise(grid)


def _time(t: float, like: Tensor) -> Tensor:
    dtype = torch.promote_types(like.dtype, torch.float32)  # half precision would miss rows of the table
    return torch.full((len(like),), t, device=like.device, dtype=dtype)

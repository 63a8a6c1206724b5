"""Fast-slow chasing (OFS-DPO, arXiv 2406.05534): two sets of adapters are trained against each other.

With f and s the margins of the fast and the slow module (beta times the log-ratio of winner over loser),

    fast loss = L(fast) + a * -log sigmoid(scale (f - sg s)),
    slow loss = L(slow) - a * -log sigmoid(scale (sg f - s)),

where sg stops the gradient and the argument of the sigmoid is clamped to +-10. The first term raises f above
s, the second raises s towards f. Every ``every`` optimizer steps the module with the lower mean loss becomes
the fast one. The fast module is the policy: it is evaluated, sampled from, averaged and exported.

No official code is known to us: the formulas follow the paper's abstract and a third-party port to diffusion.
a, scale and ``every`` have no published values; the defaults are ours. Differences from the paper: there the
modules have optimizers of different learning rates; here they have separate optimizer moments, share learning
rate and clipping, and differ in their initial values. Both modules are trained on the same times and noise.

The strategy needs LoRA (the network is not copied) and makes each network call of the policy twice. It must
be the last of the list of strategies, because it calls the wrapped method on both policies.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.diffusion.randomness import normal, uniform
from diffalign.diffusion.wrapper import Wrapper
from diffalign.errors import UserError
from diffalign.losses.contrast import Contrast, contrast
from diffalign.strategies._common import (
    Recording,
    Wrapped,
    innermost,
    readable,
    reference_prediction,
    residual,
)
from diffalign.strategies.registry import StrategyCard
from diffalign.types import Batch, Cond, Denoiser, Method, Random, Step
from diffalign.utils.distributed import mean_over_ranks


@dataclass(frozen=True, eq=False)
class Twin(Wrapper):
    """Two policies as one denoiser; a call of it is a call of the fast one.

    Attributes:
        denoiser: the fast policy: the network with the adapters that are exported.
        slow: the slow policy: the same network with the second adapters.
        tally: (3,) running sums of fast loss, slow loss and number of terms, equal on all ranks.
    """

    slow: Denoiser
    tally: Tensor

    @property
    def fast(self) -> Denoiser:
        """The fast policy."""
        return self.denoiser

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Return the fast policy's prediction."""
        return self.denoiser(x_t, t, cond)


class Replay:
    """A ``types.Random`` that repeats its draws after ``rewind``."""

    def __init__(self, source: Random | torch.Generator):
        self._source, self._drawn, self._next = source, list[Tensor](), 0

    def uniform(self, count: int, shape: Sequence[int] = ()) -> Tensor:
        """Return draws from U[0, 1), (count, *shape)."""
        return self._draw(uniform, count, shape)

    def normal(self, count: int, shape: Sequence[int] = ()) -> Tensor:
        """Return draws from N(0, 1), (count, *shape)."""
        return self._draw(normal, count, shape)

    def rewind(self) -> None:
        """Repeat the draws from the first one on."""
        self._next = 0

    def _draw(self, distribution: Callable[..., Tensor], count: int, shape: Sequence[int]) -> Tensor:
        if self._next == len(self._drawn):
            self._drawn.append(distribution(self._source, count, shape))
        self._next += 1
        return self._drawn[self._next - 1]


@runtime_checkable
class _WithBeta(Protocol):
    """A method whose margins are ``beta`` times differences of log-ratios."""

    @property
    def beta(self) -> float:
        """The factor of the log-ratios."""
        ...


@dataclass(frozen=True)
class FastSlow:
    """Train a fast and a slow set of adapters against each other.

    Attributes:
        weight: weight a of the chasing term, above 0.
        scale: factor of the difference of margins f - s, above 0; margins are beta times log-ratios.
        every: optimizer steps between comparisons of the two losses, at least 1.
        limit: bound of the argument of the sigmoid, above 0.
    """

    weight: float = 0.1
    scale: float = 1.0
    every: int = 20
    limit: float = 10.0

    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("weight", "scale", "limit"):
            if not getattr(self, name) > 0:
                raise UserError(f"fast_slow.{name}={getattr(self, name)}; allowed: more than 0")
        if self.every < 1:
            raise UserError(f"fast_slow.every={self.every}; allowed: 1 or more")

    def wrap(self, method: Method[Any]) -> Wrapped:
        """Return ``method`` applied to both policies.

        Raises:
            UserError: the method's targets cannot be computed from its noisy states, or it has no beta.
        """
        inner = innermost(method)
        if not isinstance(inner, _WithBeta):
            raise UserError(
                f"strategy fast_slow: {type(inner).__name__} has no beta; allowed: pairwise methods with "
                "a beta, such as dpo"
            )
        return Wrapped(readable(method, "fast_slow"), self)

    def __call__(
        self,
        method: Method[Any],
        policy: Denoiser,
        reference: Denoiser,
        batch: Batch[Tensor],
        generator: Random | torch.Generator,
    ) -> Step:
        """Return the sum of both losses; metrics are those of the fast module and two more.

        Metric ``slow/loss`` is the slow module's loss of the method, ``fast_slow/lead`` the mean of f - s.

        Raises:
            UserError: the policy is not a ``Twin``.
        """
        if not isinstance(policy, Twin):
            raise UserError(
                "strategy fast_slow: there is one policy; allowed: two, which model.train: lora makes"
            )
        draws, steps, contrasts = Replay(generator), [], []
        for module in (policy.fast, policy.slow):
            draws.rewind()
            policy_calls, reference_calls = Recording(module), Recording(reference)
            steps.append(method(policy_calls, reference_calls, batch, draws))
            contrasts.append(margins(method, policy_calls, reference_calls, batch))
        fast, slow = steps
        f, s = (pairs.margin for pairs in contrasts)
        fast_term = self._chase(contrasts[0], f - s.detach())
        slow_term = self._chase(contrasts[0], f.detach() - s)
        loss = fast.loss + slow.loss + self.weight * (fast_term - slow_term)
        self._count(policy.tally, fast, slow)
        metrics = {
            "slow/loss": slow.loss.detach(),
            "fast_slow/lead": contrasts[0].mean((f - s).detach()),
        }
        return Step(loss, {**fast.metrics, **metrics}, fast.weight)

    def _chase(self, c: Contrast, lead: Tensor) -> Tensor:
        return c.mean(-logsigmoid((self.scale * lead).clamp(-self.limit, self.limit)))

    def _count(self, tally: Tensor, fast: Step, slow: Step) -> None:
        if torch.is_grad_enabled():
            terms = [fast.loss * fast.weight, slow.loss * slow.weight, fast.weight]
            tally += torch.stack([mean_over_ranks(v.detach().reshape(1)) for v in terms]).to(tally)


def margins(
    method: Method[Any], policy_calls: Recording, reference_calls: Recording, batch: Batch[Tensor]
) -> Contrast:
    """Return the pairs of a batch with beta times their log-ratios, from recorded predictions.

    Raises:
        UserError: the method never called the policy on the batch's own samples.
    """
    inner = innermost(method)
    assert isinstance(inner, _WithBeta)
    ratios = []
    for call in policy_calls.of(batch):
        predictions = (call.prediction, reference_prediction(reference_calls, call))
        m, r = (
            method.reduce(residual(policy_calls.denoiser, batch.x, call.x_t, call.t, prediction) ** 2)
            for prediction in predictions
        )
        ratios.append(inner.beta * (r - m) / 2)
    if not ratios:
        raise UserError(
            "strategy fast_slow: the method never calls the policy on the batch's own samples; allowed: "
            "methods that do"
        )
    return contrast(torch.stack(ratios).mean(0), batch.score, batch.group)


CARD = StrategyCard(
    name="fast_slow",
    title="Fast-slow LoRA (OFS-DPO)",
    paper="Online DPO: Direct Preference Optimization with Fast-Slow Chasing (after its abstract and a port)",
    year=2024,
    arxiv="2406.05534",
    composes="pairwise methods with a beta, under LoRA",
    cost="twice the network samples of the method",
    strategy=FastSlow,
    outermost=True,
)

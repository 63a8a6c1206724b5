"""Fast-slow chasing (OFS-DPO, arXiv 2406.05534): two sets of adapters that compete, and the better one leads.

With f and s the margins of the fast and the slow module (beta times the log-ratio of winner over loser),

    fast loss = L(fast) + a * -log sigmoid(scale (f - sg s)),
    slow loss = L(slow) - a * -log sigmoid(scale (sg f - s)),

sg a stop of the gradient and the inside of the sigmoid clamped to +-10. Fast is pushed ahead of slow, slow is
pushed after fast. Every ``every`` optimizer steps the module with the lower mean loss of the method becomes
the fast one, and that one is the policy: it is measured, drawn from, averaged and exported.

There is no official code that we know of: the formulas follow the paper's abstract and a third-party port for
diffusion, and a, scale and ``every`` have no published values, so the defaults are ours. What differs: the
paper gives the two modules optimizers of different speed; here they have moments of their own but share
learning rate and clipping, and differ by their initial values. Both modules see the same times and noise.

It needs LoRA (a second copy of a network is not made) and asks everything twice. It stands last in the list
of strategies, around the others, since it must reach both policies.
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
from diffalign.strategies._common import Listening, Wrapped, answer, innermost, readable, residual
from diffalign.strategies.registry import StrategyCard
from diffalign.types import Batch, Cond, Denoiser, Method, Random, Step
from diffalign.utils.distributed import mean_over_ranks


@dataclass(frozen=True, eq=False)
class Twin(Wrapper):
    """Two policies as one denoiser, which is the fast one to a caller that does not know of two.

    Attributes:
        denoiser: the fast policy, through the adapters that are exported.
        slow: the slow one, through the others.
        tally: (3,) running sums of fast loss, slow loss and terms, the same on every rank.
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
    """A ``types.Random`` that gives the same draws again after ``rewind``."""

    def __init__(self, source: Random | torch.Generator):
        self._source, self._drawn, self._next = source, list[Tensor](), 0

    def uniform(self, count: int, shape: Sequence[int] = ()) -> Tensor:
        """Return (count, *shape) from U[0, 1)."""
        return self._draw(uniform, count, shape)

    def normal(self, count: int, shape: Sequence[int] = ()) -> Tensor:
        """Return (count, *shape) from N(0, 1)."""
        return self._draw(normal, count, shape)

    def rewind(self) -> None:
        """Begin again."""
        self._next = 0

    def _draw(self, how: Callable[..., Tensor], count: int, shape: Sequence[int]) -> Tensor:
        if self._next == len(self._drawn):
            self._drawn.append(how(self._source, count, shape))
        self._next += 1
        return self._drawn[self._next - 1]


@runtime_checkable
class _WithBeta(Protocol):
    """A method whose log-ratios become margins by a factor."""

    @property
    def beta(self) -> float:
        """The factor."""
        ...


@dataclass(frozen=True)
class FastSlow:
    """Two modules that chase each other.

    Attributes:
        weight: a, of the chase.
        scale: of the lead f - s in margins, which are in the method's own unit.
        every: optimizer steps between comparisons.
        limit: where the inside of the sigmoid is clamped.
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
        """Two of ``method``.

        Raises:
            UserError: its targets cannot be read off its noisy states, or it has no beta.
        """
        inner = innermost(method)
        if not isinstance(inner, _WithBeta):
            raise UserError(
                f"strategy fast_slow: {type(inner).__name__} has no beta; allowed: DPO and its kin"
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
        """Both losses; metrics are the fast module's, ``slow/loss`` and ``fast_slow/lead`` beside them.

        Raises:
            UserError: the policy is not one of two.
        """
        if not isinstance(policy, Twin):
            raise UserError("strategy fast_slow: there is one policy; it needs model.train: lora")
        draws, steps, sides = Replay(generator), [], []
        for one in (policy.fast, policy.slow):
            draws.rewind()
            heard, held = Listening(one), Listening(reference)
            steps.append(method(heard, held, batch, draws))
            sides.append(margins(method, heard, held, batch))
        fast, slow = steps
        f, s = (side.margin for side in sides)
        ahead = self._chase(sides[0], f - s.detach())
        behind = self._chase(sides[0], f.detach() - s)
        loss = fast.loss + slow.loss + self.weight * (ahead - behind)
        self._count(policy.tally, fast, slow)
        own = {
            "slow/loss": slow.loss.detach(),
            "fast_slow/lead": sides[0].mean((f - s).detach()),
        }
        return Step(loss, {**fast.metrics, **own}, fast.weight)

    def _chase(self, c: Contrast, lead: Tensor) -> Tensor:
        return c.mean(-logsigmoid((self.scale * lead).clamp(-self.limit, self.limit)))

    def _count(self, tally: Tensor, fast: Step, slow: Step) -> None:
        if torch.is_grad_enabled():
            terms = [fast.loss * fast.weight, slow.loss * slow.weight, fast.weight]
            tally += torch.stack([mean_over_ranks(v.detach().reshape(1)) for v in terms]).to(tally)


def margins(method: Method[Any], heard: Listening, held: Listening, batch: Batch[Tensor]) -> Contrast:
    """Pairs of rivals by beta times their log-ratio, from the predictions of policy and reference.

    Raises:
        UserError: the method made no forward on the batch's own samples.
    """
    inner = innermost(method)
    assert isinstance(inner, _WithBeta)
    ratios = []
    for call in heard.of(batch):
        predictions = (call.prediction, answer(held, call))
        m, r = (
            method.reduce(residual(heard.denoiser, batch.x, call.x_t, call.t, prediction) ** 2)
            for prediction in predictions
        )
        ratios.append(inner.beta * (r - m) / 2)
    if not ratios:
        raise UserError("strategy fast_slow: the method never asks the policy about the batch's own samples")
    return contrast(torch.stack(ratios).mean(0), batch.score, batch.group)


CARD = StrategyCard(
    name="fast_slow",
    title="Fast-slow LoRA (OFS-DPO)",
    paper="Online DPO: Direct Preference Optimization with Fast-Slow Chasing (after its abstract and a port)",
    year=2024,
    arxiv="2406.05534",
    composes="pairwise methods with a beta, under LoRA",
    cost="the method once more",
    strategy=FastSlow,
    outermost=True,
)

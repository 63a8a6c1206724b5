"""The source of methods that sample themselves, with gradient: noise, prompts and the reward."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from diffalign.diffusion.randomness import Streams, derive
from diffalign.media.sourced import reworded
from diffalign.rollout.model import RolloutModel
from diffalign.rollout.rounds import PromptOrder
from diffalign.rollout.setting import Setting
from diffalign.rollout.source import RoundReport
from diffalign.types import Batch
from diffalign.utils.transfer import sent

Rewarded = Callable[[Tensor, Sequence[str]], Tensor]
"""(clean latents (N, *d), W N prompts: W times N) -> (W N,) rewards, with gradients to the latents, each of
which has W prompts.
"""


AHEAD = 32
"""Micro-batches whose prompts are encoded together: text encoders go to the accelerator and back for it."""


class NoiseSource:
    """Endless micro-batches of one rank, each prompt a group; a ``types.Source``.

    Prompt and noise of a group depend on (seed, position in the run) alone, as in rounds.
    """

    def __init__(
        self,
        model: RolloutModel,
        reward: Rewarded | None,
        prompts: Sequence[str],
        setting: Setting,
        *,
        groups: int,
        samples: int = 1,
        every: int = 1,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
    ):
        """Hold everything that a batch needs.

        Args:
            model: encodes prompts.
            reward: of clean latents; None: nothing is rewarded.
            prompts: all of them; every epoch has an order of its own.
            setting: the sampler's kernel, times and guidance.
            groups: prompts of a micro-batch.
            samples: of a prompt.
            every: micro-batches between two logged rewards.
            rank: of this process.
            world: processes.
            seed: of noise and orders.
        """
        self._model, self._reward, self._setting = model, reward, setting
        self._prompts = PromptOrder(prompts, seed)
        self._groups, self._samples, self._every = groups, samples, every
        self._rank, self._world = rank, world
        self._seed, self._micro_step = seed, 0
        self.report = RoundReport()

    def seek(self, micro_step: int) -> None:
        """Continue as if ``micro_step`` micro-batches had been drawn."""
        self._micro_step = micro_step

    def close(self) -> None:
        """Nothing was started."""

    def __iter__(self) -> Iterator[Batch[Tensor]]:
        """Yield micro-batches from where ``seek`` has put it."""
        while True:
            start = (self._micro_step * self._world + self._rank) * self._groups
            yield self._batch(range(start, start + self._groups))
            self._micro_step += 1

    def _batch(self, positions: range) -> Batch[Tensor]:
        each, setting = [self._prompts[p] for p in positions], self._setting
        prompts = [prompt for prompt in each for _ in range(self._samples)]
        with torch.no_grad():
            cond, negative = self._model.encode(prompts, self._ahead(positions))
        random = Streams([derive(self._seed, "rollout/noise", position) for position in positions])
        noise = random.normal(len(each), (self._samples, *self._model.shape)).flatten(0, 1)
        self.report.images = (self._micro_step + 1) * len(prompts)
        if self._reward is None:
            self._tell(None)

        def value(latents: Tensor, rows: Tensor, /, words: Sequence[Sequence[str]] = ()) -> Tensor:
            assert self._reward is not None
            own = [prompts[row] for row in rows.tolist()]
            if not words:
                rewards = self._reward(latents, own)
                self._tell(rewards)
                return rewards
            statements = [
                reworded(prompt, f"{word}. {prompt}")
                for column in words
                for word, prompt in zip(column, own, strict=True)
            ]
            rewards = self._reward(latents, statements).reshape(len(words), len(own))
            self._tell(rewards[0])
            return rewards

        return Batch(
            sent(noise, self._model.device),
            {name: sent(rows, self._model.device) for name, rows in cond.items()},
            torch.arange(len(each)).repeat_interleave(self._samples),
            torch.zeros(len(prompts)),
            negative={name: sent(rows, self._model.device) for name, rows in negative.items()},
            kernel=setting.kernel,
            guidance=setting.guidance,
            grid=setting.times,
            value=value if self._reward is not None else None,
        )

    def _ahead(self, positions: range) -> Iterator[str]:
        """Yield the prompts of this process's micro-batches after the one at these positions.

        A model that has this micro-batch's prompts asks for none: with few prompts each costs a permutation.
        """
        stride = self._world * self._groups
        for start in range(positions.start + stride, positions.start + AHEAD * stride, stride):
            yield from (self._prompts[start + place] for place in range(self._groups))

    def _tell(self, rewards: Tensor | None) -> None:
        """Log every so many micro-batches only: reading a value waits for the accelerator."""
        if self._micro_step % self._every == 0:
            number = self._micro_step // self._every
            self.report.round, self.report.figures = number, {"rollout/round": float(number)}
            if rewards is not None:
                self.report.figures["rollout/reward"] = float(rewards.detach().mean())

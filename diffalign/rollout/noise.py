"""The source of methods that backpropagate a reward through their sampling: noise, prompts, the reward."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from diffalign.diffusion.randomness import Streams, derive
from diffalign.rollout.model import RolloutModel
from diffalign.rollout.rounds import PromptOrder
from diffalign.rollout.setting import Setting
from diffalign.rollout.source import Told
from diffalign.types import Batch

Rewarded = Callable[[Tensor, Sequence[str]], Tensor]
"""(clean latents (N, *d), their N prompts) -> (N,) rewards, with gradients to the latents."""


class NoiseSource:
    """Endless micro-batches of one rank, each sample a group of its own; a ``types.Source``.

    Prompt and noise of a sample depend on (seed, position in the run) alone, as in rounds.
    """

    def __init__(
        self,
        model: RolloutModel,
        reward: Rewarded,
        prompts: Sequence[str],
        setting: Setting,
        *,
        groups: int,
        every: int = 1,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
    ):
        """Hold everything that a batch needs.

        Args:
            model: encodes prompts.
            reward: of clean latents.
            prompts: all of them; every epoch has an order of its own.
            setting: the sampler's kernel, times and guidance.
            groups: samples of a micro-batch.
            every: micro-batches between two logged rewards.
            rank: of this process.
            world: processes.
            seed: of noise and orders.
        """
        self._model, self._reward, self._setting = model, reward, setting
        self._prompts = PromptOrder(prompts, seed)
        self._groups, self._every, self._rank, self._world = groups, every, rank, world
        self._seed, self._micro_step = seed, 0
        self.told = Told()

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
        prompts, setting, count = [self._prompts[p] for p in positions], self._setting, len(positions)
        with torch.no_grad():
            cond, negative = self._model.encode(prompts)
        random = Streams([derive(self._seed, "rollout/noise", position) for position in positions])

        def value(latents: Tensor, rows: Tensor) -> Tensor:
            rewards = self._reward(latents, [prompts[row] for row in rows.tolist()])
            self._tell(rewards)
            return rewards

        return Batch(
            random.normal(count, self._model.shape).to(self._model.device),
            {name: rows.to(self._model.device) for name, rows in cond.items()},
            torch.arange(count),
            torch.zeros(count),
            negative={name: rows.to(self._model.device) for name, rows in negative.items()},
            kernel=setting.kernel,
            guidance=setting.guidance,
            grid=setting.times,
            value=value,
        )

    def _tell(self, rewards: Tensor) -> None:
        """Log every so many micro-batches only: reading a value waits for the accelerator."""
        if self._micro_step % self._every == 0:
            mean = float(rewards.detach().mean())
            number = self._micro_step // self._every
            self.told.round = number
            self.told.figures = {"rollout/round": float(number), "rollout/reward": mean}
        self.told.images = (self._micro_step + 1) * self._groups
